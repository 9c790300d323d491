"""Checkouts of other people's code: their modules, imported from a path without leaving a trace, and their commit.

The authors' scripts call their modules `utils`, `models`, `vision_transformer`: two checkouts cannot be on sys.path at
once.  Nothing here is part of the package, and nothing of theirs is copied: a person gives the path.
"""

import importlib
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import torch.distributed as dist

from triptych.errors import UserError

# Imported by the scripts and used by no step; not everybody has what they need.
NEEDLESS = ("tensorboardX", "evaluation", "evaluation.unsupervised", "evaluation.unsupervised.unsup_cls")


class Checkout:
    """`Checkout(path)["main_dino"]` is that module of the checkout."""

    def __init__(self, path: Path | str, *names: str):
        """Import the modules `names` from the folder `path`.  Raises UserError where they are not there."""
        self.path = Path(path).expanduser().resolve()
        missing = [name for name in names if not (self.path / name.replace(".", "/")).with_suffix(".py").exists()]
        if missing:
            file = missing[0].replace(".", "/")
            raise UserError(f"{self.path} has no {file}.py: give the path of a checkout of the authors' repository")
        with _alone(self.path):
            self._modules = {name: importlib.import_module(name) for name in names}

    def __getitem__(self, name: str) -> ModuleType:
        return self._modules[name]

    @property
    def commit(self) -> str:
        """12 hex digits, '+' where a file that git knows was changed; of an installed package its name and version."""
        ask = ["git", "-C", str(self.path), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
        said = subprocess.run(ask, capture_output=True, text=True).stdout.strip()
        return said or next((p.stem for p in self.path.glob("*.dist-info")), "unknown")


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Imports look in `path` first; what they bring from there is forgotten by sys.modules afterwards."""
    before = dict(sys.modules)
    own = {p.stem for p in path.iterdir() if p.suffix == ".py" or p.is_dir()}
    for name in [n for n in sys.modules if n.partition(".")[0] in own]:
        del sys.modules[name]
    sys.modules.update({name: MagicMock() for name in NEEDLESS})
    sys.path.insert(0, str(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.path.remove(str(path))
        theirs = [n for n, m in sys.modules.items() if str(path) in str(getattr(m, "__file__", None))]
        for name in {*theirs, *NEEDLESS}:
            sys.modules.pop(name, None)
        sys.modules.update(before)


@contextmanager
def one_process(device: str) -> Iterator[None]:
    """A process group of this process alone: the authors' losses all-reduce their centres without asking."""
    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
