"""What is evaluated: one encoder, or several whose features stand side by side, and its features of any images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triptych.data.sources import Source
from triptych.encoders.load import Loaded
from triptych.errors import UserError
from triptych.evals.ensemble import concatenated
from triptych.evals.features import cached_all, content_hash, encoder_hash, labels_of, left_out
from triptych.evals.selection import Token, check_token
from triptych.evals.transform import EvalTransform
from triptych.precision import fast_precision


@dataclass(frozen=True)
class Features:
    """Of the images of a source that can be read."""

    x: Tensor  # (N, D) float32, on the CPU
    labels: Tensor | None  # (N,) int64; None of images without labels
    indices: Tensor  # (N,) int64 into the source


def random_weights(*models: Loaded) -> dict[str, Any]:
    """For a result: which tensors of bare files were missing, and are random."""
    names = [name for m in models if m.report is not None for name in m.report.missing]
    return {"random_weights": names} if names else {}


class Subject:
    """Encoders under evaluation.  Features come from the cache, or go there.

    size: pixels, None = what each was trained on.  folder: of the cache, None = the usual one.  say: receives remarks,
    such as on images that cannot be read.
    """

    def __init__(
        self,
        models: Sequence[Loaded],
        *,
        size: int | None = None,
        device: torch.device | str = "cpu",
        folder: Path | None = None,
        say: Callable[[str], None] = lambda _: None,
    ):
        self.models, self.device, self.folder, self.say = list(models), torch.device(device), folder, say
        self.precision = fast_precision(self.device)
        self.transforms = [EvalTransform.of(m.size if size is None else size, m.mean, m.std) for m in models]
        self.hashes = [encoder_hash(m.encoder) for m in models]  # once: of a large encoder it takes a second
        self._images: dict[int, tuple[Source, str]] = {}  # by identity, with the source, so that it stays that one's
        self._told: set[str] = set()
        for loaded, transform in zip(models, self.transforms, strict=True):
            loaded.encoder.grid(transform.size, transform.size)

    @property
    def name(self) -> str:
        return " + ".join(m.name for m in self.models)

    def about(self, **form: Any) -> dict[str, Any]:
        """What identifies the encoders in a result; lists where they are several.  form: as of `features`."""
        transforms = [replace(t, **form) for t in self.transforms]
        each = {
            "model": [m.name for m in self.models],
            "encoder": self.hashes,
            "heads": [m.encoder.heads for m in self.models],
            "positions": [m.encoder.positions for m in self.models],
            "size": [t.size for t in transforms],
            "resize": [t.resize if t.shape == "crop" else None for t in transforms],
            "shape": [t.shape for t in transforms],
            "interpolation": [t.interpolation for t in transforms],
        }
        found = {key: values[0] if len(values) == 1 else values for key, values in each.items()}
        return found | {"precision": str(self.precision).removeprefix("torch.")} | random_weights(*self.models)

    def tokens(self) -> list[Token]:
        """Those that every one of the encoders has, and that are not the same."""
        spec = [m.encoder.spec for m in self.models]
        plus = ["cls_plus"] if all(s.cls_plus for s in spec) else []
        # Without a class token "cls" is the mean patch.
        return ["cls", *plus, *(["patch_mean", "cls+patch_mean"] if all(s.cls for s in spec) else [])]

    def check(self, tokens: Sequence[Token], layers: int = 1) -> None:
        """Raises UserError for a token or layers that an encoder does not have: now, not after another's work."""
        for loaded in self.models:
            for token in tokens:
                check_token(loaded.encoder, token)
            if not 1 <= layers <= loaded.encoder.depth:
                raise UserError(f"layers {layers}: {loaded.name} has {loaded.encoder.depth} blocks")

    def features(self, source: Source, token: Token = "cls", layers: int = 1, **form: Any) -> Features:
        """`features_of` one token."""
        return self.features_of(source, [token], layers, **form)[token]

    def features_of(
        self,
        source: Source,
        tokens: Sequence[Token],
        layers: int = 1,
        *,
        scales: tuple[float, ...] = (1.0,),
        **form: Any,
    ) -> dict[Token, Features]:
        """Features of all of these tokens, in one pass over the images that no cache knows.

        form: fields of EvalTransform other than usual; scales as of `extract_all`.  Several encoders: features of each
        of unit length, side by side.
        """
        options: dict[str, Any] = {"layers": layers, "device": self.device, "precision": self.precision}
        options |= {"folder": self.folder, "scales": scales, "images": self._hash_of(source)}
        parts: dict[Token, list[Tensor]] = {token: [] for token in tokens}
        indices = torch.empty(0, dtype=torch.int64)
        for loaded, transform, weights in zip(self.models, self.transforms, self.hashes, strict=True):
            options |= {"weights": weights}
            found, indices = cached_all(loaded.encoder, source, replace(transform, **form), tokens, **options)
            for token in tokens:
                parts[token].append(found[token])
        self._tell_unreadable(source, len(indices))
        # An image that cannot be read is missing for every model: rows and labels fit.
        labels = labels_of(source, indices) if source.classes else None
        one = len(self.models) == 1
        return {t: Features(x[0] if one else concatenated(x), labels, indices) for t, x in parts.items()}

    def _hash_of(self, source: Source) -> str:
        """Its content's: read once, not at every protocol."""
        if id(source) not in self._images:
            self._images[id(source)] = source, content_hash(source)
        return self._images[id(source)][1]

    def _tell_unreadable(self, source: Source, read: int) -> None:
        if read < len(source) and source.name not in self._told:
            self._told.add(source.name)
            self.say(left_out(source, read))
