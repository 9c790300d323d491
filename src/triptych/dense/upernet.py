"""UPerNet on an encoder's pyramid (Xiao et al. 2018), as iBOT, MTE and the Swin papers fine-tune it for segmentation.

    p   = conv3( x_4, pool_1(x_4), pool_2(x_4), pool_3(x_4), pool_6(x_4) )      pyramid pooling of the coarsest map
    l_4 = p,   l_i = conv1_i( x_i ) + up( l_{i+1} ),  i = 3, 2, 1               top-down
    y   = W conv3( conv3_1(l_1), up conv3_2(l_2), up conv3_3(l_3), up l_4 )     logits on the finest map's grid

pool_s: mean over s x s cells, 1 x 1 convolution, up to the size of x_4.  Every conv has BatchNorm and ReLU, W not.
While training, an auxiliary head of one convolution classifies the pixels of x_3 too.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triptych.dense.layers import classifier, conv_norm_relu, resized
from triptych.dense.pyramid import Pyramid
from triptych.dense.segmenters import Segmenter, pixel_loss
from triptych.distributed import world_size
from triptych.encoders import Encoder
from triptych.errors import UserError


class UPerNet(Segmenter):
    """images (B, 3, H, W) -> logits (B, classes, H / s, W / s); s: finest stride of `Pyramid`, which has the limits.

    blocks, norm: as of `Pyramid`.  channels: of every convolution, None = the encoder's width.  aux_index: the map,
    from 0, that the auxiliary head reads; aux_weight 0 = no such head.  dropout: of whole channels before classifiers.
    """

    def __init__(
        self,
        encoder: Encoder,
        classes: int,
        blocks: Sequence[int] | None = None,
        *,
        norm: bool = True,
        channels: int | None = None,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
        aux_channels: int = 256,
        aux_index: int = 2,
        aux_weight: float = 0.4,
    ):
        super().__init__()
        self.pyramid = Pyramid(encoder, blocks, norm=norm)
        inputs = self.pyramid.channels
        self.head = UPerHead(inputs, classes, channels or encoder.width, pool_scales, dropout)
        self.aux_index, self.aux_weight = aux_index, aux_weight
        self.aux_head = None
        if aux_weight:
            conv = conv_norm_relu(inputs[aux_index], aux_channels, 3)
            self.aux_head = nn.Sequential(conv, classifier(aux_channels, classes, dropout))

    @property
    def encoder(self) -> Encoder:
        return self.pyramid.encoder

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.pyramid(images))

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """labels (B, H, W) -> "segmentation", and "aux" with its weight.  Raises UserError for one image in all."""
        if len(images) * world_size() == 1:  # pool_1 has one value per image for BatchNorm
            raise UserError("UPerNet's BatchNorm needs two images per step: raise --batch")
        maps = self.pyramid(images)
        losses = {"segmentation": pixel_loss(self.head(maps), labels)}
        if self.aux_head is not None:
            losses["aux"] = self.aux_weight * pixel_loss(self.aux_head(maps[self.aux_index]), labels)
        return losses


class UPerHead(nn.Module):
    """Maps from fine to coarse, (B, inputs[i], h_i, w_i) -> logits (B, classes, h_0, w_0)."""

    def __init__(self, inputs: Sequence[int], classes: int, channels: int, pool_scales: Sequence[int], dropout: float):
        super().__init__()
        *fine, coarsest = inputs
        self.pools = nn.ModuleList(conv_norm_relu(coarsest, channels, 1) for _ in pool_scales)
        self.pool_scales = list(pool_scales)
        self.pooled = conv_norm_relu(coarsest + len(pool_scales) * channels, channels, 3)
        self.laterals = nn.ModuleList(conv_norm_relu(c, channels, 1) for c in fine)
        self.smooth = nn.ModuleList(conv_norm_relu(channels, channels, 3) for _ in fine)
        self.fuse = conv_norm_relu(len(inputs) * channels, channels, 3)
        self.classify = classifier(channels, classes, dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        *fine, coarsest = maps
        down = [self._pool(coarsest)]  # from coarse to fine
        for x, lateral in zip(reversed(fine), reversed(self.laterals), strict=True):
            down.append(lateral(x) + resized(down[-1], x.shape[-2:]))
        levels = [smooth(x) for smooth, x in zip(self.smooth, reversed(down[1:]), strict=True)]
        size = maps[0].shape[-2:]
        return self.classify(self.fuse(torch.cat([resized(x, size) for x in (*levels, down[0])], 1)))

    def _pool(self, x: Tensor) -> Tensor:
        """Pyramid pooling: (B, inputs, h, w) -> (B, channels, h, w)."""
        pools = [
            resized(conv(F.adaptive_avg_pool2d(x, scale)), x.shape[-2:])
            for conv, scale in zip(self.pools, self.pool_scales, strict=True)
        ]
        return self.pooled(torch.cat([x, *pools], 1))
