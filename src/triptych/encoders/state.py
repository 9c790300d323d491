"""Files of weights, read without running what a pickle may hold."""

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from triptych.errors import UserError

State = dict[str, Tensor]
_STATE_DICTS = ("model", "state_dict", "teacher", "student", "target_encoder", "encoder")  # keys in use


@contextmanager
def own_randomness() -> Iterator[None]:
    """Weights that a partial match leaves random are the same every time, and the caller's randomness is untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def read_tensors(path: Path) -> State:
    """All tensors of a file, nested dicts joined by dots: {"teacher": {"norm.bias": x}} -> {"teacher.norm.bias": x}.

    Optimizers, whose tensors are numbered, and what is no tensor are left out.  Raises UserError where the file cannot
    be read without unpickling objects; argparse's Namespace, in which DINO, iBOT, MAE keep options, is harmless.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            raw = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise _unreadable(path, error) from error
    found = dict(_tensors(raw))
    if not found:
        raise UserError(f"{path} holds no state dict: no tensor has a name")
    return found


def _tensors(raw: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(raw, dict):
        for name, value in raw.items():
            if isinstance(name, str):
                if isinstance(value, Tensor):
                    yield prefix + name, value.detach()
                else:
                    yield from _tensors(value, f"{prefix}{name}.")


def _unreadable(path: Path, error: Exception) -> UserError:
    try:
        objects = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # no zip archive: the error names the first object only
        objects = re.findall(r"GLOBAL (\S+)", str(error))
    objects = sorted(set(objects) - {"argparse.Namespace"})
    if not objects:
        return UserError(f"{path} is not a file of weights that can be read safely: {error}")
    strip = (
        f"import torch; c = torch.load({str(path)!r}, map_location='cpu', weights_only=False); "
        f"torch.save({{k: v for k, v in c.items() if k in {_STATE_DICTS}}}, "
        f"{path.stem + '_weights.pth'!r})"
    )
    return UserError(
        f"{path} is not a file of weights that can be read safely: it pickles {', '.join(objects)}, and unpickling can "
        "run any code.  If you trust who wrote it, keep its state dicts alone, once, where these modules are "
        f'installed:\n  python -c "{strip}"'
    )
