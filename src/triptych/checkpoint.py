"""Checkpoints: one file each, written atomically, safe to open (tensors and plain values only)."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from triptych.errors import UserError

FORMAT = 1


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step_{step:09d}.pt"


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `state` as the checkpoint after `step` optimiser steps, then drop all but the last `keep`.

    A crash at any moment leaves either the old set or the new one: the file gets its name only when it is on the disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target, part = path_of(folder, step), folder / ".part"
    with part.open("wb") as file:
        torch.save({"format": FORMAT, "step": step, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(target)
    for old in steps(folder)[:-keep]:
        path_of(folder, old).unlink()
    return target


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, ascending."""
    return sorted(int(p.stem.removeprefix("step_")) for p in folder.glob("step_*.pt"))


def kept(folder: Path) -> str:
    """What a message says of the checkpoints that are there."""
    saved = steps(folder)
    return f"the checkpoint of step {saved[-1]} is kept" if saved else "nothing was saved"


def finite(module: nn.Module) -> bool:
    """Are all parameters?  A finite loss can have a gradient that is not: such weights must never be saved."""
    return bool(torch.stack(torch._foreach_norm(list(module.parameters()))).isfinite().all())


def load(path: Path) -> dict[str, Any]:
    """A checkpoint's state on the CPU; never runs code from the file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{path} is not a readable checkpoint ({error}); delete it to go on from an older one"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is not a Triptych checkpoint of format {FORMAT}")
    return state
