"""Copy detection: which original is this an edited copy of?  DINO's protocol on Copydays (Douze et al. 2009).

Works on features that are already extracted: TOKEN of images squeezed to SIZE x SIZE pixels (EvalTransform "square").
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from triptych.data.retrieval_sets import RetrievalSet, Wanted
from triptych.data.sources import open_source
from triptych.errors import UserError
from triptych.evals.neighbours import index, nearest
from triptych.evals.retrieval import average_precision, bootstrap_interval, check_features

SIZE, TOKEN, TOP = 320, "cls+gem", 20
PREFIX = 4
"""Characters that the names of an original and its copies share: 200000.jpg, 200001.jpg ..."""


@dataclass(frozen=True)
class CopyDetectionResult:
    """Percent (0 to 100), over the copies that have an original; `skipped` counts the others."""

    mean_ap: float
    interval: tuple[float, float]  # 95 %, of mean_ap: bootstrap over copies
    ap: tuple[float | None, ...]  # of every copy; None = skipped
    skipped: int
    copies: int
    originals: int
    distractor_images: int
    whitening_images: int  # 0 = not whitened
    top: int


@torch.no_grad()
def copy_detection(
    originals: Tensor,
    copies: Tensor,
    wanted: Sequence[Wanted],
    *,
    distractors: Tensor | None = None,
    whiten_on: Tensor | None = None,
    top: int = TOP,
    seed: int = 0,
    memory_mb: int = 512,
) -> CopyDetectionResult:
    """Look for each of `copies` (Q, D) among `originals` (M, D) and `distractors` (N, D) by cosine.

    AP (`average_precision`) counts those of a copy's originals, `wanted`, that are among the `top` most similar images;
    the others as never found.  Equal similarities rank by the lower index, originals first.  whiten_on: features (W, D)
    of other images, from which `whitening` is learned; cosines are then those of whitened features.  seed: of the
    confidence interval.  Runs on the device of `copies`; the others may lie elsewhere.

    Raises UserError for bad features, a truth that does not fit, or copies without any original.
    """
    database = originals if distractors is None else torch.cat([originals, distractors.to(originals.device)])
    check_features(database=database, copy=copies, **({} if whiten_on is None else {"whitening": whiten_on}))
    if len(wanted) != len(copies) or any(int(w.positive.max(initial=-1)) >= len(originals) for w in wanted):
        raise UserError(
            f"the truth is about {len(wanted)} copies; there are {len(copies)} copies and {len(originals)} originals: "
            "use `of_readable` where some could not be read"
        )
    if top < 1:
        raise UserError(f"top is {top}; look at one image at least (DINO: 20)")
    if whiten_on is not None:
        mean, projection = (x.to(copies.device, copies.dtype) for x in whitening(whiten_on))
        database, copies = ((x.to(copies.device) - mean) @ projection for x in (database, copies))
    found = [keys for _, (keys,) in nearest([database], [copies], min(top, len(database)), memory_mb=memory_mb)]
    ap = [
        average_precision(np.flatnonzero(np.isin(list_, w.positive)), len(w.positive)) if len(w.positive) else None
        for list_, w in zip(index(torch.cat(found)).cpu().numpy(), wanted, strict=True)
    ]
    kept = [x for x in ap if x is not None]
    if not kept:
        raise UserError("no copy has an original: nothing can be measured; check the file names")
    return CopyDetectionResult(
        mean_ap=float(np.mean(kept)),
        interval=bootstrap_interval(kept, seed),
        ap=tuple(ap),
        skipped=len(ap) - len(kept),
        copies=len(copies),
        originals=len(originals),
        distractor_images=len(database) - len(originals),
        whitening_images=0 if whiten_on is None else len(whiten_on),
        top=top,
    )


def whitening(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of features (W, D): their mean (D,) and a projection P (D, D), float64; whitened is (y - mean) P.

    P = V diag(max(λ, 1e-5 max λ))^(-1/2) of the second moment xᵀx / W = V diag(λ) Vᵀ.  That is not centred, in DINO's
    script (eval_copy_detection.py:288) as here: features with a large mean keep it as one direction of its own.
    """
    moment = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for part in x.split(4096):  # float64 copies of some rows at a time
        moment.addmm_(part.T.double(), part.double())
    values, vectors = torch.linalg.eigh(moment / len(x))
    return x.mean(0, dtype=torch.float64), vectors * values.clamp(min=1e-5 * values[-1]).rsqrt()


def copydays(folder: str | Path, attack: str = "strong", originals: str = "original") -> RetrievalSet:
    """FOLDER/original/*.jpg is the gallery, FOLDER/ATTACK/*.jpg (strong, jpeg/3, crops/50 ...) are the queries.

    Copies belong to the originals of the same names; where some have none, as "strong" ones, to those whose first 4
    characters are the same.  Raises UserError where several originals are called alike.
    """
    folder = Path(folder).expanduser()
    for part in (originals, attack):
        if not (folder / part).is_dir():
            there = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir())) if folder.is_dir() else ""
            raise UserError(f"{folder} has no folder {part}; there are {there or 'none'}")
    gallery, queries = (open_source(folder / part) for part in (originals, attack))
    names, asked = ([Path(s.key(i)).stem for i in range(len(s))] for s in (gallery, queries))
    length = None if set(asked) <= set(names) else PREFIX
    shared = [name for name, count in Counter(name[:length] for name in names).items() if count > 1]
    if shared:
        what = "the same name" if length is None else f"the same first {PREFIX} characters"
        raise UserError(f"{gallery.name}: several originals have {what} ({', '.join(shared[:3])}); rename them")
    place = {name[:length]: i for i, name in enumerate(names)}
    none = np.empty(0, np.int64)
    own = (place.get(name[:length]) for name in asked)
    wanted = [Wanted(none if i is None else np.array([i]), none) for i in own]
    return RetrievalSet(f"{folder.name} [{attack}]", gallery, queries, {attack: wanted})
