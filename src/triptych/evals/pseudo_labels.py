"""Unsupervised classification by a method's own head: the nearest prototype of an image is its pseudo-label.

iBOT's evaluation/unsupervised/unsup_cls.py, for every method with prototypes: DINO, iBOT, UDI, HSSL, SwAV, MSN, MC-SSL.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from triptych.data.sources import Source
from triptych.encoders.base import Crops
from triptych.errors import UserError
from triptych.evals.clustering import ClusterMetrics, cluster_metrics, shuffled
from triptych.evals.features import labels_of
from triptych.evals.frozen import fast_batch, frozen
from triptych.evals.transform import EvalTransform, batches
from triptych.losses import similarity, unit
from triptych.methods.base import Method, Tower
from triptych.methods.mte import MTE
from triptych.precision import fast_precision
from triptych.progress import progress


@dataclass(frozen=True)
class PseudoLabelsResult:
    """How well the prototypes that images choose agree with the classes.

    With many prototypes and few images NMI is high whatever they say: see `shuffled`.
    """

    metrics: ClusterMetrics
    shuffled: ClusterMetrics  # the same pseudo-labels when the labels are shuffled: what chance gives
    prototypes: int  # K, of which metrics.clusters are chosen


def pseudo_labels(
    method: Method,
    source: Source,
    transform: EvalTransform,
    *,
    student: bool = False,
    seed: int = 0,
    batch: int | None = None,
    device: torch.device | str = "cpu",
    precision: torch.dtype | None = None,
    workers: int | None = None,
) -> PseudoLabelsResult:
    """One pass of the labelled images through the teacher (or student): encoder, projector, prototypes.

    argmax of the raw logits, without centre, temperature and balancing.  A method that MTE wraps is read by its own
    projector.  batch, precision: as in `extract_all`; seed: of the shuffle.  The method is left as it was.  Raises
    UserError for a method without prototypes and for images without labels.
    """
    tower, prototypes = prototype_head(method, student)
    labels, device = labels_of(source, torch.arange(len(source))), torch.device(device)
    batch = batch or fast_batch(device, transform.size)
    indices: list[int] = []
    chosen: list[Tensor] = []
    with frozen(tower, device, precision or fast_precision(device)):
        prototypes = prototypes.to(device)
        for index, images in progress(
            batches(source, transform, batch=batch, device=device, workers=workers),
            f"pseudo-labels of {source.name}:",
            len(source),
            each=batch,
        ):
            ((last,),) = tower.encoder.run([Crops(images, patches=False)], [-1])
            chosen.append(nearest_prototype(tower.projector(last.global_token), prototypes))
            indices += index
    labels, predicted = labels[indices], torch.cat(chosen).cpu()
    return PseudoLabelsResult(
        metrics=cluster_metrics(labels, predicted),
        shuffled=cluster_metrics(torch.from_numpy(shuffled(labels.numpy(), seed)), predicted),
        prototypes=len(prototypes),
    )


def prototype_head(method: Method, student: bool = False) -> tuple[Tower, Tensor]:
    """The teacher's (or student's) encoder and projector, and the prototypes (K, P) that its class token is compared
    with.  Raises UserError for a method without."""
    base = method.base if isinstance(method, MTE) else method
    tower = getattr(base, "student" if student else "teacher", None)
    found = getattr(tower, "prototypes", getattr(base, "prototypes", None))  # the towers of MSN share theirs
    if not isinstance(tower, Tower) or found is None:
        name = base.config.name  # type: ignore[union-attr]
        raise UserError(
            f"{name} has no prototypes to classify by: cluster its features instead (triptych eval clustering)"
        )
    return tower, found.weight.detach()


@torch.no_grad()
def nearest_prototype(z: Tensor, prototypes: Tensor, rows: int = 1024) -> Tensor:
    """The prototype of the largest logit of each embedding: z (N, P), prototypes (K, P) -> (N,) int64.

    The embeddings are put to unit length, as the methods do; the prototypes are used as they come
    (`Prototypes.weight`: of unit length, unless their gain was trained).  `rows` at a time: (N, K) may be large.
    """
    return torch.cat([similarity(unit(part), prototypes).argmax(1) for part in z.split(rows)])
