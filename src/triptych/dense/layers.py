"""What the heads of dense tasks are built from."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm  # the module of this name refuses to be wrapped by DDP on a CPU
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from triptych.distributed import all_mean, all_mean_grad, world_size
from triptych.losses import full_precision


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm of (B, C, H, W) whose batch is that of all processes, on any device.

    (torch's SyncBatchNorm trains on GPUs only.)  Processes may have images of different number and size.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        momentum = self.momentum or 0.0
        if input.is_cuda:
            state = self.weight, self.bias, self.running_mean, self.running_var, self.eps, momentum
            return cast(Tensor, SyncBatchNorm.apply(input, *state, dist.group.WORLD, world_size()))
        x, own = full_precision(input), input[:, :1].numel()
        count = all_mean(torch.tensor(float(own), dtype=x.dtype, device=x.device))  # values of a channel, per process
        mean = all_mean_grad(x.sum((0, 2, 3))) / count
        centred = x - mean[:, None, None]
        var = all_mean_grad(centred.square().sum((0, 2, 3))) / count
        n = count * world_size()
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean), momentum)
            self.running_var.lerp_((var * n / (n - 1)).to(self.running_var), momentum)
        scale = (var + self.eps).rsqrt() * self.weight
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)


def conv_norm_relu(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """Convolution without bias that keeps the size, BatchNorm, ReLU; initialised as mmcv's ConvModule is."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, BatchNorm2d(outputs), nn.ReLU(inplace=True))


def classifier(inputs: int, classes: int, dropout: float) -> nn.Sequential:
    """Dropout of whole channels, 1 x 1 convolution: weights N(0, 0.01), biases 0."""
    conv = nn.Conv2d(inputs, classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return nn.Sequential(nn.Dropout2d(dropout), conv)


def fpn(inputs: Sequence[int], channels: int, extra: ExtraFPNBlock | None = None) -> FeaturePyramidNetwork:
    """torchvision's, initialised as mmseg's and mmdet's (Xavier-uniform)."""
    module = FeaturePyramidNetwork(list(inputs), channels, extra)
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.xavier_uniform_(conv.weight)
    return module


def resized(maps: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """(B, C, h, w) -> (B, C, *size), bilinear."""
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)
