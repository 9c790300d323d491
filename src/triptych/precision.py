"""Which precision is fast on a device."""

from typing import Literal

import torch

Precision = Literal["auto", "bf16", "fp32"]


def chosen_precision(asked: Precision, device: torch.device | str) -> torch.dtype:
    """Of forward passes; auto: `fast_precision`."""
    if asked == "auto":
        return fast_precision(device)
    return torch.bfloat16 if asked == "bf16" else torch.float32


def fast_precision(device: torch.device | str) -> torch.dtype:
    """bfloat16 where the hardware multiplies it fast, else float32."""
    if torch.device(device).type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32
