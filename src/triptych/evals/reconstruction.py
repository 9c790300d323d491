"""What a pixel head makes of the patches after each block (MMC, arXiv 2308.11448, Fig. 9).

    R_l = g_rec( norm(patch tokens of the student after block l of the corrupted image) )

The blocks after l are left out; g_rec, the head, was trained to read the last block (or the mean of several).
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from triptych.data.corruption import CorruptionConfig, corrupt, draw_corruption
from triptych.data.images import UnreadableImage
from triptych.data.sources import Source
from triptych.data.views import View, Views
from triptych.errors import UserError
from triptych.evals.frozen import frozen
from triptych.evals.transform import EvalTransform
from triptych.losses import masked_error
from triptych.methods import Method
from triptych.methods.gmml import GMML
from triptych.methods.mcssl import MCSSL
from triptych.methods.mmc import MMC
from triptych.methods.sit import SiT


@dataclass(frozen=True)
class Reconstruction:
    """Normalised images, as the method's loss sees them.  L blocks; errors: mean |R − x| over the replaced pixels."""

    blocks: tuple[int, ...]  # l, counted from 1, ascending
    images: Tensor  # (L, B, 3, H, W): R_l
    errors: tuple[float, ...]  # of each block, over the whole batch
    read: tuple[int, ...]  # the blocks whose mean the head was trained to read
    trained: Tensor  # (B, 3, H, W): the head's output for those, as in training
    trained_error: float

    @property
    def differences(self) -> Tensor:
        """(L − 1, B, H, W): |R_l − R_l'| of blocks next to each other in `blocks`, mean over the channels."""
        return self.images.diff(dim=0).abs().mean(2)


def with_pixel_head(method: Method) -> MMC | SiT | GMML | MCSSL:
    """The method, or what MTE wraps.  Raises UserError for one that has no pixel head, or never trained it."""
    base: Any = getattr(method, "base", method)
    if not isinstance(base, MMC | SiT | GMML | MCSSL):
        raise UserError(
            f"this run ({base.config.name}) has no pixel head: mmc, sit, gmml and mcssl have one, alone or inside mte "
            "(mae's decoder reads the kept patches of its last block only)"
        )
    if not any(p.requires_grad for p in base.pixels.parameters()):
        raise UserError(f"this run ({base.config.name}) never trained its pixel head: its loss has weight 0")
    return base


@torch.no_grad()
def reconstruct(method: Method, view: View, blocks: Sequence[int] = (), *, norm: bool = True) -> Reconstruction:
    """view: normalised images with `corrupted` and `pixel_mask`.  blocks: counted from 1; () = the upper half.

    norm: the patches pass the final norm before the head, which the paper leaves open.  Raises UserError for a method
    without a trained pixel head, for blocks that the encoder lacks, and for those of a Swin's earlier stages.
    """
    base = with_pixel_head(method)
    assert view.corrupted is not None
    assert view.pixel_mask is not None
    encoder = base.encoder if isinstance(base, GMML) else base.student.encoder
    depth = encoder.depth
    wanted = sorted(set(blocks)) or list(range(depth // 2 + 1, depth + 1))
    encoder.check_blocks(wanted)
    read = base.config.blocks if isinstance(base, GMML) else getattr(base.config, "pixel_blocks", ())
    read = tuple(read) or (depth,)
    with frozen(encoder, view.images.device):
        taps = encoder.layers(view.corrupted, [b - 1 for b in wanted])
        last = encoder.mixed(view.corrupted, read)
    assert last.grid is not None
    assert last.mixed is not None
    images = [base.pixels(x.patch if norm else x.patch_raw, last.grid) for x in taps]
    trained = base.pixels(last.mixed, last.grid)
    *errors, error = [masked_error(x, view.images, view.pixel_mask).item() for x in (*images, trained)]
    return Reconstruction(tuple(wanted), torch.stack(images), tuple(errors), read, trained, error)


def corrupted_view(
    source: Source,
    config: CorruptionConfig,
    transform: EvalTransform,
    *,
    images: int = 4,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> View:
    """So many images of the source, drawn by the seed, as a normalised view (centre crops) with their corruption.

    Pixels from "another image" never come from the image itself, which in training they may (alone, it has no other).
    Images that cannot be read are passed over.  Raises UserError where none can be, and for less than one image.
    """
    if images < 1 or seed < 0:
        raise UserError(f"--images {images} --seed {seed}: give at least one image, and a seed of 0 or more")
    size, device = transform.size, torch.device(device)
    found = dict(itertools.islice(_readable(source, transform, seed), images))
    if not found:
        raise UserError(f"no image of {source.name} can be read")
    n, clean = len(found), torch.stack([*found.values()])
    drawn = [draw_corruption(config, size, size, np.random.default_rng([seed, index])) for index in found]
    drawn = [replace(c, donor=((i + 1 + int(c.donor * (n - 1))) % n + 0.5) / n) for i, c in enumerate(drawn)]
    corrupted, codes = corrupt(clean, drawn)
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(n, 4)  # nothing here asks where the crops lie
    view = View(clean.permute(0, 3, 1, 2), whole, torch.full((n, 2), 1 / size))
    view = replace(view, corrupted=corrupted.permute(0, 3, 1, 2), pixel_mask=codes)
    mean, std = (torch.tensor(x, device=device) for x in (transform.mean, transform.std))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)  # of the noise
        return Views([view], []).on_device(device, mean, std).global_crops[0]


def _readable(source: Source, transform: EvalTransform, seed: int) -> Iterator[tuple[int, Tensor]]:
    """Indices in an order drawn by the seed, and their pixels (S, S, 3) uint8."""
    for index in torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)).tolist():
        try:
            yield index, transform.read(source, index).permute(1, 2, 0)
        except UnreadableImage:
            continue
