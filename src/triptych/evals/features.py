"""Features of a frozen encoder: extracted once, cached, shared by all frozen protocols."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from triptych import __version__
from triptych.cache import cache_folder
from triptych.data.crops import Crop
from triptych.data.images import UnreadableImage
from triptych.data.loader import default_workers, in_worker
from triptych.data.pixels import Picture, Pixels, cut, shrink_for
from triptych.data.sources import Source
from triptych.encoders import Encoder
from triptych.encoders.base import Crops
from triptych.errors import UserError
from triptych.evals.frozen import fast_batch, fast_precision, frozen

T = TypeVar("T")
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

    def pixels(self, image: Image.Image) -> Tensor:
        """PIL RGB image -> (3, size, size) uint8."""
        return self.middle(Pixels(np.array(image)), *image.size[::-1])

    def read(self, source: Source, index: int) -> Tensor:
        """(3, size, size) uint8 of one image, decoded no larger than need be.  Raises UnreadableImage."""
        picture = Picture(source, index)
        whole = Crop(0, 0, picture.height, picture.width)
        return self.middle(picture.pixels(shrink_for([(whole, self.resize)])), picture.height, picture.width)

    def middle(self, pixels: Pixels, height: int, width: int) -> Tensor:
        """(3, size, size) uint8 of an image of this size."""
        short = min(height, width)
        rows, columns = (self.resize if side == short else self.resize * side // short for side in (height, width))
        resized = cut(pixels, Crop(0, 0, height, width), (rows, columns), "bicubic")
        top, left = (round((side - self.size) / 2) for side in (rows, columns))
        return torch.from_numpy(resized[top : top + self.size, left : left + self.size]).permute(2, 0, 1)


class _Images(Dataset):
    def __init__(self, source: Source, transform: EvalTransform):
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None]:
        try:
            return index, self.transform.read(self.source, index)
        except UnreadableImage:
            return index, None


def _collate(items: list[tuple[int, Tensor | None]]) -> tuple[list[int], Tensor | None]:
    """Images stay channels last in memory, as they were decoded."""
    read = [(i, x.permute(1, 2, 0)) for i, x in items if x is not None]
    return [i for i, _ in read], torch.stack([x for _, x in read]).permute(0, 3, 1, 2) if read else None


def select(encoder: Encoder, images: Tensor, token: Token, layers: int = 1) -> Tensor:
    """`select_all` of one token: (B, 3, H, W) -> (B, features)."""
    return select_all(encoder, images, [token], layers)[token]


def select_all(encoder: Encoder, images: Tensor, tokens: Sequence[Token], layers: int = 1) -> dict[Token, Tensor]:
    """(B, 3, H, W) -> (B, features) of each: class tokens of the last `layers` blocks, then the last one's mean patch.

    Each through the final norm; "cls" and "cls_plus" leave out the mean patch, "patch_mean" the class tokens, as in
    DINO's and iBOT's scripts.  One pass for all.  Raises UserError for a token that the encoder does not have.
    """
    for token in tokens:
        check_token(encoder, token)
    if not 1 <= layers <= encoder.depth:
        raise UserError(f"layers {layers}: this encoder has {encoder.depth} blocks")
    crops = Crops(images, patches=any(token.endswith("patch_mean") for token in tokens))
    (taps,) = encoder.run([crops], range(-layers, 0))

    def features(token: Token) -> Tensor:
        parts = []
        if token != "patch_mean":
            parts += [t.cls_plus if token == "cls_plus" else t.global_token for t in taps]
        if token.endswith("patch_mean"):
            parts.append(taps[-1].patch.mean(1))
        return torch.cat(parts, -1)

    return {token: features(token) for token in tokens}


def check_token(encoder: Encoder, token: str) -> None:
    if token not in TOKENS:
        raise UserError(f"token {token!r}: choose one of {', '.join(TOKENS)}")
    if token == "cls_plus" and not encoder.spec.cls_plus:
        raise UserError("this encoder has no class+ token (only UDI's have): choose cls, patch_mean or cls+patch_mean")


def batches(
    source: Source, transform: EvalTransform, *, batch: int | None, device: torch.device, workers: int | None = None
) -> Iterator[tuple[list[int], Tensor]]:
    """Indices into the source and normalised images (B, 3, size, size) on the device, in order.

    batch: None = what is fast there.  Images that cannot be read are left out; UserError where that leaves none.
    """
    batch = batch or fast_batch(device)
    loader = DataLoader(
        _Images(source, transform),
        batch_size=batch,
        collate_fn=_collate,
        num_workers=min(default_workers() if workers is None else workers, -(-len(source) // batch)),
        worker_init_fn=in_worker,
        pin_memory=device.type == "cuda",
    )
    mean, std = (torch.tensor(x, device=device)[:, None, None] for x in (transform.mean, transform.std))
    scale, shift, read = 1 / (255 * std), mean / std, 0
    for index, pixels in loader:
        if pixels is not None:
            read += len(index)
            yield index, (pixels.to(device, non_blocking=True) * scale).sub_(shift)
    if not read:
        raise UserError(f"no image of {source.name} can be read")


def extract(
    encoder: Encoder, source: Source, transform: EvalTransform, *, token: Token = "cls", **options: Any
) -> tuple[Tensor, Tensor]:
    """`extract_all` of one token: features (N, D) and indices (N,)."""
    features, indices = extract_all(encoder, source, transform, [token], **options)
    return features[token], indices


def extract_all(
    encoder: Encoder,
    source: Source,
    transform: EvalTransform,
    tokens: Sequence[Token],
    *,
    layers: int = 1,
    batch: int | None = None,
    device: torch.device | str = "cpu",
    precision: torch.dtype | None = None,
    workers: int | None = None,
) -> tuple[dict[Token, Tensor], Tensor]:
    """-> features (N, D) float32 of each token, and indices (N,) int64 into the source, both on the CPU.

    One pass over the images, of which those that cannot be read are left out.  batch, precision: None = what is fast on
    the device (`fast_batch`, `fast_precision`).  The encoder is left as it was.
    """
    device = torch.device(device)
    indices: list[int] = []
    found: dict[Token, Tensor] = {}
    with frozen(encoder, device, precision or fast_precision(device)):
        for index, part in _one_behind(
            (index, select_all(encoder, images, tokens, layers))
            for index, images in batches(source, transform, batch=batch, device=device, workers=workers)
        ):
            for token, x in part.items():
                if token not in found:
                    found[token] = torch.empty(len(source), x.shape[1])
                found[token][len(indices) : len(indices) + len(x)] = x
            indices += index
    return {token: x[: len(indices)] for token, x in found.items()}, torch.tensor(indices)


def _one_behind(items: Iterable[T]) -> Iterator[T]:
    """The same items, each after the next one was made: a GPU then works on that while the host waits for this one."""
    before: list[T] = []
    for item in items:
        yield from before
        before = [item]
    yield from before


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


def cached(
    encoder: Encoder, source: Source, transform: EvalTransform, *, token: Token = "cls", **options: Any
) -> tuple[Tensor, Tensor]:
    """`cached_all` of one token: features (N, D) and indices (N,)."""
    features, indices = cached_all(encoder, source, transform, [token], **options)
    return features[token], indices


def cached_all(
    encoder: Encoder,
    source: Source,
    transform: EvalTransform,
    tokens: Sequence[Token],
    *,
    folder: Path | None = None,
    layers: int = 1,
    device: torch.device | str = "cpu",
    precision: torch.dtype | None = None,
    **options: Any,
) -> tuple[dict[Token, Tensor], Tensor]:
    """`extract_all`, read from the cache where the same encoder, images and options were extracted before.

    The key holds a hash of the weights and the fingerprint of the images (paths, labels, sizes): an image replaced by
    another of the same size is not noticed.
    """
    precision = precision or fast_precision(device)
    about = [__version__, weights_hash(encoder), encoder.heads, vars(encoder.spec), encoder.positions]
    about += [source.fingerprint(), vars(transform)]
    folder = folder or cache_folder("features")
    keys = {token: repr([*about, token, layers, str(precision)]) for token in tokens}
    paths = {t: folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors" for t, key in keys.items()}
    stored = {token: load_file(path) for token, path in paths.items() if path.exists()}
    missing: list[Token] = [token for token in tokens if token not in stored]
    if missing:
        options |= {"layers": layers, "device": device, "precision": precision}
        features, indices = extract_all(encoder, source, transform, missing, **options)
        folder.mkdir(parents=True, exist_ok=True)
        for token in missing:
            stored[token] = {"features": features[token].contiguous(), "indices": indices}
            part = paths[token].with_suffix(f".{os.getpid()}.part")
            save_file(stored[token], part)
            part.replace(paths[token])
    return {token: stored[token]["features"] for token in tokens}, stored[tokens[0]]["indices"]
