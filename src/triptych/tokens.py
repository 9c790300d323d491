"""Tokens: what an encoder returns, by role instead of by position.

Shape letters used in every file:
    V views   B images   N patches   M sampled patches   D width   P embedding   K prototypes   A auxiliary tokens
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from torch import Tensor

# Keys of an auxiliary token beside itself: every token; patches and other auxiliary tokens; patches.  "uncut": every
# token, and every token sees it: then removal changes the rest, as MTE's ablation shows.
AuxSees = Literal["all", "not_global", "patches", "uncut"]


@dataclass(frozen=True)
class TokenSpec:
    """How many tokens of each role an encoder puts beside its patch tokens.  Specs combine with `|` (the maximum)."""

    cls: int = 1  # 0 for encoders without a class token: the global token is then the mean patch
    cls_plus: int = 0  # UDI's extra class token (class+)
    register: int = 0  # read by no loss
    aux: int = 0  # MTE's auxiliary class tokens: private, no other token attends to them
    mask: bool = False  # a learned vector that stands in for hidden patches
    aux_sees: AuxSees = "all"

    def __or__(self, other: "TokenSpec") -> "TokenSpec":
        counts = {f.name: max(getattr(self, f.name), getattr(other, f.name)) for f in fields(self) if f.type != AuxSees}
        return TokenSpec(**counts, aux_sees=self.aux_sees if self.aux else other.aux_sees)


@dataclass(frozen=True)
class Tokens:
    """The tokens of one view (or of several views of one size, stacked along B)."""

    patch: Tensor  # (B, N, D) after the encoder's final norm, row-major; N = 0 where nobody wants them (Crops.patches)
    patch_raw: Tensor  # (B, N, D) before it: UDI samples these
    grid: tuple[int, int] | None  # rows, columns; None when patches were dropped and no longer tile the view
    cls: Tensor | None = None  # (B, D)
    cls_raw: Tensor | None = None  # (B, D) before the final norm
    cls_plus: Tensor | None = None  # (B, D)
    register: Tensor | None = None  # (B, R, D)
    aux: Tensor | None = None  # (B, A, D)
    aux_raw: Tensor | None = None  # (B, A, D) before the final norm
    mixed: Tensor | None = None  # (B, N, D): mean patches of several blocks (`Encoder.mixed`)

    @property
    def global_token(self) -> Tensor:
        """(B, D): the class token, or the mean patch for encoders without one."""
        return self.patch.mean(1) if self.cls is None else self.cls

    def chunk(self, n: int) -> "list[Tokens]":
        """n equal parts along B."""
        parts: dict[str, Sequence[Any]] = {
            name: value.chunk(n) if isinstance(value, Tensor) else [value] * n for name, value in vars(self).items()
        }
        return [Tokens(**{name: part[i] for name, part in parts.items()}) for i in range(n)]
