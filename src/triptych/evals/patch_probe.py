"""A quick linear probe of patch tokens: logistic regression from one token to the class of its patch; mean IoU.

Between k-NN and `segmentation`: no augmentation, no windows, solved to its optimum, a minute on a laptop.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from triptych.data.annotated import IGNORE, Segmented
from triptych.data.images import UnreadableImage
from triptych.data.workers import default_workers, in_worker, unwrapped
from triptych.dense.maps import patch_map
from triptych.dense.segment_data import normalised, read_pair, resize_image, resize_mask
from triptych.dense.slide import class_map
from triptych.encoders.load import Loaded
from triptych.errors import UserError
from triptych.evals.class_maps import MapScores, check_classes, measure, most_frequent
from triptych.evals.frozen import frozen
from triptych.evals.logistic import Fit, fit
from triptych.precision import fast_precision
from triptych.progress import progress

SHORT_PATCHES = 24  # on the shorter side, where no size is given
LAMBDA = 0.1  # λ of `logistic.fit` times the number of patches: UDI's value, weak


@dataclass(frozen=True)
class PatchProbeResult(MapScores):
    """`train_images` are those of the set; the regression saw `probed_images` of them."""

    size: int  # pixels of the shorter side
    patch: int  # pixels
    patches: int  # train patches of the regression
    probed_images: int
    converged: bool  # the regression is at its optimum; if not, the scores are not those of the protocol
    seed: int


def patch_probe(
    model: Loaded,
    train: Segmented,
    val: Segmented,
    *,
    size: int | None = None,
    images: int = 1000,
    per_image: int = 64,
    seed: int = 0,
    device: torch.device | str = "cpu",
    workers: int | None = None,
) -> PatchProbeResult:
    """Patch tokens of the last block, after the final norm, of the frozen encoder.

    size: pixels of the shorter side; both sides are then rounded to whole patches.  None = what the encoder was
    trained on, but at least 24 patches.  A patch's label is the class of at least half of its pixels; patches without
    are left out.  images, per_image: at most so many train images, and patches of each, drawn by the seed, which
    bounds memory.  Features have mean 0 and variance 1 over these patches, and a constant beside them.
    Validation: logits of all patches, brought to each image's size bilinearly, arg-max.
    Raises UserError for a size below one patch, and where fewer than two classes have patches.
    """
    check_classes(train, val)
    patch, place = model.encoder.patch_size, torch.device(device)
    size = max(model.size, SHORT_PATCHES * patch) if size is None else size
    if size < patch or min(images, per_image) < 1:
        raise UserError(
            f"size {size}, images {images}, per_image {per_image}: give at least a patch ({patch} px), 1, 1"
        )
    prepare, floor = Prepare(size, patch, model.mean, model.std), most_frequent(train)
    with frozen(model.encoder, place, fast_precision(place)):
        options = {"images": images, "per_image": per_image, "seed": seed, "device": place, "workers": workers}
        x, labels, probed = train_patches(model, train, prepare, **options)
        probe = Probe(x, labels)
        predictor = partial(_class_map, model, probe)
        counts = {"floor": floor, "train_images": len(train)}
        measured = measure(predictor, prepare.inputs, val, **counts, device=place, workers=workers)
    about = {"patches": len(x), "probed_images": probed, "converged": probe.fitted.converged, "seed": seed}
    return PatchProbeResult(**asdict(measured), size=size, patch=patch, **about)


@dataclass(frozen=True)
class Prepare:
    """Images as the probe sees them."""

    size: int
    patch: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns in pixels: whole patches."""
        scale = self.size / min(height, width)
        rows, columns = (max(1, round(side * scale / self.patch)) * self.patch for side in (height, width))
        return rows, columns

    def inputs(self, image: np.ndarray) -> list[Tensor]:
        """(H, W, 3) uint8 -> one (3, rows, columns) float32."""
        return [normalised(resize_image(image, *self.sides(*image.shape[:2])), self.mean, self.std)]

    def labels(self, mask: np.ndarray) -> np.ndarray:
        """(H, W) uint8 -> (patches,) int64, row by row; IGNORE where no class has half of the patch."""
        rows, columns = self.sides(*mask.shape)
        return patch_labels(resize_mask(mask, rows, columns), self.patch)


def patch_labels(mask: np.ndarray, patch: int) -> np.ndarray:
    """(rows · patch, columns · patch) uint8 -> (rows · columns,) int64: the class of at least half of each patch's
    pixels, of two with half each the lower one; IGNORE where there is none."""
    rows, columns = mask.shape[0] // patch, mask.shape[1] // patch
    cells = mask.reshape(rows, patch, columns, patch).transpose(0, 2, 1, 3).reshape(rows * columns, patch * patch)
    values = np.sort(cells, 1)
    half = (patch * patch + 1) // 2
    # In sorted order a class with half of the pixels fills a window of that length.
    starts = np.arange(patch * patch - half + 1)
    whole = values[:, starts] == values[:, starts + half - 1]
    first = whole.argmax(1)
    return np.where(whole.any(1), np.take_along_axis(values, first[:, None], 1)[:, 0], IGNORE).astype(np.int64)


class Probe:
    """Logistic regression on standardised features, for classes that have patches."""

    def __init__(self, x: Tensor, labels: Tensor):
        """x: (n, D), labels: (n,) int64.  Raises UserError for fewer than two classes."""
        self.known = labels.unique().to(x.device)
        if len(self.known) < 2:
            raise UserError("the train patches are all of one class, or none is labelled: a probe needs two classes")
        x = x.double()
        self.mean, self.std = x.mean(0), x.std(0).clamp(min=1e-6)
        place = torch.searchsorted(self.known, labels.to(x.device))
        self.fitted: Fit = fit(self._rows(x), place, LAMBDA / len(x))
        self.weight = self.fitted.weight.float()

    def _rows(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D + 1) of about unit length."""
        x = (x - self.mean.to(x)) / (self.std.to(x) * x.shape[-1] ** 0.5)
        return torch.cat([x, torch.ones_like(x[..., :1])], -1)

    def logits(self, features: Tensor) -> Tensor:
        """(D, rows, columns) -> (known classes, rows, columns)"""
        rows = self._rows(features.float().permute(1, 2, 0))
        with torch.autocast(rows.device.type, enabled=False):  # what is told apart are small differences
            return (rows @ self.weight).permute(2, 0, 1)


def _class_map(model: Loaded, probe: Probe, inputs: list[Tensor], size: tuple[int, int]) -> Tensor:
    logits = probe.logits(patch_map(model.encoder, inputs[0][None])[0])
    return probe.known[class_map([logits], *size)]


def train_patches(
    model: Loaded,
    source: Segmented,
    prepare: Prepare,
    *,
    images: int,
    per_image: int,
    seed: int,
    device: torch.device,
    workers: int | None = None,
) -> tuple[Tensor, Tensor, int]:
    """Features (n, D) float32 and labels (n,) of the drawn patches, on the device, and the number of images."""
    drawn = np.sort(np.random.default_rng([seed, len(source)]).permutation(len(source))[:images]).tolist()
    loader = DataLoader(
        _Drawn(source, prepare, per_image, seed),
        sampler=drawn,
        batch_size=None,
        num_workers=min(default_workers() if workers is None else workers, len(drawn)),
        worker_init_fn=in_worker,
    )
    x, labels = [], []
    for pixels, places, classes in _read(progress(unwrapped(loader), "patches of image", len(drawn))):
        features = patch_map(model.encoder, pixels[None].to(device))[0].flatten(1)  # (D, patches)
        x.append(features[:, places.to(device)].T.float())
        labels.append(classes)
    if not x:
        raise UserError(f"no image of {source.name} that can be read has a patch of one class")
    return torch.cat(x), torch.cat(labels), len(x)


def _read(items: Iterator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    return (item for item in items if item is not None and len(item[1]))


@dataclass(frozen=True)
class _Drawn(Dataset):
    """index -> pixels (3, rows, columns), positions (n,) and classes (n,) int64 of its drawn patches; None where the
    image cannot be read."""

    source: Segmented
    prepare: Prepare
    per_image: int
    seed: int

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor] | None:
        try:
            image, mask = read_pair(self.source, index)
        except UnreadableImage:
            return None
        labels = self.prepare.labels(mask)
        labelled = np.random.default_rng([self.seed, index]).permutation(np.flatnonzero(labels != IGNORE))
        places = np.sort(labelled[: self.per_image])
        return self.prepare.inputs(image)[0], torch.from_numpy(places), torch.from_numpy(labels[places])
