"""Features of a frozen encoder: extracted once, cached, shared by all frozen protocols."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from triptych import __version__
from triptych.cache import cache_folder
from triptych.data.images import UnreadableImage
from triptych.data.sources import Source
from triptych.data.subsets import digest
from triptych.encoders import Encoder
from triptych.errors import UserError
from triptych.evals.frozen import fast_batch, frozen
from triptych.evals.selection import Token, select_all
from triptych.evals.spill import on_disk
from triptych.evals.transform import EvalTransform, grouped_batches
from triptych.losses import unit
from triptych.precision import fast_precision
from triptych.progress import progress

T = TypeVar("T")
IN_MEMORY = 2**26
"""Numbers of a token's features, 256 MiB, above which they are put down in a file as they come."""
HASHED = 1000
"""Images of a source whose bytes are part of the key of its cached features: all of a small one, else a sample."""


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
    scales: tuple[float, ...] = (1.0,),
    batch: int | None = None,
    device: torch.device | str = "cpu",
    precision: torch.dtype | None = None,
    workers: int | None = None,
) -> tuple[dict[Token, Tensor], Tensor]:
    """-> features (N, D) float32 of each token, and indices (N,) int64 into the source, both on the CPU.

    One pass over the images, of which those that cannot be read are left out.  scales: other than (1.0,), features are
    those of `multiscale`.  Images of unlike sizes (transform "longest") go by size, without the last rows and columns
    that fill no patch.  batch, precision: None = what is fast on the device (`fast_batch`,
    `fast_precision`).  The encoder is left as it was.
    """
    device = torch.device(device)
    batch = batch or fast_batch(device, transform.size)

    def describe(images: Tensor) -> dict[Token, Tensor]:
        return select_all(encoder, images, tokens, layers)

    def features_of(images: Tensor) -> dict[Token, Tensor]:
        if scales != (1.0,):
            return multiscale(describe, images, scales, encoder.patch_size)
        return describe(whole_patches(images, encoder.patch_size) if transform.shape == "longest" else images)

    read: list[int] = []
    found: dict[Token, Tensor] = {}
    with frozen(encoder, device, precision or fast_precision(device)):
        for index, part in _one_behind(
            (index, features_of(images))
            for groups in progress(
                grouped_batches(source, transform, batch=batch, device=device, workers=workers),
                f"features of {source.name}:",
                len(source),
                each=batch,
            )
            for index, images in groups
        ):
            for token, x in part.items():
                if token not in found:
                    found[token] = _room(len(source), x.shape[1])
                found[token][index] = x.to("cpu", torch.float32)
            read += index
    indices = torch.tensor(sorted(read))
    return {token: _rows(x, indices) for token, x in found.items()}, indices


def _room(rows: int, width: int) -> Tensor:
    """(rows, width) float32: in memory, or in a file of which the system keeps there what it has room for."""
    return torch.empty(rows, width) if rows * width <= IN_MEMORY else on_disk(rows, width)


def _rows(x: Tensor, indices: Tensor) -> Tensor:
    """Only these rows, which are ascending: moved up, without another copy of all."""
    at = 0
    for part in indices.split(2**16) if len(indices) < len(x) else ():
        x[at : at + len(part)] = x[part]
        at += len(part)
    return x[: len(indices)]


def multiscale(
    describe: Callable[[Tensor], dict[Token, Tensor]], images: Tensor, scales: Sequence[float], patch: int
) -> dict[Token, Tensor]:
    """Features (B, D) of unit length: of the mean of what `describe` gives for the images (B, 3, H, W) at each scale.

    The descriptor of DINO's retrieval (utils.py:815, which divides by the norm of the whole batch and so wants one
    image at a time).  Bilinear, not anti-aliased, on normalised pixels.  patch: sides are cut to multiples of it.
    """
    if not scales or not all(0 < scale <= 4 for scale in scales):
        raise UserError(f"scales {scales}: give at least one, each above 0 and at most 4 (DINO: 1, 0.7071 and 0.5)")
    total: dict[Token, Tensor] = {}
    for scale in scales:
        if min(images.shape[-2:]) * scale < patch:
            height, width = images.shape[-2:]
            raise UserError(
                f"scale {scale:g}: an image of {height} x {width} px becomes smaller than a patch ({patch} px)"
            )
        resized = images if scale == 1 else F.interpolate(images, scale_factor=scale, mode="bilinear")
        for token, x in describe(whole_patches(resized, patch)).items():
            total[token] = total[token] + x.float() if token in total else x.float()
    return {token: unit(x) for token, x in total.items()}  # the direction of the sum is the mean's


def whole_patches(images: Tensor, patch: int) -> Tensor:
    """(B, 3, H, W) without the last rows and columns that fill no patch, as a strided convolution leaves them out."""
    height, width = images.shape[-2:]
    if min(height, width) < patch:
        raise UserError(
            f"an image of {height} x {width} px, as resized, is smaller than a patch of {patch} px; use a larger size"
        )
    return images[..., : height // patch * patch, : width // patch * patch]


def _one_behind(items: Iterable[T]) -> Iterator[T]:
    """The same items, each after the next one was made: a GPU then works on that while the host waits for this one."""
    before: list[T] = []
    for item in items:
        yield from before
        before = [item]
    yield from before


def left_out(source: Source, read: int) -> str:
    """What to say where only so many of its images could be read."""
    return f"{len(source) - read} of {len(source)} images of {source.name} cannot be read: left out"


def labels_of(source: Source, indices: Tensor) -> Tensor:
    """(N,) int64 labels of the extracted images."""
    labels = [source.label(i) for i in indices.tolist()]
    if any(label is None for label in labels):
        raise UserError(f"{source.name} has no labels: put the images of each class in a sub-folder of its own")
    return torch.tensor(labels)


def encoder_hash(encoder: Encoder) -> str:
    """16 hex digits over the encoder's weights (names, shapes, values) and what decides its tokens beside them."""
    digest = hashlib.sha256(json.dumps(encoder.beside_weights(), sort_keys=True).encode())
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def content_hash(source: Source) -> str:
    """16 hex digits over paths, labels, file sizes and the stored bytes of up to HASHED images, evenly spread.

    So one image of a larger set may change unnoticed if its file keeps its size.  Of images that have no bytes of their
    own (drawn, or in the one big file of a torchvision set) the source's own fingerprint is all there is.
    """
    stored = getattr(source, "stored", lambda _: None)

    def one(index: int) -> str:
        try:
            data = stored(index)
        except UnreadableImage:
            return "unreadable"
        return "" if data is None else hashlib.blake2b(memoryview(data).cast("B"), digest_size=8).hexdigest()

    chosen = np.linspace(0, len(source) - 1, min(len(source), HASHED)).astype(int).tolist()
    return digest([source.fingerprint(), *map(one, chosen)])


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
    weights: str | None = None,
    images: str | None = None,
    layers: int = 1,
    scales: tuple[float, ...] = (1.0,),
    device: torch.device | str = "cpu",
    precision: torch.dtype | None = None,
    **options: Any,
) -> tuple[dict[Token, Tensor], Tensor]:
    """`extract_all`, read from the cache where the same encoder, images and options were extracted before.

    The key holds the `encoder_hash` of the encoder and the `content_hash` of the images, which who has them already may
    give as weights and images.  Files are called TOKEN-HASH; what was hashed is the file's metadata "key", in JSON,
    beside "source", the name that the images had.
    """
    precision = precision or fast_precision(device)
    about = {"triptych": __version__, "encoder": weights or encoder_hash(encoder)}
    about |= {"images": images or content_hash(source)}
    about |= {"transform": vars(transform), "layers": layers, "scales": scales, "precision": str(precision)}
    folder = folder or cache_folder("features")
    keys = {token: json.dumps({"token": token, **about}) for token in tokens}
    hashes = {token: hashlib.sha256(key.encode()).hexdigest()[:32] for token, key in keys.items()}
    paths = {token: folder / f"{token}-{of}.safetensors" for token, of in hashes.items()}
    stored = {token: load_file(path) for token, path in paths.items() if path.exists()}
    missing: list[Token] = [token for token in tokens if token not in stored]
    if len({repr(of["indices"].tolist()) for of in stored.values()}) > 1:
        missing = list(tokens)  # an image was read at one time and not at another: rows must be of the same images
    if missing:
        options |= {"layers": layers, "scales": scales, "device": device, "precision": precision}
        features, indices = extract_all(encoder, source, transform, missing, **options)
        folder.mkdir(parents=True, exist_ok=True)
        for token in missing:
            stored[token] = {"features": features[token].contiguous(), "indices": indices}
            part = paths[token].with_suffix(f".{os.getpid()}.part")
            save_file(stored[token], part, {"key": keys[token], "source": source.name})
            part.replace(paths[token])
    first = stored[tokens[0]]["indices"]
    return {token: stored[token]["features"] for token in tokens}, first
