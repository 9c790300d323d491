"""The one-layer encoder of vectors with which the authors' training loops were run, and their names for its weights."""

import torch
from torch import nn

from triptych.data.views import View
from triptych.tokens import Tokens


class ToyEncoder(nn.Module):
    """images (B, 1, 1, features) -> a class token (B, D)."""

    def __init__(self, features: int, width: int):
        super().__init__()
        self.body, self.width = nn.Linear(features, width), width

    def many(self, inputs, mixed=()):
        return [self(crops.images) for crops in inputs]

    def forward(self, images):
        cls = self.body(images.flatten(1)).tanh()
        return Tokens(patch=cls[:, None], patch_raw=cls[:, None], grid=None, cls=cls)


def view(x) -> View:
    return View(x[:, None, None], torch.tensor([[0.0, 0, 1, 1]]).expand(len(x), 4), torch.ones(len(x), 2))


def layer(name: str) -> str:
    """'fc0.w', 'bn1.running_var', 'fc_out.b' -> the name in a two- or three-layer MLP with BatchNorm."""
    part, leaf = name.split(".")
    index = 3 if part == "fc_out" else 3 * int(part[2:]) + part.startswith("bn")
    return f"{index}.{ {'w': 'weight', 'b': 'bias'}.get(leaf, leaf) }"


def group(g: dict, prefix: str, our_name) -> dict:
    """{our name: value} of the golden values under a prefix; our_name gives None for what we do not have."""
    named = {our_name(k.removeprefix(prefix)): v for k, v in g.items() if k.startswith(prefix)}
    named.pop(None, None)
    assert named, f"nothing is called {prefix}..."
    return named


def load(module: nn.Module, state: dict) -> None:
    """Values by name; all of them fit, and BatchNorm's counts alone may be left."""
    rest = module.load_state_dict(state, strict=False)
    assert not rest.unexpected_keys
    assert all(k.endswith(("num_batches_tracked", "running_mean", "running_var")) for k in rest.missing_keys), rest


def assert_all_close(ours: dict, expected: dict, tolerance: float, where: str = "") -> None:
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{where} {n}: {m}")


def grads(module: nn.Module) -> dict:
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
