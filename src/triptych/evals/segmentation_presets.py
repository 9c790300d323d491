"""How networks of semantic segmentation are trained and tested: the papers' settings, and short ones for a laptop."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from triptych.dense.fit import Fit
from triptych.dense.inference import Inference
from triptych.dense.segment_data import TestTransform, TrainTransform
from triptych.encoders.load import Loaded
from triptych.errors import UserError
from triptych.evals.presets import named

Head = Literal["linear", "upernet", "fpn"]
SMALL_PATCHES = 12  # on a side of a small preset's crop, at least


@dataclass(frozen=True)
class SegmentationPreset:
    """Everything but the encoder and the images.  0 in crop, short, long, stride: see `sized`."""

    name: str
    head: Head
    of_twelve: tuple[int, ...]  # blocks of an encoder of 12, counted from 1; of another depth those as deep
    lr: float  # peak
    steps: int
    warmup: int  # steps
    batch: int = 16  # images per step, over all processes
    weight_decay: float = 0.05
    layer_decay: float = 1.0  # γ of the encoder's rates
    drop_path: float = 0.0  # stochastic depth of the last block
    blocks: tuple[int, ...] | None = None  # of this encoder, instead of those as deep
    prefix: bool = True  # class tokens and registers stay in the encoder; False: it is fed patches alone (UDI)
    norm: bool = True  # the encoder's final norm on the tokens of all blocks
    batch_norm: bool = True  # before the linear layer
    crop: int = 512  # pixels: of training, and of windows
    short: int = 512  # limits of the sides of a resized image: the shorter ...
    long: int = 2048  # ... and the longer
    ratio: tuple[float, float] = (0.5, 2.0)  # of both limits, in training
    mode: Literal["slide", "whole"] = "slide"  # of testing: windows, or the whole image at once
    stride: int = 341  # pixels from window to window
    scales: tuple[float, ...] = (1.0,)  # of both limits, in testing: several are averaged
    flip: bool = False  # average with the mirrored image
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    save_every: int = 1000  # steps

    def train_transform(self, model: Loaded) -> TrainTransform:
        own = self.sized(model)
        return TrainTransform(own.crop, own.long, own.short, self.ratio, model.mean, model.std)

    def inference(self, model: Loaded) -> Inference:
        own = self.sized(model)
        transform = TestTransform(own.long, own.short, model.mean, model.std)
        windows = (own.crop, own.stride) if self.mode == "slide" else None
        return Inference(transform, windows, self.scales, self.flip)

    def fit(self) -> Fit:
        rate = poly(self.steps, self.warmup)
        options = {"layer_decay": self.layer_decay, "precision": self.precision, "save_every": self.save_every}
        return Fit(self.steps, self.lr, rate, self.weight_decay, **options)

    def sized(self, model: Loaded) -> "SegmentationPreset":
        """With numbers for 0.  crop: what the encoder was trained on, but at least 12 patches, in whole patches;
        short: the crop; long: 4 x short; stride: 2/3 of the crop.

        Raises UserError for a crop that is not in whole patches, and for numbers that make no sense.
        """
        patch = model.encoder.patch_size
        crop = self.crop or round(max(model.size, SMALL_PATCHES * patch) / patch) * patch
        if crop % patch:
            near = max(1, round(crop / patch)) * patch
            raise UserError(f"--crop {crop}: patches have {patch} px, give a multiple, such as {near}")
        short = self.short or crop
        own = replace(
            self, crop=crop, short=short, long=self.long or 4 * short, stride=self.stride or max(1, 2 * crop // 3)
        )
        _check(own)
        return own


def poly(steps: int, warmup: int, power: float = 1.0, start: float = 1e-6) -> Callable[[int], float]:
    """Step i -> factor of the rate: (1 - i / steps)^power, for i < warmup times 1 - (1 - i / warmup)(1 - start).

    mmcv 1.x's poly schedule with linear warm-up.
    """

    def factor(i: int) -> float:
        warm = 1 - (1 - i / warmup) * (1 - start) if i < warmup else 1.0
        return (1 - i / steps) ** power * warm

    return factor


def preset_of(given: str | SegmentationPreset) -> SegmentationPreset:
    """The preset itself, or that of the name; raises UserError for a name that is none."""
    return named(given, PRESETS, "segmentation")


def _check(p: SegmentationPreset) -> None:
    """Raises UserError for what no training or test can use."""
    for name in ("lr", "steps", "batch", "crop", "short", "long", "stride"):
        if getattr(p, name) <= 0:
            raise UserError(f"--{name} {getattr(p, name)}: give a number above 0")
    if p.stride > p.crop:
        raise UserError(f"--stride {p.stride}: above the crop of {p.crop} px, windows would leave out pixels")
    if not 0 < p.ratio[0] <= p.ratio[1]:
        raise UserError(f"--ratio {p.ratio[0]} {p.ratio[1]}: give 0 < smallest <= largest")
    if p.warmup < 0 or p.warmup >= p.steps:
        raise UserError(f"--warmup {p.warmup}: give fewer steps than the {p.steps} of the training, 0 for none")
    if not p.scales or min(p.scales) <= 0:
        raise UserError(f"--scales {' '.join(map(str, p.scales))}: give numbers above 0")
    if not 0 < p.layer_decay <= 1 or not 0 <= p.drop_path < 1 or p.weight_decay < 0:
        raise UserError("layer_decay is in (0, 1], drop_path in [0, 1), weight_decay 0 or more")


MMC = SegmentationPreset("mmc", "linear", (6, 8, 10, 12), lr=1e-4, steps=40_000, warmup=1_500)
"""MMC, supplement: blocks 6, 8, 10, 12, one linear layer, 512 px crops, AdamW 1e-4, 40 000 steps, batch 16.

BatchNorm is VICRegL's (same rate); the paper does not say.  Reported for ViT-B after ImageNet-1K: mIoU 37.0 (ADE20K),
62.6 (Cityscapes), 77.7 (VOC aug).  Not run here.
"""

IBOT = SegmentationPreset(
    "ibot", "linear", (4, 6, 8, 12), lr=8e-4, steps=160_000, warmup=1_500, batch_norm=False, save_every=5000
)
"""iBOT's linear head: blocks 4, 6, 8, 12, no BatchNorm, rate 8e-4, 160 000 steps.

Reported for ViT-B on ADE20K: 38.3.  Not run here.
"""

UPERNET_MTE = SegmentationPreset(
    "upernet_mte",
    "upernet",
    (4, 6, 8, 12),
    lr=8e-5,
    steps=160_000,
    warmup=1_500,
    layer_decay=0.9,
    drop_path=0.1,
    save_every=5000,
)
"""MTE: UPerNet on ADE20K, 160 000 steps, batch 16, rate 8e-5, layer decay .9, auxiliary head on block 8.

Reported for ViT-B: iBOT at 100 epochs 47.9, with MTE 49.1.  Not run here.
"""

UPERNET_IBOT = replace(UPERNET_MTE, name="upernet_ibot", layer_decay=0.65)
"""iBOT's UPerNet for ViT-B: layer decay .65, rate 8e-5 (its README; its config has 7e-4).  Not run here."""

FPN_UDI = SegmentationPreset(
    "fpn_udi",
    "fpn",
    (3, 6, 9, 12),
    lr=6e-5,
    steps=40_000,
    warmup=1_500,
    weight_decay=0.01,
    drop_path=0.1,
    norm=False,
    prefix=False,
    mode="whole",
)
"""UDI: Semantic FPN on ADE20K, 40 000 steps, 4 images per GPU (here: 4 GPUs), rate 6e-5, weight decay .01.

Not run here.
"""

_SMALL: dict[str, Any] = {"warmup": 30, "crop": 0, "short": 0, "long": 0, "stride": 0, "save_every": 100}

LINEAR_SMALL = replace(MMC, name="linear_small", lr=1e-2, steps=300, batch=8, **_SMALL)
"""Ours: `mmc` at the encoder's own size, 300 steps at a rate for so few: minutes on a laptop."""

UPERNET_SMALL = replace(UPERNET_MTE, name="upernet_small", lr=5e-4, steps=300, batch=8, layer_decay=0.75, **_SMALL)
"""Ours: `upernet_mte` at the encoder's own size, 300 steps."""

FPN_SMALL = replace(FPN_UDI, name="fpn_small", lr=5e-4, steps=300, batch=8, layer_decay=0.75, **_SMALL)
"""Ours: `fpn_udi` at the encoder's own size, 300 steps."""

PRESETS = {p.name: p for p in (LINEAR_SMALL, UPERNET_SMALL, FPN_SMALL, MMC, IBOT, UPERNET_MTE, UPERNET_IBOT, FPN_UDI)}
