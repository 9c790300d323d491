"""What fine-tuning keeps of the weights it starts from, beside the encoder: a projection layer, a classifier."""

from pathlib import Path
from typing import Any, cast

from torch import nn

from triptych.encoders.load import load_method, of_run
from triptych.encoders.state import State, read_tensors
from triptych.errors import UserError
from triptych.methods.supervised import Supervised

# DINO and iBOT; UDI, whose one head is stored three times; the same of files with one network.
HEADS = ("teacher.head.mlp.", "teacher.head.0.mlp.", "head.mlp.", "head.0.mlp.")


def keep_head(method: Supervised, weights: str) -> None:
    """Start the kept projection and classifier of a method from `weights`, as its encoder did.

    weights: a run's folder or one of its checkpoints (the teacher's head; a supervised run's classifier as it is
    evaluated), or a full checkpoint of DINO, iBOT or UDI (the teacher's head).  Raises UserError where it holds none.
    """
    c, model = method.config, method.model
    if not c.projection and c.classifier == "new":
        return
    path = Path(weights)
    started = load_method(weights)[1] if path.is_dir() or of_run(path) else None
    if c.projection:
        layer = _of_file(path) if started is None else _of_method(started, weights)
        _fill(cast(nn.Linear, model.projection), layer, weights, f"--method.projection {len(layer['bias'])}")
    if c.classifier == "kept":
        if not isinstance(started, Supervised):
            raise UserError(f"{weights} has no classifier to keep: give a supervised run, or --method.classifier new")
        hint = "classes and what they read must be the same, or --method.classifier new"
        _fill(model.head, dict(started.classifier.head.state_dict()), weights, hint)
    if method.average is not None:
        method.average.load_state_dict(model.state_dict())


def _of_method(started: nn.Module, weights: str) -> State:
    """Weight and bias of the first layer of a method's projector, before its GELU; of a supervised run, of the layer
    that it kept."""
    if isinstance(started, Supervised):
        first, then = started.classifier.projection, nn.GELU()
    else:
        head: Any = getattr(getattr(started, "teacher", None), "projector", [None, None])
        first, then = head[0], head[1]
    if first is None:
        raise UserError(f"{weights} has no projection layer to keep: --method.projection 0")
    if not isinstance(then, nn.GELU):
        what = type(then).__name__
        raise UserError(f"{weights}: {what} follows its first projection layer, not GELU: --method.projection 0")
    return dict(cast(nn.Linear, first).state_dict())


def _of_file(path: Path) -> State:
    """The first layer of the head in a checkpoint of DINO, iBOT or UDI: the teacher's, where there are two."""
    state = {name.replace("module.", ""): value for name, value in read_tensors(path).items()}
    for head in HEADS:
        names = [f"{head}0.weight", f"{head}0.bias"]
        if all(name in state for name in names):
            if f"{head}1.weight" in state:
                raise UserError(f"{path}: BatchNorm follows its first projection layer: --method.projection 0")
            return {name.rpartition(".")[2]: state[name] for name in names}
    raise UserError(
        f"{path} has no projection layer to keep (looked for {', '.join(f'{head}0.weight' for head in HEADS)}): give "
        "the full checkpoint, not that of the backbone alone, or --method.projection 0"
    )


def _fill(layer: nn.Linear, state: State, weights: str, hint: str) -> None:
    found, here = tuple(state["weight"].shape), tuple(layer.weight.shape)
    if found != here:
        raise UserError(
            f"{weights}: a layer to keep is {found[1]} -> {found[0]} there, {here[1]} -> {here[0]} here: {hint}"
        )
    layer.load_state_dict(state)
