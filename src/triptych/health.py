"""Is a run healthy?  Label-free signs that need no probe: a collapsed encoder shows in all of them."""

import math

import torch
from torch import Tensor

from triptych.data.sources import Source
from triptych.data.subsets import Subset
from triptych.data.views import Views
from triptych.evals.features import extract, labels_of
from triptych.evals.knn import knn
from triptych.evals.transform import EvalTransform
from triptych.methods import Method
from triptych.recipe import Recipe
from triptych.schedules import Progress


def feature_health(features: Tensor) -> dict[str, float]:
    """features (N, D) -> feature_std: mean over D of the standard deviation of unit-length features, times √D (1 =
    spread evenly, 0 = all the same); rankme: effective rank exp(entropy of the normalised singular values), 1..D
    (Garrido et al., RankMe, ICML 2023)."""
    z = torch.nn.functional.normalize(features.float(), dim=-1)
    values = torch.linalg.svdvals(features.double())
    p = values / values.sum().clamp(min=1e-12) + 1e-7
    return {
        "feature_std": (z.std(0).mean() * math.sqrt(z.shape[1])).item(),
        "rankme": torch.exp(-(p * p.log()).sum()).item(),
    }


def _entropy(p: Tensor) -> Tensor:
    return -(p * p.clamp(min=1e-30).log()).sum(-1)


def prediction_health(p_t: Tensor, p_s: Tensor) -> dict[str, float]:
    """Teacher and student probabilities (N, K) of two views of the same images.

    teacher_entropy (nats) and its share of ln K: 1 = uniform, the target says nothing; 0 = one-hot.
    batch_entropy: entropy of the mean target as a share of ln K: near 0 = every image gets the same prototype.
    agreement: share of images whose most likely prototype is the same for both, 0..1.
    """
    top, entropy = math.log(p_t.shape[1]), _entropy(p_t).mean().item()
    return {
        "teacher_entropy": entropy,
        "teacher_entropy_share": entropy / top,
        "batch_entropy_share": _entropy(p_t.mean(0)).item() / top,
        "agreement": (p_t.argmax(-1) == p_s.argmax(-1)).float().mean().item(),
    }


@torch.no_grad()
def measure(
    method: Method, source: Source, recipe: Recipe, views: Views, t: Progress, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Health of the evaluated encoder on a fixed sample, and of the last batch's predictions."""
    sample = sample_of(source, recipe.health.images, recipe.seed)
    transform = EvalTransform.of(recipe.views.global_size, recipe.views.mean, recipe.views.std)
    features, indices = extract(method.encoder, sample, transform, device=device, precision=dtype)
    row = feature_health(features)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        predictions = method.predictions(views, t)
    if predictions is not None:
        row |= prediction_health(*predictions)
    labelled = torch.tensor([sample.label(i) is not None for i in indices.tolist()])
    held = int(labelled.sum()) // 4
    if held:  # a list of paths may label some of its images only
        x, y = features[labelled], labels_of(sample, indices[labelled])
        k = min(recipe.health.k, len(x) - held)
        row["knn"] = knn(x[held:], y[held:], x[:held], y[:held], k=[k]).top1[k]
    return row


def sample_of(source: Source, images: int, seed: int) -> Source:
    """At most so many images, drawn once: a function of the seed."""
    g = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(source), generator=g)[:images].tolist()
    return Subset(source, chosen, f" [sample of {len(chosen)}]")
