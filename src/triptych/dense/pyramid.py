"""Maps of four sizes from an encoder, for heads that want a pyramid (iBOT's and UDI's detectors and UPerNets).

    ViT, patches of 16 px:  x_b1 -> deconv, BatchNorm, GELU, deconv      stride  4
                            x_b2 -> deconv                                       8
                            x_b3                                                16
                            x_b4 -> 2 x 2 max-pool                              32
    Swin:                   LayerNorm_s( last block of stage s ), s = 1 ... 4   4, 8, 16, 32

x_b: patch tokens after block b on their grid.  deconv: 2 x 2, stride 2, as wide as the encoder.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from triptych.dense.layers import BatchNorm2d
from triptych.dense.maps import feature_maps, scaled_blocks
from triptych.encoders import Encoder
from triptych.encoders.swin import Swin
from triptych.errors import UserError

FINE, COARSE = 4, 2  # a ViT's first level: patch / 4, or patch / 2 for patches of at most SMALL px
SMALL = 8


class Pyramid(nn.Module):
    """(B, 3, H, W) -> list of 4 maps (B, channels[i], H / strides[i], W / strides[i]), rounded down.

    H and W are multiples of the patch size (for sizes that do not round: of strides[-1]).
    channels: of each map.  strides: pixels per cell, patch / 4, / 2, patch, 2 x patch; for patches of 8 px and less one
    finer step is left out (patch / 2, patch, 2 x, 4 x), as the authors have it: with 8 px they are 4, 8, 16, 32 too.

    blocks: four, counted from 1 as in papers; None: a third, half, two thirds and all of the depth (4, 6, 8, 12 of 12).
    norm: the encoder's final norm on all four (iBOT's out_with_norm); else tokens as they leave their block.
    A Swin has its own blocks, one norm each, new (as the Swin papers' detectors): it takes neither.
    Raises UserError for blocks that are not four of the encoder's, a Swin not of four stages, and images that are too
    small to have one cell in the last map.
    """

    def __init__(self, encoder: Encoder, blocks: Sequence[int] | None = None, *, norm: bool = True):
        super().__init__()
        self.encoder = encoder
        if isinstance(encoder, Swin):
            self.norm, self.blocks, self.channels, self.strides = False, *_of_swin(encoder, blocks)
            self.levels = nn.ModuleList(_MapNorm(c, eps=encoder.norm_eps) for c in self.channels)
        else:
            self.norm, self.blocks = norm, [b - 1 for b in four_blocks(encoder, blocks, (4, 6, 8, 12))]
            first = FINE if encoder.patch_size > SMALL else COARSE
            scales = [first / 2**i for i in range(4)]
            self.channels, self.strides = [encoder.width] * 4, [encoder.patch_size / s for s in scales]
            self.levels = nn.ModuleList(_scaled(encoder.width, s) for s in scales)

    def forward(self, images: Tensor) -> list[Tensor]:
        height, width = images.shape[-2:]
        if min(height, width) < self.strides[-1]:
            raise UserError(
                f"images of {height}x{width} px are too small for maps of stride {self.strides[-1]:g}: use sides of at "
                f"least {self.strides[-1]:g} px"
            )
        taps = feature_maps(self.encoder, images, self.blocks, norm=self.norm)
        return [level(tap) for level, tap in zip(self.levels, taps, strict=True)]


def four_blocks(encoder: Encoder, blocks: Sequence[int] | None, of_twelve: Sequence[int]) -> list[int]:
    """The blocks, counted from 1; None: those as deep in this encoder as `of_twelve` in one of 12 blocks, halves up.

    Raises UserError for blocks that are not four of the encoder's.
    """
    if blocks is None:
        return scaled_blocks(of_twelve, encoder.depth)
    if len(blocks) != 4:
        raise UserError(f"--blocks {' '.join(map(str, blocks))}: a pyramid has four levels, so name four blocks")
    encoder.check_blocks(blocks)
    return list(blocks)


def _of_swin(encoder: Swin, blocks: Sequence[int] | None) -> tuple[list[int], list[int], list[float]]:
    """The last block of each stage (0-based), their widths and strides."""
    if blocks is not None:
        raise UserError("--blocks: a Swin's pyramid is the last block of each stage, leave it out")
    depths = [len(stage.blocks) for stage in encoder.stages]
    if len(depths) != 4:
        raise UserError(f"a pyramid has four levels, this Swin has {len(depths)} stages: use one of four")
    return (
        [sum(depths[: s + 1]) - 1 for s in range(4)],
        [encoder.width // 2 ** (3 - s) for s in range(4)],
        [encoder.patch_size / 2 ** (3 - s) for s in range(4)],
    )


def _scaled(width: int, scale: float) -> nn.Module:
    """(B, D, h, w) -> (B, D, scale h, scale w)"""
    if scale == 4:
        return nn.Sequential(_doubled(width), BatchNorm2d(width), nn.GELU(), _doubled(width))
    if scale == 2:
        return _doubled(width)
    return nn.Identity() if scale == 1 else nn.MaxPool2d(round(1 / scale))


def _doubled(width: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(width, width, 2, stride=2)


class _MapNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, h, w)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
