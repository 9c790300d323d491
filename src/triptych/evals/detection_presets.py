"""How each paper trains its detector: everything that decides the number, by name."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from triptych.dense.cascade import CASCADE, HeadsConfig
from triptych.dense.detect_data import Sizes
from triptych.dense.mask_rcnn import DetectorConfig
from triptych.errors import UserError
from triptych.evals.presets import named

EPOCHS = 12


@dataclass(frozen=True)
class DetectionPreset:
    """One paper's detector; `presets.with_changes` makes a variant.  Raises UserError for bad values.

    rate: lr, times 1 - (1 - i / warmup)(1 - warmup_start) in warm-up (step i), times 0.1 after each drop.
    """

    name: str
    source: str
    lr: float  # peak, at this batch
    batch: int  # images of a step, over all processes
    drop_path: float  # of the last block, linear from 0
    layer_decay: float = 1.0  # γ; 1 = every layer at the same rate
    prefix: bool = True  # class tokens, class+ and registers stay in the encoder; False: it is fed patches alone
    epochs: int = EPOCHS  # over the training images; "1x"
    steps: int | None = None  # instead of epochs, whatever the number of images
    drops: tuple[float, ...] = (8 / 12, 11 / 12)  # shares of the training after which the rate is a tenth
    warmup: int = 500  # steps
    warmup_start: float = 0.001  # share of the rate
    weight_decay: float = 0.05  # not on biases, norms, tokens and positions
    clip: float | None = None  # norm that all gradients together may have
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the hardware multiplies it fast
    save_every: int = 500  # steps
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    sizes: Sizes = field(default_factory=Sizes)

    def __post_init__(self) -> None:
        if min(self.batch, self.epochs, self.steps or 1) < 1 or not 0 < self.lr < float("inf"):
            raise UserError(
                f"batch {self.batch}, epochs {self.epochs}, steps {self.steps}, lr {self.lr}: give numbers >= 1 and a "
                "finite rate > 0"
            )
        if self.steps and self.epochs != EPOCHS:
            raise UserError(
                f"steps {self.steps} and epochs {self.epochs}: {self.name} counts in steps, leave epochs out"
            )
        if not 0 <= self.drop_path < 1 or not 0 < self.layer_decay <= 1:
            raise UserError(f"drop_path {self.drop_path} must be in [0, 1), layer_decay {self.layer_decay} in (0, 1]")

    def count(self, images: int) -> int:
        """Steps of a training on so many images.  Raises UserError where warm-up takes them all."""
        steps = self.steps or self.epochs * max(1, images // self.batch)
        if self.warmup >= steps:
            raise UserError(
                f"preset {self.name} makes {steps} steps on {images} images, and warms up for {self.warmup}: give more "
                "epochs, less warm-up, or a preset for small sets (mask_rcnn_small, cascade_small)"
            )
        return steps

    def rate(self, step: int, steps: int) -> float:
        """Factor of the peak at this step of so many."""
        factor = 0.1 ** sum(step >= round(share * steps) for share in self.drops)
        if step < self.warmup:
            factor *= 1 - (1 - step / self.warmup) * (1 - self.warmup_start)
        return factor


_CASCADE = DetectorConfig(
    HeadsConfig(CASCADE, box_head="4conv1fc", box_loss="giou"),
    proposal_loss="smooth_l1",
    train_proposals=(2000, 2000),
)
_SMALL_SIZES = Sizes(
    short=(144, 160, 176, 192), longest=320, before_crop=(120, 150, 180), crop=(115, 180), test_size=192
)
_SMALL = DetectorConfig(
    HeadsConfig(channels=64, hidden=256, rois=64), anchors=128, train_proposals=(500, 200), test_proposals=(500, 200)
)
_SMALL_CASCADE = replace(
    _SMALL,
    heads=replace(_SMALL.heads, stages=CASCADE, box_head="4conv1fc", box_loss="giou"),
    proposal_loss="smooth_l1",
)


def _cascade(name: str, source: str, *, base: bool) -> DetectionPreset:
    return DetectionPreset(
        name=name,
        source=source,
        lr=1e-4,
        batch=16 if base else 32,
        drop_path=0.2 if base else 0.1,
        layer_decay=0.75 if base else 0.8,
        detector=_CASCADE,
    )


PRESETS: Mapping[str, DetectionPreset] = {
    preset.name: preset
    for preset in (
        DetectionPreset(
            name="mask_rcnn_udi",
            source="Su & Ji 2024; mask_rcnn_vit_small_12_p16_1x_coco.py",
            lr=5e-5,
            batch=8,
            drop_path=0.05,
            prefix=False,
            warmup=1000,
        ),
        _cascade("cascade_ibot_s", "Zhou et al. 2022; vit_small_giou_4conv1f_coco, 12 epochs", base=False),
        _cascade("cascade_ibot_b", "Zhou et al. 2022; vit_base_giou_4conv1f_coco, 12 epochs", base=True),
        _cascade("cascade_mte_s", "MTE paper: as iBOT, ViT-S", base=False),
        _cascade("cascade_mte_b", "MTE paper: as iBOT, ViT-B", base=True),
        DetectionPreset(
            name="mask_rcnn_small",
            source="ours: for a small ViT, a small set and a CPU",
            lr=1e-3,
            batch=4,
            drop_path=0.0,
            prefix=False,
            steps=500,
            warmup=30,
            clip=1.0,
            save_every=100,
            detector=_SMALL,
            sizes=_SMALL_SIZES,
        ),
        DetectionPreset(
            name="cascade_small",
            source="ours: for a small ViT, a small set and a CPU",
            lr=1e-3,
            batch=4,
            drop_path=0.0,
            steps=300,
            warmup=30,
            clip=1.0,
            save_every=100,
            detector=_SMALL_CASCADE,
            sizes=_SMALL_SIZES,
        ),
    )
}


def preset_of(given: str | DetectionPreset) -> DetectionPreset:
    """The preset itself, or that of the name; raises UserError for a name that is none."""
    return named(given, PRESETS, "detection")
