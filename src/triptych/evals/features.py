"""Features of a frozen encoder: extracted once, cached, shared by all frozen protocols."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from triptych import __version__
from triptych.cache import cache_folder
from triptych.data.sources import Source
from triptych.encoders import Encoder
from triptych.errors import UserError
from triptych.evals.frozen import fast_batch, frozen
from triptych.evals.selection import Token, select_all
from triptych.evals.transform import EvalTransform, batches
from triptych.precision import fast_precision
from triptych.progress import progress

T = TypeVar("T")


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
    batch = batch or fast_batch(device)
    indices: list[int] = []
    found: dict[Token, Tensor] = {}
    with frozen(encoder, device, precision or fast_precision(device)):
        for index, part in _one_behind(
            (index, select_all(encoder, images, tokens, layers))
            for index, images in progress(
                batches(source, transform, batch=batch, device=device, workers=workers),
                f"features of {source.name}:",
                len(source),
                each=batch,
            )
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
