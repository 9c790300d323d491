"""Variants of presets that are frozen dataclasses, by the names of their fields."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from triptych.errors import UserError, nearest
from triptych.settings import is_list

T = TypeVar("T")


def named(given: "str | T", presets: Mapping[str, T], what: str) -> T:
    """The preset itself, or that of the name; raises UserError for a name that is none.  what: "linear" ..."""
    if not isinstance(given, str):
        return given
    if given not in presets:
        raise UserError(f"no {what} preset {given!r}{nearest(given, presets)}; choose one of {', '.join(presets)}")
    return presets[given]


def with_changes(preset: T, changes: Mapping[str, Any]) -> T:
    """The preset with other values of its fields, or of fields of dataclasses within it; its name then says so.

    A single value stands for a tuple of one.  Raises UserError for names that there are not, and values that a field
    cannot have.
    """
    left = dict(changes)
    variant = _with(preset, left)
    if left:
        name = next(iter(left))
        known = sorted(_names(preset) - {"name", "source"})
        raise UserError(f"no setting --{name}{nearest(name, known)}; there are {', '.join(known)}")
    if variant == preset:
        return preset
    return replace(variant, name=f"{preset.name} (changed)")  # type: ignore[attr-defined, type-var]


def _with(config: Any, left: dict[str, Any]) -> Any:
    """With the values that it or what is within it knows, which are taken out of `left`."""
    kinds, values = get_type_hints(type(config)), {}
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            values[field.name] = _with(value, left)
        elif field.name in left and field.name not in ("name", "source"):
            values[field.name] = _checked(field.name, kinds[field.name], left.pop(field.name))
    return replace(config, **values)


def _checked(name: str, kind: Any, given: Any) -> Any:
    if is_list(kind) and isinstance(given, int | float | str):
        given = [given]
    try:
        return TypeAdapter(kind).validate_python(given)
    except ValidationError as error:
        said = "; ".join(dict.fromkeys(problem["msg"] for problem in error.errors()))
        raise UserError(f"--{name} {given!r}: {said[0].lower()}{said[1:]}") from error


def _names(config: Any) -> set[str]:
    within = [getattr(config, f.name) for f in fields(config)]
    inner = [_names(value) for value in within if is_dataclass(value)]
    own = {f.name for f, value in zip(fields(config), within, strict=True) if not is_dataclass(value)}
    return own.union(*inner)
