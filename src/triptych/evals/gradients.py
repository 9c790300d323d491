"""How hard each term of a loss pulls at the encoder, and whether the terms agree (docs/methods/mmc.md, E4)."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from triptych.data.views import Views
from triptych.encoders.base import Encoder
from triptych.methods.base import Method
from triptych.schedules import Progress


@dataclass(frozen=True)
class GradientsResult:
    """Means over batches, of the gradient at the parameters of the encoder's last block."""

    norms: dict[str, float]  # of each logged term, before the weight that it has in the loss
    cosines: dict[str, float]  # between the gradients of two terms, "a, b"
    loss: float  # norm of the whole loss's gradient
    batches: int


def trained_encoder(method: Method) -> Encoder:
    """The encoder that the optimiser moves."""
    found = [m for m in method.modules() if isinstance(m, Encoder) and any(p.requires_grad for p in m.parameters())]
    assert len(found) == 1
    return found[0]


def gradients(method: Method, batches: Iterable[Views], t: Progress) -> GradientsResult:
    """The method is left as it is (but for BatchNorm's running statistics), its parameters without gradients."""
    block = [p for part in trained_encoder(method).block_parts()[-1] for p in part.parameters() if p.requires_grad]
    norms: list[dict[str, float]] = []
    cosines: list[dict[str, float]] = []
    for views in batches:
        out = method(views, t)
        terms = {name: term for name, term in out.terms.items() if term.requires_grad}
        found = {name: _gradient(term, block) for name, term in terms.items()}
        whole = {"loss": _gradient(out.loss, block)}
        norms.append({name: g.norm().item() for name, g in (found | whole).items()})
        pairs = [(a, b) for a in found for b in found if a < b]
        cosines.append({f"{a}, {b}": torch.cosine_similarity(found[a], found[b], dim=0).item() for a, b in pairs})
    mean = _mean(norms)
    return GradientsResult({k: v for k, v in mean.items() if k != "loss"}, _mean(cosines), mean["loss"], len(norms))


def _gradient(x: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """All of them in one vector; zeros where x does not depend on one."""
    found = torch.autograd.grad(x, parameters, retain_graph=True, allow_unused=True)
    whole = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    return torch.cat([g.flatten() for g in whole])


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
