"""Views of a batch and the geometry between them.

A crop's box travels with its view; maps between views are derived from the boxes on the device where they are needed.
Image coordinates: y, x in [0, 1] over the source image's height and width, pixel edges at 0 and 1.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.data import batched_operations
from triptych.data.corruption import NOISE, ZEROS, CorruptionConfig
from triptych.errors import UserError

Coordinates = Literal["centres", "ends"]


@dataclass(frozen=True)
class View:
    """One crop of every image of the batch."""

    images: Tensor  # (B, 3, H, W): uint8 from the loader, normalised floats once on the device
    box: Tensor  # (B, 4) y0 x0 y1 x1, image coordinates of the crop's edges; x0 > x1 when it was flipped
    pixel: Tensor  # (B, 2) height and width of one source pixel in image coordinates
    samples: Tensor | None = None  # (B, M) int64: patches drawn by stratified sampling, row-major index, ascending
    mask: Tensor | None = None  # (B, N) bool: True = hidden from the student
    keep: Tensor | None = None  # (B, n) int64, ascending: patches that enter the student, the others are dropped
    corrupted: Tensor | None = None  # (B, 3, H, W): the images with pixels replaced, for the student
    # (B, H, W): where they are.  From the loader: uint8 codes of data/corruption.py; on the device: bool.
    pixel_mask: Tensor | None = None
    hidden: Tensor | None = None  # (H,) int64: where `mask` holds, as places in B·N; see `hidden_places`
    colours: Tensor | None = None  # (B, COLUMNS): what `on_device` still has to do to the colours of `images`

    def map(self, change: Callable[[Tensor], Tensor]) -> "View":
        """The view with `change` applied to each of its tensors."""
        changed: dict[str, Any] = {name: None if x is None else change(x) for name, x in vars(self).items()}
        return View(**changed)

    def hidden_places(self) -> Tensor:
        """(H,) int64: places in B·N of the hidden patches.  The loader counts them: asking the GPU would be a wait."""
        assert self.mask is not None
        return self.mask.flatten().nonzero()[:, 0] if self.hidden is None else self.hidden

    def replaced_share(self, patch_size: int) -> Tensor:
        """(B, N): how much of each patch is replaced in `corrupted`, 0 to 1."""
        assert self.pixel_mask is not None
        return F.avg_pool2d(self.pixel_mask[:, None].to(self.images.dtype), patch_size).flatten(1)


@dataclass(frozen=True)
class Views:
    global_crops: list[View]  # seen by student and teacher
    local_crops: list[View]  # seen by the student only (but for one reading of MMC)
    labels: Tensor | None = None  # (B,) int64: the images' classes, for methods that ask for them

    def map(self, change: Callable[[Tensor], Tensor]) -> "Views":
        """The views with `change` applied to each of their tensors, labels included."""
        labels = None if self.labels is None else change(self.labels)
        return Views([v.map(change) for v in self.global_crops], [v.map(change) for v in self.local_crops], labels)

    @property
    def all(self) -> list[View]:
        return self.global_crops + self.local_crops

    def of_global(self, every: bool) -> list[bool]:
        """For each of `all`: is something wanted of it that is wanted of global crops, or of every crop?"""
        return [True] * len(self.global_crops) + [every] * len(self.local_crops)

    def __len__(self) -> int:
        """Images in the batch."""
        return len(self.global_crops[0].images)

    def pin_memory(self) -> "Views":
        return self.map(Tensor.pin_memory)

    def on_device(self, device: torch.device, mean: Tensor, std: Tensor) -> "Views":
        """Moved to the device, uint8 pixels there made floats: (x/255 − mean)/std, mean and std (3,) on the device.

        Colours that the workers left to the device are changed first.  Noise of corrupted images is drawn here, from
        the device's generator.
        """
        moved = self.map(lambda x: x.to(device, non_blocking=True)).coloured(self)
        scale, shift = 1 / (255 * std), -mean / std

        def floats(view: View) -> View:
            images = torch.addcmul(shift[:, None, None], view.images, scale[:, None, None])
            if view.corrupted is None or view.pixel_mask is None:
                return replace(view, images=images)
            copied = torch.addcmul(shift[:, None, None], view.corrupted, scale[:, None, None])
            code = view.pixel_mask[:, None]
            filled = torch.where(code == NOISE, torch.randn_like(copied), copied).masked_fill(code == ZEROS, 0)
            return replace(view, images=images, corrupted=filled, pixel_mask=view.pixel_mask > 0)

        return Views([floats(v) for v in moved.global_crops], [floats(v) for v in moved.local_crops], moved.labels)

    def coloured(self, given: "Views") -> "Views":
        """The images under their `colours`, which `given` still has on the CPU; crops of one size all at once."""
        views, drawn = self.all, [view.colours for view in given.all]
        for size in {view.images.shape[-1] for view in views if view.colours is not None}:
            group = [i for i, view in enumerate(views) if view.images.shape[-1] == size]
            rows = torch.cat([x for i in group if (x := drawn[i]) is not None])
            images = batched_operations.apply(torch.cat([views[i].images for i in group]), rows)
            for i, part in zip(group, images.chunk(len(group)), strict=True):
                views[i] = replace(views[i], images=part, colours=None)
        n = len(self.global_crops)
        return Views(views[:n], views[n:], self.labels)


@dataclass(frozen=True)
class MaskSpec:
    """How many patches of a global crop are hidden, and in which shape (data/masks.py).

    The defaults are iBOT's: half of the crops keep all their patches, the others lose a share of U(0.1, 0.5).
    """

    ratios: tuple[float, ...] = (0.0, 0.3)  # r, shares of the patches, one of which is drawn per crop ...
    variations: tuple[float, ...] = (0.0, 0.2)  # v, as many ... and varied: U(r - v, r + v)
    shape: Literal["block", "random"] = "block"

    def __post_init__(self) -> None:
        if not self.ratios or len(self.ratios) != len(self.variations):
            raise UserError(
                f"{len(self.ratios)} mask ratios and {len(self.variations)} variations: give one variation per ratio"
            )
        for r, v in zip(self.ratios, self.variations, strict=True):
            if not 0 <= r - v <= r + v <= 1:
                raise UserError(f"a mask ratio of {r} ± {v} leaves the range of a share, 0 to 1: lower its variation")


@dataclass(frozen=True)
class ViewSpec:
    """What a method asks of the loader beyond the crops' sizes and colours."""

    window_global: int = 0  # stratified sampling: side of a window in patches, 0 = no samples
    window_local: int = 0
    mask: MaskSpec | None = None  # of global crops; None = no View has a mask
    drop: float | None = None  # share of a global crop's patches that is dropped; None = no View has `keep`
    corruption: CorruptionConfig | None = None  # of global crops; None = no View has corrupted images
    labels: bool = False  # one per image, or the source is refused
    global_crops: int = 2  # of each image
    local_crops: bool = True  # of any use to it?


def ends_box(box: Tensor, pixel: Tensor) -> Tensor:
    """(B, 4): the box through the centres of a crop's first and last pixels instead of through its edges."""
    half = torch.sign(box[:, 2:] - box[:, :2]) * pixel / 2
    return torch.cat([box[:, :2] + half, box[:, 2:] - half], 1)


def token_positions(box: Tensor, grid: tuple[int, int], coords: Coordinates = "centres") -> Tensor:
    """(B, N, 2): y, x of every token of a crop, row-major.

    "centres": the patches' centres.  "ends": the grid's first and last token lie on the box itself, which is then
    one of `ends_box` (UDI's released code; half a patch off at the border).
    """
    at = [
        torch.linspace(0, 1, n, dtype=box.dtype, device=box.device)
        if coords == "ends"
        else (torch.arange(n, dtype=box.dtype, device=box.device) + 0.5) / n
        for n in grid
    ]
    unit = torch.stack(torch.meshgrid(*at, indexing="ij"), -1).reshape(1, -1, 2)
    return box[:, None, :2] + unit * (box[:, None, 2:] - box[:, None, :2])


def project(
    points: Tensor, box: Tensor, grid: tuple[int, int], coords: Coordinates = "centres"
) -> tuple[Tensor, Tensor]:
    """Bilinear weights that read a view's token grid at image points, and which points the view contains.

    points (B, M, 2), box (B, 4) of the view that is read -> weights (B, M, N), zero for points outside; inside (B, M).
    """
    unit = (points - box[:, None, :2]) / (box[:, None, 2:] - box[:, None, :2])
    inside = ((unit > 0) & (unit < 1)).all(-1)  # strict, as released: a point on the border belongs to no crop
    tents = []
    for axis, n in enumerate(grid):
        at = unit[..., axis] * (n - 1) if coords == "ends" else unit[..., axis] * n - 0.5
        at = at.clamp(0, n - 1)[..., None]
        tents.append((1 - (at - torch.arange(n, device=at.device, dtype=at.dtype)).abs()).clamp(min=0))
    weights = (tents[0][..., :, None] * tents[1][..., None, :]).flatten(2)
    return weights * inside[..., None], inside


def between(source: View, grid_s: tuple[int, int], target: View, grid_t: tuple[int, int], coords: Coordinates):
    """The source view's sampled patches, seen in the target view: `project` of their positions.

    -> weights (B, M, N_t), inside (B, M)
    """
    assert source.samples is not None
    box_s, box_t = source.box, target.box
    if coords == "ends":
        box_s, box_t = ends_box(box_s, source.pixel), ends_box(box_t, target.pixel)
    points = token_positions(box_s, grid_s, coords)
    points = points.gather(1, source.samples[..., None].expand(-1, -1, 2))
    return project(points, box_t, grid_t, coords)
