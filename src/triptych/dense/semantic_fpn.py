"""Semantic FPN (Kirillov et al. 2019), as UDI fine-tunes a ViT for segmentation.

    l_4 = conv1_4( x_4 ),   l_i = conv1_i( x_i ) + up( l_{i+1} ),   z_i = conv3_i( l_i )          the FPN: 256 channels
    y   = W sum_i (up ∘ conv3)^{i-1}( z_i ),   for i = 1 one conv3 without up                    the head: 128 channels

up: twice the size, nearest in the FPN and bilinear in the head, whose conv3 have BatchNorm and ReLU.
"""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from triptych.dense.layers import classifier, conv_norm_relu, fpn, resized
from triptych.dense.maps import feature_maps
from triptych.dense.pyramid import Pyramid, four_blocks
from triptych.dense.segmenters import Segmenter
from triptych.encoders import Encoder
from triptych.encoders.swin import Swin


class SemanticFPN(Segmenter):
    """images (B, 3, H, W) -> logits (B, classes, H / s, W / s); s: the patch size, or a pyramid's finest stride.

    H and W are multiples of the patch size.  pyramid: the maps of a ViT go through `Pyramid` first; UDI's do not, all
    four have the patches' grid.  A Swin always has its own pyramid.
    blocks: four, counted from 1; None: the quarters of the depth (3, 6, 9, 12 of 12).  norm: the encoder's final norm
    on all four.  dropout: of whole channels before the classifier.
    """

    def __init__(
        self,
        encoder: Encoder,
        classes: int,
        blocks: Sequence[int] | None = None,
        *,
        norm: bool = False,
        pyramid: bool = False,
        fpn_channels: int = 256,
        channels: int = 128,
        dropout: float = 0.1,
    ):
        super().__init__()
        if isinstance(encoder, Swin):
            self.maps = Pyramid(encoder, blocks)
        else:
            chosen = four_blocks(encoder, blocks, (3, 6, 9, 12))
            self.maps = (Pyramid if pyramid else FlatMaps)(encoder, chosen, norm=norm)
        self.fpn = fpn(self.maps.channels, fpn_channels)
        self.scales = nn.ModuleList(_scale_head(fpn_channels, channels, i) for i in range(4))
        self.classify = classifier(channels, classes, dropout)

    @property
    def encoder(self) -> Encoder:
        return self.maps.encoder

    def forward(self, images: Tensor) -> Tensor:
        maps = self.maps(images)
        levels = self.fpn(OrderedDict((str(i), x) for i, x in enumerate(maps))).values()
        size = maps[0].shape[-2:]
        # The sizes differ where all maps have one size, and where a grid was odd.
        first, *others = (resized(scale(z), size) for scale, z in zip(self.scales, levels, strict=True))
        return self.classify(sum(others, first))


class FlatMaps(nn.Module):
    """(B, 3, H, W) -> the patch tokens after each of these blocks (from 1), (B, D, rows, columns)."""

    def __init__(self, encoder: Encoder, blocks: Sequence[int], *, norm: bool):
        super().__init__()
        self.encoder, self.norm = encoder, norm
        self.blocks = [b - 1 for b in blocks]
        self.channels = [encoder.width] * 4

    def forward(self, images: Tensor) -> list[Tensor]:
        return feature_maps(self.encoder, images, self.blocks, norm=self.norm)


def _scale_head(inputs: int, channels: int, level: int) -> nn.Sequential:
    """(B, inputs, h, w) -> (B, channels, 2^level h, 2^level w)"""
    if level == 0:
        return conv_norm_relu(inputs, channels, 3)
    parts: list[nn.Module] = []
    for k in range(level):
        parts += [conv_norm_relu(channels if k else inputs, channels, 3), nn.Upsample(scale_factor=2, mode="bilinear")]
    return nn.Sequential(*parts)
