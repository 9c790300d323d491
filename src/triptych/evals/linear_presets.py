"""How each paper trains its linear probe: everything that decides the number, by name."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from triptych.encoders import Encoder
from triptych.errors import UserError
from triptych.evals.presets import named
from triptych.evals.selection import Token
from triptych.schedules import Progress, Schedule, cosine, warmup_cosine

Norm = Literal["none", "batch", "unit"]


@dataclass(frozen=True)
class Augmentation:
    """Of train images, then flipped with probability 1/2 and normalised."""

    interpolation: Literal["bilinear", "bicubic"]
    scale: tuple[float, float] = (0.08, 1.0)  # share of the image's area
    clipped: bool = False  # a crop that leaves the image is cut to it (MAE), not drawn again up to ten times
    colour: str = "none"  # policy of data/colour.py
    erase: float = 0.0  # probability that a box is replaced by noise

    @property
    def about(self) -> str:
        crop = f"{'clipped' if self.clipped else 'random resized'} crop {self.scale[0]:g}-{self.scale[1]:g}"
        more = [self.colour] * (self.colour != "none") + [f"erasing {self.erase:g}"] * (self.erase > 0)
        return ", ".join([f"{crop} {self.interpolation}", "flip", *more])


@dataclass(frozen=True)
class LinearPreset:
    """One paper's linear evaluation; a variant is `dataclasses.replace` of one.  Raises UserError for bad values."""

    name: str
    source: str
    # "dino": class tokens of the last 4 blocks of ViTs narrower than 768, class ⊕ mean patch of others, mean patches of
    # the last 4 blocks of encoders without class token.  Else a token of the last block, by its name.
    feature: str
    augmentation: Augmentation
    lrs: tuple[float, ...]  # trained side by side, each for a batch of 256 ...
    scaled: bool = True  # ... and scaled by batch / 256; False: as they are
    batch: int = 256  # images
    epochs: int = 100
    # Before the classifier.  "batch": BatchNorm without affine, ε = 1e-6.  "unit": LayerNorm without affine, then
    # unit length.
    norm: Norm = "none"
    optimiser: Literal["sgd", "lars"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    trust: float = 0.001  # LARS: η
    warmup: int | None = None  # epochs, by the step as the half cosine after it; None = cosine by the epoch
    reported: Literal["last", "max"] = "max"  # epoch that the paper's script reports, on the test images

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch) < 1:
            raise UserError(f"epochs is {self.epochs} and batch is {self.batch}; both must be >= 1")
        if not self.lrs or not all(0 < lr < math.inf for lr in self.lrs):
            raise UserError(f"learning rates are {list(self.lrs)}; give at least one, each > 0 and finite")
        if self.warmup is not None and self.warmup >= self.epochs:
            raise UserError(f"{self.epochs} epochs leave nothing after {self.warmup} of warm-up: give more epochs")
        if self.norm not in ("none", "batch", "unit"):
            raise UserError(f"norm is {self.norm!r}; it must be one of none, batch, unit")
        object.__setattr__(self, "lrs", tuple(sorted(set(self.lrs))))

    def features(self, encoder: Encoder) -> tuple[Token, int]:
        """Which token, and of how many last blocks, for `extract` and the others of evals/features.py."""
        if self.feature != "dino":
            return self.feature, 1
        if encoder.spec.cls and encoder.width >= 768:
            return "cls+patch_mean", 1
        return "cls", min(4, encoder.depth)

    @property
    def schedule(self) -> Schedule:
        """What the rates are multiplied with at a step, 0 to 1."""
        if self.warmup is not None:
            return warmup_cosine(1.0, 0.0, self.warmup, kind="mocov3")
        by_epoch = cosine(1.0, 0.0)
        return lambda t: by_epoch(Progress(t.epoch, self.epochs))

    def scale(self, batch: int) -> float:
        """What the rates are multiplied with at batches of so many images."""
        return batch / 256 if self.scaled else 1.0


_BILINEAR = Augmentation("bilinear")
_HALF_DECADES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)

PRESETS: Mapping[str, LinearPreset] = {
    preset.name: preset
    for preset in (
        LinearPreset(
            name="sweep",
            source="ours: DINO's, over the range of iBOT's 45 rates, which holds DINO's 1e-3 and UDI's 0.02",
            feature="cls",
            augmentation=_BILINEAR,
            lrs=_HALF_DECADES,
            reported="last",
        ),
        LinearPreset(
            name="dino",
            source="Caron et al. 2021; eval_linear.py",
            feature="dino",
            augmentation=_BILINEAR,
            lrs=(1e-3,),
            batch=1024,
        ),
        LinearPreset(
            name="ibot",
            source="Zhou et al. 2022; evaluation/eval_linear_multi.py",
            feature="dino",
            augmentation=_BILINEAR,
            lrs=tuple(n / 10**power for power in range(4, -1, -1) for n in range(1, 10)),
            batch=1024,
        ),
        LinearPreset(
            name="mae",
            source="He et al. 2022; main_linprobe.py",
            feature="cls",
            augmentation=Augmentation("bicubic", clipped=True),
            lrs=(0.1,),
            batch=16384,
            epochs=90,
            norm="batch",
            optimiser="lars",
            warmup=10,
            reported="last",
        ),
        LinearPreset(
            name="msn",
            source="Assran et al. 2022; linear_eval.py",
            feature="cls_raw",
            augmentation=_BILINEAR,
            lrs=(6.4,),
            scaled=False,
            batch=1024,
            norm="unit",
        ),
        LinearPreset(
            name="udi",
            source="Su & Ji 2024; eval_linear.py",
            feature="dino",
            augmentation=Augmentation("bicubic", colour="randaug", erase=0.25),
            lrs=(0.02,),
            batch=1024,
        ),
    )
}


def preset_of(given: str | LinearPreset) -> LinearPreset:
    """The preset itself, or that of the name; raises UserError for a name that is none."""
    return named(given, PRESETS, "linear")
