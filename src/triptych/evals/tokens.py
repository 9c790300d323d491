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
from triptych.evals.frozen import frozen
from triptych.evals.knn import knn, knn_of_spaces
from triptych.evals.linear import LinearResult, linear
from triptych.evals.spill import Rows, on_disk
from triptych.evals.token_analysis import TokenAnalysis, analyse
from triptych.evals.transform import EvalTransform, batches
from triptych.losses import unit
from triptych.methods.base import Method, Siamese
from triptych.methods.mte import MTE
from triptych.methods.supervised import Supervised
from triptych.precision import fast_precision
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
            if not base.own_aux:
                return tower.encoder(images)
            # Only the base's own `encode`, of both towers, adds its auxiliary tokens (HSSL); unmasked, whole.
            place = images.new_zeros(len(images), 4)
            S, T = base.encode(Views([View(images, place, place[:, :2])], []), Progress(0, 1), patches=True)
            return (S if student else T)[0]

        weights = "student" if student else "teacher"
        return cls(weights, tower.encoder, encode, tower.projector, ensemble, prototypes)


@dataclass(frozen=True)
class TokenFeatures:
    """Of N images, float32, in files that the system maps into memory (`spill.on_disk`)."""

    names: list[str]  # of the M auxiliary tokens
    before: Tensor  # (N, D) the global token beside the auxiliary ones
    after: Tensor  # (N, D) the global token of the encoder without them: what is exported
    tokens: Tensor  # (M, N, D)
    embeddings: Tensor | None  # (1 + M, N, P): the global token's, then the auxiliary ones'
    fused: Tensor  # (N, P) z_a
    indices: Tensor  # (N,) int64 into the source; images that cannot be read are left out
    compared: int  # images, of which both encoders made the global token; of the others `after` is `before`
    difference: float  # the largest among those


def extract_tokens(
    side: Side,
    source: Source,
    transform: EvalTransform,
    *,
    embeddings: bool = True,
    compared: int = 1024,
    batch: int | None = None,
    device: torch.device | str = "cpu",
    precision: torch.dtype | None = None,
    workers: int | None = None,
) -> TokenFeatures:
    """One pass over the images.  `side` must be in eval mode and on the device.

    embeddings: keep them.  compared: so many images, the first ones, pass the encoder without auxiliary tokens too; all
    do from where a global token differs.  batch, precision: as in `extract_all`.
    """
    device, ensemble = torch.device(device), side.ensemble
    stripped, rows = side.encoder.without("aux"), Rows(len(source))
    indices: list[int] = []
    seen, difference = 0, 0.0
    with frozen(stripped, device, precision or fast_precision(device)):
        for index, images in batches(source, transform, batch=batch, device=device, workers=workers):
            x = side.encode(images)
            tokens, before = ensemble.tokens(x), x.global_token
            z, after = ensemble.embeddings(tokens), before
            if seen < compared or difference:
                after = stripped(images).global_token
                seen, difference = seen + len(index), max(difference, (before - after).abs().max().item())
            found = {"before": before, "after": after, "tokens": tokens, "fused": ensemble.fused(z)}
            rows.add(**found | ({"embeddings": torch.cat([side.head(before)[None], z])} if embeddings else {}))
            indices += index
    found = {name: rows[name] for name in ("before", "after", "tokens", "fused")}
    kept = rows["embeddings"] if embeddings else None
    return TokenFeatures(
        ensemble.names(), **found, embeddings=kept, indices=torch.tensor(indices), compared=seen, difference=difference
    )


@dataclass(frozen=True)
class TokensResult:
    """Top-1 in percent of k-NN, by what is looked at; the analysis is of the global token and each auxiliary one."""

    k: int
    knn: dict[str, float]
    removal_is_exact: bool  # the global token of each compared image is the same to the last bit without auxiliary ones
    removal_difference: float  # largest absolute difference
    removal_images: int  # that were compared
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
    }
    accuracy = {name: knn(*both(of), k=[k]).top1[k] for name, of in features.items()}
    bank, asked = ([x.after, *x.tokens] for x in (train, test))
    asked, right = [x.to(device) for x in asked], test_labels.to(device)
    together = knn_of_spaces(bank[1:], train_labels, asked[1:], joints=[range(len(bank) - 1)], k=k)[0]
    accuracy[TOGETHER] = 100 * (together == right).double().mean().item()
    analysis = analyse(
        ["global", *test.names],
        bank,
        train_labels,
        asked,
        right,
        embeddings=None if prototypes is None or test.embeddings is None else test.embeddings.to(device),
        prototypes=None if prototypes is None else prototypes.to(device),
        k=k,
    )
    accuracy |= dict(zip(analysis.names[1:], analysis.knn[1:], strict=True))
    features[TOGETHER] = lambda x: side_by_side(x.tokens)
    probed = ("global after removal", "fused embedding", TOGETHER) if probe else ()
    difference = max(train.difference, test.difference)
    return TokensResult(
        k=k,
        knn=accuracy,
        removal_is_exact=difference == 0,
        removal_difference=difference,
        removal_images=train.compared + test.compared,
        analysis=analysis,
        linear={name: linear(*both(features[name])) for name in probed},
    )


TOGETHER = "auxiliary tokens concatenated"


def side_by_side(tokens: Tensor) -> Tensor:
    """(M, N, D) -> (N, M D), each of unit length, on disk."""
    m, n, width = tokens.shape
    out = on_disk(n, m, width)
    for i, x in enumerate(tokens):
        for start in range(0, n, 65536):
            out[start : start + 65536, i] = unit(x[start : start + 65536])
    return out.flatten(1)
