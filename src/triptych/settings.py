"""From a recipe's name, a YAML file and `--dotted.name value` pairs to one checked Recipe, with each value's origin."""

from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from triptych.encoders import ENCODERS
from triptych.errors import UserError, nearest
from triptych.methods import METHODS
from triptych.recipe import Recipe
from triptych.recipes import RECIPES

Flat = dict[str, Any]


def flat(nested: dict, prefix: str = "") -> Flat:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    out: Flat = {}
    for key, value in nested.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def nested(values: Flat) -> dict:
    """{"a.b": 1} -> {"a": {"b": 1}}"""
    out: dict = {}
    for name, value in values.items():
        *path, leaf = name.split(".")
        at = out
        for key in path:
            at = at.setdefault(key, {})
        at[leaf] = value
    return out


def parse_overrides(words: list[str]) -> Flat:
    """["--epochs", "50", "--method.alpha=0.3"] -> {"epochs": 50, "method.alpha": 0.3}; values are read as YAML."""
    out: Flat = {}
    words = [part for w in words for part in (w.split("=", 1) if w.startswith("--") and "=" in w else [w])]
    i = 0
    while i < len(words):
        if not words[i].startswith("--"):
            raise UserError(f"{words[i]!r} stands alone: settings are given as --name value")
        name = words[i][2:].replace("-", "_")
        i += 1
        given = []
        while i < len(words) and not words[i].startswith("--"):
            given.append(words[i])
            i += 1
        if not given:
            raise UserError(f"--{name} needs a value")
        values = [_value(word) for word in given]
        out[name] = values[0] if len(values) == 1 else values
    return out


def _value(word: str) -> Any:
    try:
        return yaml.safe_load(word)
    except yaml.YAMLError:
        return word


def read_config(path: Path) -> Flat:
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no mapping of recipe fields; see `triptych train --show`")
    return flat(content)


def resolve(name: str, config: Path | None, overrides: Flat) -> tuple[Recipe, dict[str, str]]:
    """-> the recipe, and for each of its flat field names where the value comes from."""
    if name not in RECIPES:
        raise UserError(f"no recipe {name!r}{nearest(name, RECIPES)} there are: {', '.join(RECIPES)}")
    start = RECIPES[name]()
    layers = [("default", flat(start.model_dump())), (f"recipe {name}", flat(start.model_dump(exclude_unset=True)))]
    if config is not None:
        layers.append((str(config), read_config(config)))
    layers.append(("command line", overrides))
    values, origin = {}, {}
    for source, layer in layers:
        values = _switch(values, layer, {k for k in values if origin.get(k, "default") != "default"})
        before = {k: k.replace("method.base.", "method.", 1) for k in values}  # what mte wraps was the method
        origin = {k: origin.get(k) or origin.get(before[k], "default") for k in values}
        for key, value in layer.items():
            _check_name(key, _fields(Recipe, values | layer), source)
            values[key], origin[key] = value, source
    kinds = _fields(Recipe, values)
    values |= {k: [v] for k, v in values.items() if isinstance(v, int | float | str) and is_list(kinds.get(k))}
    try:
        recipe = Recipe.model_validate(nested(values))
    except ValidationError as error:
        raise UserError(_readable(error, origin)) from error
    return recipe, {key: origin.get(key, "default") for key in flat(recipe.model_dump())}  # a new method's own fields


def _switch(values: Flat, layer: Flat, chosen: set[str]) -> Flat:
    """Where the layer names another method or encoder: what was chosen and both have stays, defaults are its own.

    A method that becomes the base of "mte" keeps all its settings, under `method.base`.
    """
    changed = [k for k in layer if k.endswith(".name") and values.get(k, layer[k]) != layer[k]]
    if "method.name" in changed and layer["method.name"] == "mte":
        wrapped = {k: v for k, v in values.items() if k.startswith("method.")}
        values = {k: v for k, v in values.items() if k not in wrapped}
        values["name"] = f"mte_{values['name']}"
        if wrapped["method.name"] != "supervised":
            values |= {k.replace("method.", "method.base.", 1): v for k, v in wrapped.items()}
            chosen = {k.replace("method.", "method.base.", 1) for k in chosen}
        return _switch(values, {k: v for k, v in layer.items() if k in ("method.name", "method.base.name")}, chosen)
    if not changed:
        return values
    if "encoder.name" in changed:  # sizes of one architecture mean nothing to another
        values = {k: v for k, v in values.items() if not k.startswith("encoder.") or k == "encoder.drop_path"}
    of_changed = tuple(k.removesuffix("name") for k in changed if k.startswith("method."))
    values = {k: v for k, v in values.items() if k in chosen or not of_changed or not k.startswith(of_changed)}
    known = _fields(Recipe, values | {k: v for k, v in layer.items() if k.endswith(".name")})
    return {k: v for k, v in values.items() if k in known}


def _fields(model: type[BaseModel], values: Flat, prefix: str = "") -> dict[str, Any]:
    """Flat names of all fields, those of the methods and encoders that `values` names, and their types."""
    out: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        kinds = {c.model_fields["name"].default: c for c in _members(field.annotation) if "name" in c.model_fields}
        kind: Any = field.annotation
        if kinds:
            given = values.get(f"{prefix}{name}.name", getattr(field.default, "name", next(iter(kinds))))
            if not isinstance(given, str):
                raise UserError(
                    f"{prefix}{name}.name takes one name, not {given}; MTE over mmc is method.base.name mmc"
                )
            if given not in kinds:
                what = "base of mte" if name == "base" else name
                raise UserError(f"no {what} {given!r}{nearest(str(given), kinds)} there are: {', '.join(kinds)}")
            kind = kinds[given]
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            out |= _fields(kind, values, f"{prefix}{name}.")
        else:
            out[f"{prefix}{name}"] = kind
    return out


def _members(annotation: Any) -> list[type[BaseModel]]:
    """The models of a union, however it is nested."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for part in get_args(annotation) for m in _members(part)]


def is_list(kind: Any) -> bool:
    """Is it a tuple, or one or None?"""
    kinds = [k for k in get_args(kind) if k is not type(None)] if get_origin(kind) in (Union, UnionType) else [kind]
    return all(get_origin(k) is tuple for k in kinds)


def _check_name(key: str, known: dict[str, Any], source: str) -> None:
    if key not in known:
        close = nearest(key, known) or nearest(key.split(".")[-1], [k.split(".")[-1] for k in known])
        leaf = [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
        hint = f"; did you mean {', '.join(leaf)}?" if leaf else close
        raise UserError(f"{source}: no setting {key!r}{hint}\n`triptych train --show` lists all settings")


def _readable(error: ValidationError, origin: dict[str, str]) -> str:
    lines, tags = [], {c.model_fields["name"].default for c in METHODS} | set(ENCODERS)
    for problem in error.errors():
        path = [str(p) for p in problem["loc"] if p not in tags]
        name = ".".join(p for p in path if not p.isdigit())
        where = origin.get(name, "recipe")
        said = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "missing" and path[-1].isdigit():
            said = f"{int(path[-1]) + 1} values are needed at least"
        # Settings at odds with each other come with all of them as input: what is said names those that matter.
        given = "" if isinstance(problem["input"], dict) else f" = {problem['input']!r}"
        lines.append(f"{where}: {name}{given}: {said[0].lower()}{said[1:]}")
    return "\n".join(lines)
