"""Features of a frozen encoder: extracted once, cached, shared by all frozen protocols."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torchvision.transforms.v2.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import InterpolationMode

from triptych import __version__
from triptych.data.images import UnreadableImage
from triptych.data.loader import default_workers, in_worker
from triptych.data.sources import Source, load_rgb
from triptych.encoders import Encoder
from triptych.errors import UserError

Token = Literal["cls", "cls_plus", "patch_mean", "cls+patch_mean"]
TOKENS: tuple[Token, ...] = ("cls", "cls_plus", "patch_mean", "cls+patch_mean")


@dataclass(frozen=True)
class EvalTransform:
    """Shorter side to `resize` pixels (bicubic, anti-aliased), centre crop of `size`, then mean and std."""

    size: int
    resize: int
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @classmethod
    def of(cls, size: int, mean=mean, std=std) -> "EvalTransform":
        """The field's habit: 256 -> 224, and the same ratio for other sizes."""
        return cls(size, round(size * 256 / 224), tuple(mean), tuple(std))

    def pixels(self, image) -> Tensor:
        """PIL RGB image -> (3, size, size) uint8."""
        x = F.resize(F.pil_to_tensor(image), [self.resize], InterpolationMode.BICUBIC, antialias=True)
        return F.center_crop(x, [self.size, self.size])


class _Images(Dataset):
    def __init__(self, source: Source, transform: EvalTransform):
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None]:
        try:
            return index, self.transform.pixels(load_rgb(self.source, index))
        except UnreadableImage:
            return index, None


def _collate(items: list[tuple[int, Tensor | None]]) -> tuple[list[int], Tensor | None]:
    read = [(i, x) for i, x in items if x is not None]
    return [i for i, _ in read], torch.stack([x for _, x in read]) if read else None


def select(encoder: Encoder, images: Tensor, token: Token, layers: int = 1) -> Tensor:
    """(B, 3, H, W) -> (B, features): class tokens of the last `layers` blocks, then the last block's mean patch.

    Each through the final norm; "cls" and "cls_plus" leave out the mean patch, "patch_mean" the class tokens, as in
    DINO's and iBOT's scripts.  Raises UserError for a token that the encoder does not have.
    """
    check_token(encoder, token)
    if not 1 <= layers <= encoder.depth:
        raise UserError(f"layers {layers}: this encoder has {encoder.depth} blocks")
    taps = encoder.layers(images, range(-layers, 0))
    parts = []
    if token != "patch_mean":
        parts += [t.cls_plus if token == "cls_plus" else t.global_token for t in taps]
    if token.endswith("patch_mean"):
        parts.append(taps[-1].patch.mean(1))
    return torch.cat(parts, -1)


def check_token(encoder: Encoder, token: str) -> None:
    if token not in TOKENS:
        raise UserError(f"token {token!r}: choose one of {', '.join(TOKENS)}")
    if token == "cls_plus" and not encoder.spec.cls_plus:
        raise UserError("this encoder has no class+ token (only UDI's have): choose cls, patch_mean or cls+patch_mean")


def batches(
    source: Source, transform: EvalTransform, *, batch: int, device: torch.device, workers: int | None = None
) -> Iterator[tuple[list[int], Tensor]]:
    """Indices into the source and normalised images (B, 3, size, size) on the device, in order.

    Images that cannot be read are left out; UserError where that leaves none.
    """
    loader = DataLoader(
        _Images(source, transform),
        batch_size=batch,
        collate_fn=_collate,
        num_workers=min(default_workers() if workers is None else workers, -(-len(source) // batch)),
        worker_init_fn=in_worker,
        pin_memory=device.type == "cuda",
    )
    mean, std = (torch.tensor(x, device=device)[:, None, None] for x in (transform.mean, transform.std))
    read = 0
    for index, pixels in loader:
        if pixels is not None:
            read += len(index)
            yield index, (pixels.to(device, non_blocking=True) / 255 - mean) / std
    if not read:
        raise UserError(f"no image of {source.name} can be read")


@torch.no_grad()
def extract(
    encoder: Encoder,
    source: Source,
    transform: EvalTransform,
    *,
    token: Token = "cls",
    layers: int = 1,
    batch: int = 256,
    device: torch.device | str = "cpu",
    precision: torch.dtype = torch.float32,
    workers: int | None = None,
) -> tuple[Tensor, Tensor]:
    """-> features (N, D) float32 and indices (N,) int64 into the source; images that cannot be read are left out."""
    device = torch.device(device)
    was_training = encoder.training
    encoder.to(device).eval()
    features, indices = [], []
    for index, images in batches(source, transform, batch=batch, device=device, workers=workers):
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            features.append(select(encoder, images, token, layers).float().cpu())
        indices += index
    encoder.train(was_training)
    return torch.cat(features), torch.tensor(indices)


def labels_of(source: Source, indices: Tensor) -> Tensor:
    """(N,) int64 labels of the extracted images."""
    labels = [source.label(i) for i in indices.tolist()]
    if any(label is None for label in labels):
        raise UserError(f"{source.name} has no labels: put the images of each class in a sub-folder of its own")
    return torch.tensor(labels)


def weights_hash(encoder: Encoder) -> str:
    """16 hex digits over names, shapes and values of the encoder's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    return Path(os.environ.get("TRIPTYCH_CACHE") or "~/.cache/triptych").expanduser() / "features"


def cached(encoder: Encoder, source: Source, transform: EvalTransform, *, folder: Path | None = None, **options):
    """`extract`, read from the cache where the same encoder, images and options were extracted before.

    The key holds a hash of the weights and the fingerprint of the images (paths, labels, sizes): an image replaced by
    another of the same size is not noticed.
    """
    about = [__version__, weights_hash(encoder), encoder.heads, vars(encoder.spec), encoder.positions]
    about += [source.fingerprint(), vars(transform)]
    about += [options.get("token", "cls"), options.get("layers", 1), str(options.get("precision", torch.float32))]
    path = (folder or cache_folder()) / f"{hashlib.sha256(repr(about).encode()).hexdigest()[:32]}.safetensors"
    if path.exists():
        stored = load_file(path)
        return stored["features"], stored["indices"]
    features, indices = extract(encoder, source, transform, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    save_file({"features": features.contiguous(), "indices": indices}, part)
    part.replace(path)
    return features, indices
