"""The auxiliary tokens of a run: each of them, all together, and what the global token is without them (MTE paper).

Shapes: M auxiliary tokens, N images, D width, P embedding (classes, of a supervised run).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from triptych.data.sources import Source
from triptych.data.views import View, Views
from triptych.encoders.base import Encoder
from triptych.ensemble import Ensemble
from triptych.errors import UserError
from triptych.evals.features import EvalTransform, batches
from triptych.evals.knn import knn
from triptych.evals.linear import LinearResult, linear
from triptych.evals.token_analysis import TokenAnalysis, analyse
from triptych.losses import unit
from triptych.methods.base import Method, Siamese
from triptych.methods.mte import MTE
from triptych.methods.supervised import Supervised
from triptych.schedules import Progress
from triptych.tokens import Tokens


@dataclass(frozen=True)
class Side:
    """The teacher or the student of a method: what makes tokens of images, and embeddings of tokens."""

    weights: str  # "teacher" or "student"
    encoder: Encoder  # with auxiliary tokens
    encode: Callable[[Tensor], Tokens]  # (B, 3, H, W) -> tokens, the method's own auxiliary ones included
    head: nn.Module  # of the global token, (B, D) -> (B, P)
    ensemble: Ensemble
    prototypes: Tensor | None  # (K, P)

    @classmethod
    def of(cls, method: Method, student: bool = False) -> "Side":
        """A supervised run's ensemble has no average: it is always read beside the weights it was trained with.

        Raises UserError for a method without auxiliary tokens.
        """
        if isinstance(method, Supervised) and method.ensemble is not None:
            model = method.model
            return cls("student", model.encoder, model.encoder, model.head, method.ensemble, None)
        if not isinstance(method, MTE):
            name = method.config.name  # type: ignore[union-attr]
            raise UserError(
                f"this run ({name}) has no auxiliary tokens: give a run of an mte_... recipe, of --method.name mte, or "
                "of supervised with --method.aux or --method.pooled above 0"
            )
        tower = method.student if student else method.teacher
        own = student or method.teaches_itself
        ensemble = method.student_ensemble if own else method.teacher_ensemble
        base = cast(Siamese, method.base)
        found = getattr(tower, "prototypes", getattr(base, "prototypes", None))  # the towers of MSN share theirs
        prototypes = None if found is None else found.weight.detach()

        def encode(images: Tensor) -> Tokens:
            # The base's own `encode`, for bases that add auxiliary tokens to the encoder's (HSSL); unmasked, whole.
            place = images.new_zeros(len(images), 4)
            S, T = base.encode(Views([View(images, place, place[:, :2])], []), Progress(0, 1))
            return (S if student else T)[0]

        weights = "student" if student else "teacher"
        return cls(weights, tower.encoder, encode, tower.projector, ensemble, prototypes)


@dataclass(frozen=True)
class TokenFeatures:
    """Of N images, on the CPU, float32: M + 2 times the memory of one token's features, and what the heads add."""

    names: list[str]  # of the M auxiliary tokens
    before: Tensor  # (N, D) the global token beside the auxiliary ones
    after: Tensor  # (N, D) the global token of the encoder without them: what is exported
    tokens: Tensor  # (M, N, D)
    embeddings: Tensor  # (1 + M, N, P): the global token's, then the auxiliary ones'
    fused: Tensor  # (N, P) z_a
    indices: Tensor  # (N,) int64 into the source; images that cannot be read are left out


@torch.no_grad()
def extract_tokens(
    side: Side,
    source: Source,
    transform: EvalTransform,
    *,
    batch: int = 256,
    device: torch.device | str = "cpu",
    workers: int | None = None,
) -> TokenFeatures:
    """One pass over the images.  `side` must be in eval mode and on the device."""
    stripped, ensemble = side.encoder.without("aux").eval(), side.ensemble
    indices: list[int] = []
    parts: list[tuple[Tensor, ...]] = []
    for index, images in batches(source, transform, batch=batch, device=torch.device(device), workers=workers):
        x = side.encode(images)
        tokens = ensemble.tokens(x)
        z = torch.cat([side.head(x.global_token)[None], ensemble.embeddings(tokens)])
        found = x.global_token, stripped(images).global_token, tokens, z, ensemble([x])[0]
        parts.append(tuple(part.float().cpu() for part in found))
        indices += index
    before, after, tokens, z, fused = (torch.cat(p, p[0].ndim - 2) for p in zip(*parts, strict=True))
    return TokenFeatures(ensemble.names(), before, after, tokens, z, fused, torch.tensor(indices))


@dataclass(frozen=True)
class TokensResult:
    """Top-1 in percent of k-NN, by what is looked at; the analysis is of the global token and each auxiliary one."""

    k: int
    knn: dict[str, float]
    removal_is_exact: bool  # the global token of every image is the same to the last bit without auxiliary tokens
    removal_difference: float  # largest absolute difference
    analysis: TokenAnalysis
    linear: dict[str, LinearResult]


def measure_tokens(
    train: TokenFeatures,
    train_labels: Tensor,
    test: TokenFeatures,
    test_labels: Tensor,
    *,
    prototypes: Tensor | None = None,
    k: int = 10,
    probe: bool = False,
    device: torch.device | str = "cpu",
) -> TokensResult:
    """probe: linear classifiers too, on the global token, the fused vector, and all auxiliary tokens side by side.

    device: where neighbours are searched.
    """

    def both(of: Callable[[TokenFeatures], Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return of(train), train_labels, of(test).to(device), test_labels.to(device)

    features: dict[str, Callable[[TokenFeatures], Tensor]] = {
        "global before removal": lambda x: x.before,
        "global after removal": lambda x: x.after,
        "fused embedding": lambda x: x.fused,
        "auxiliary tokens concatenated": lambda x: torch.cat(list(unit(x.tokens)), -1),
    }
    accuracy = {name: knn(*both(of), k=[k]).top1[k] for name, of in features.items()}
    analysis = analyse(
        ["global", *test.names],
        torch.cat([train.after[None], train.tokens]),
        train_labels,
        torch.cat([test.after[None], test.tokens]).to(device),
        test_labels.to(device),
        embeddings=None if prototypes is None else test.embeddings.to(device),
        prototypes=None if prototypes is None else prototypes.to(device),
        k=k,
    )
    accuracy |= dict(zip(analysis.names[1:], analysis.knn[1:], strict=True))
    probed = ("global after removal", "fused embedding", "auxiliary tokens concatenated") if probe else ()
    difference = max((x.before - x.after).abs().max().item() for x in (train, test))
    return TokensResult(
        k=k,
        knn=accuracy,
        removal_is_exact=all(torch.equal(x.before, x.after) for x in (train, test)),
        removal_difference=difference,
        analysis=analysis,
        linear={name: linear(*both(features[name])) for name in probed},
    )
