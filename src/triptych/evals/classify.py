"""The classifiers that a supervised run trained: the global token's, which inference uses, and its ensemble's."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from triptych.data.sources import Source
from triptych.errors import UserError
from triptych.evals.features import labels_of
from triptych.evals.frozen import frozen
from triptych.evals.knn import label_rank
from triptych.evals.transform import EvalTransform, batches
from triptych.methods.base import Method
from triptych.methods.supervised import Supervised


@dataclass(frozen=True)
class ClassifyResult:
    """Accuracies in percent: "global" (o_g), and with an ensemble "ensemble" (o_a) and every token's own classifier."""

    top1: dict[str, float]
    top5: dict[str, float]
    averaged: bool  # "global" is that of the average of weights; the ensemble has none
    images: int
    classes: int


def check_supervised(method: Method, source: Source) -> Supervised:
    """Raises UserError for another method, or images of other classes."""
    if not isinstance(method, Supervised):
        name = method.config.name  # type: ignore[union-attr]
        raise UserError(
            f"this run ({name}) trained without labels and has no classifier: use eval knn or eval linear, or give a "
            "run of a supervised recipe"
        )
    trained, given = method.config.classes, len(source.classes or ())
    if trained != given:
        raise UserError(f"the run was trained on {trained} classes, {source.name} has {given}: give images of the same")
    return method


def classify(
    method: Supervised,
    source: Source,
    transform: EvalTransform,
    *,
    average: bool = True,
    batch: int | None = None,
    device: torch.device | str = "cpu",
    workers: int | None = None,
) -> ClassifyResult:
    """average: "global" by the average of weights, where the run has one.  Images that cannot be read are left out.
    batch: None = what is fast on the device.

    The ensemble reads the tokens of the weights it was trained with: it has no average of its own.
    """
    device, ensemble = torch.device(device), method.ensemble
    classifier: nn.Module = method.classifier if average else method.model
    names = ["global"] + ([] if ensemble is None else ["ensemble", *ensemble.names()])
    ranks: list[Tensor] = []
    with frozen(method, device):
        for index, images in batches(source, transform, batch=batch, device=device, workers=workers):
            labels = labels_of(source, torch.tensor(index)).to(device)
            tokens, logits = classifier(images)
            scores = [logits]
            if ensemble is not None:
                if classifier is not method.model:
                    tokens = method.model.encoder(images)
                each = ensemble.embeddings(ensemble.tokens(tokens))
                scores += [each.mean(0), *each]  # the sum of logits ranks classes as their mean does
            ranks.append(torch.stack([label_rank(s, labels) for s in scores]).cpu())
    rank = torch.cat(ranks, 1)
    top1, top5 = (dict(zip(names, (100 * (rank < n).double().mean(1)).tolist(), strict=True)) for n in (1, 5))
    classes = method.config.classes
    assert classes is not None
    return ClassifyResult(top1, top5, classifier is method.average, rank.shape[1], classes)
