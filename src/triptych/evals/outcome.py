"""What a protocol hands back: its result, what identifies it, and the figures that a person reads."""

from dataclasses import dataclass
from typing import Any

from triptych.data.sources import Source


@dataclass(frozen=True)
class Figure:
    """One row of a table."""

    name: str  # what was measured, with its unit: "top-1 %, k = 10"
    value: float
    margin: float | None = None  # half of the 95 % confidence interval, where the protocol samples
    note: str = ""  # how it came about, the same for every encoder: what chose a rate, how many draws
    detail: str = ""  # what else there is to know about this number
    main: bool = True  # does it belong in a table of many protocols?

    def text(self) -> str:
        """'61.20 ± 0.42'"""
        return f"{self.value:.2f}" + (f" ± {self.margin:.2f}" if self.margin is not None else "")


@dataclass(frozen=True)
class Outcome:
    protocol: str
    setting: str  # token, share of labels ...: with protocol and figure it tells rows of one set apart
    about: dict[str, Any]  # encoder, images, settings
    result: Any  # the protocol's dataclass
    figures: list[Figure]


def about_images(**sources: Source) -> dict[str, Any]:
    """Name and fingerprint of each."""
    return {part: {"name": source.name, "fingerprint": source.fingerprint()} for part, source in sources.items()}
