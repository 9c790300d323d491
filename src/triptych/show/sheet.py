"""The one look of every picture: white ground, names above, tiles in columns, below what the colours mean."""

import textwrap
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from triptych.show.colours import heat

MARGIN = 6  # pixels between tiles, and around the sheet
GAP = 18  # more of them between panels that stand side by side
TEXT, LINE = 13, 18  # height of letters and of a line
INK, FAINT = (20, 20, 20), (95, 95, 95)
WIDTH = 2400  # pixels that a sheet of several panels has at most


@dataclass(frozen=True)
class Tile:
    title: str  # of its column
    pixels: np.ndarray  # (h, w, 3) uint8
    note: str = ""  # below it
    smooth: bool = True  # a photograph, not fields of one colour


@dataclass(frozen=True)
class Panel:
    """What belongs to one image (of a video: to one frame): tiles in a row, under a name."""

    name: str
    tiles: list[Tile]


@dataclass(frozen=True)
class Scale:
    """What the colours of a heat map mean: the text at its two ends."""

    low: str
    high: str


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def wide(text: str) -> int:
    """Pixels that a line of text takes."""
    return int(np.ceil(_font(TEXT).getlength(text)))


def shortened(text: str, width: int) -> str:
    """The text, or as much of its beginning and end as fit into so many pixels, with an ellipsis between."""
    text = " ".join(text.split())
    if wide(text) <= width:
        return text
    kept = bisect_right(range(len(text)), width, key=lambda n: wide(_cut(text, n))) - 1
    return _cut(text, kept) if kept > 0 else ""


def _cut(text: str, kept: int) -> str:
    """So many letters, a little more of the end, which tells names apart."""
    head = kept * 2 // 5
    return f"{text[:head]}…{text[len(text) - (kept - head) :]}"


def side_for(panel: Panel, most: int, width: int = WIDTH) -> int:
    """Pixels of a tile's longer side: `most`, or less where the columns would make a sheet wider than `width`."""
    return max(96, min(most, (width - MARGIN) // len(panel.tiles) - MARGIN))


def resized(panel: Panel, side: int) -> Panel:
    """Every tile with a longer side of so many pixels."""
    return Panel(panel.name, [Tile(t.title, _resized(t, side), t.note, t.smooth) for t in panel.tiles])


def _resized(tile: Tile, side: int) -> np.ndarray:
    height, width = tile.pixels.shape[:2]
    factor = side / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    large = cv2.INTER_CUBIC if tile.smooth else cv2.INTER_NEAREST
    method = cv2.INTER_AREA if factor < 1 else large
    return cv2.resize(tile.pixels, size, interpolation=method)


def sheet(panels: Sequence[Panel], *, about: str = "", scale: Scale | None = None, width: int = WIDTH) -> Image.Image:
    """Panels stand side by side as far as `width` pixels go, the first one's titles above all columns.

    about: text below everything.  Tiles are taken as they are: see `resized`.
    """
    columns = _widths(panels)
    panel_width = sum(columns) + MARGIN * (len(columns) - 1)
    across = max(1, min(len(panels), (width - 2 * MARGIN + GAP) // (panel_width + GAP)))
    lines = [panels[i : i + across] for i in range(0, len(panels), across)]
    heights = [max(_height(p) for p in line) for line in lines]
    whole = across * (panel_width + GAP) - GAP
    below = textwrap.wrap(about, max(12, int(whole / max(1, wide(about)) * len(about) * 0.95))) if about else []
    foot = (LINE + MARGIN if scale else 0) + LINE * len(below)
    head = LINE if any(t.title for t in panels[0].tiles) else 0
    out = Image.new(
        "RGB", (whole + 2 * MARGIN, MARGIN + head + sum(heights) + len(lines) * MARGIN + foot + MARGIN), "white"
    )
    draw = ImageDraw.Draw(out)
    y = MARGIN + head
    for n, (line, height) in enumerate(zip(lines, heights, strict=True)):
        for i, panel in enumerate(line):
            at = MARGIN + i * (panel_width + GAP)
            if n == 0 and head:
                _titles(draw, panel, columns, at)
            _panel(out, draw, panel, columns, (at, y))
        y += height + MARGIN
    if scale:
        _scale(out, draw, scale, (MARGIN, y))
        y += LINE + MARGIN
    for text in below:
        _text(draw, (MARGIN, y), text, FAINT)
        y += LINE
    return out


def _widths(panels: Sequence[Panel]) -> list[int]:
    """Of the columns: their widest tile or title."""
    widths = [0] * max(len(p.tiles) for p in panels)
    for panel in panels:
        for i, tile in enumerate(panel.tiles):
            widths[i] = max(widths[i], tile.pixels.shape[1], wide(tile.title))
    return widths


def _height(panel: Panel) -> int:
    notes = LINE if any(t.note for t in panel.tiles) else 0
    return (LINE if panel.name else 0) + max(t.pixels.shape[0] for t in panel.tiles) + notes


def _titles(draw: ImageDraw.ImageDraw, panel: Panel, columns: list[int], x: int) -> None:
    for tile, width in zip(panel.tiles, columns, strict=False):
        _text(draw, (x + (width - wide(tile.title)) // 2, MARGIN), tile.title, INK)
        x += width + MARGIN


def _panel(out: Image.Image, draw: ImageDraw.ImageDraw, panel: Panel, columns: list[int], at: tuple[int, int]) -> None:
    x, y = at
    if panel.name:
        _text(draw, at, shortened(panel.name, sum(columns) + MARGIN * (len(columns) - 1)), FAINT)
        y += LINE
    for tile, width in zip(panel.tiles, columns, strict=False):
        left = x + (width - tile.pixels.shape[1]) // 2
        out.paste(Image.fromarray(tile.pixels), (left, y))
        if tile.note:
            note = shortened(tile.note, width)
            _text(draw, (x + (width - wide(note)) // 2, y + tile.pixels.shape[0] + 1), note, FAINT)
        x += width + MARGIN


def _scale(out: Image.Image, draw: ImageDraw.ImageDraw, scale: Scale, at: tuple[int, int]) -> None:
    (x, y), length = at, 120
    _text(draw, (x, y), scale.low, INK)
    x += wide(scale.low) + MARGIN
    bar = np.broadcast_to(np.linspace(0, 1, length), (LINE - 6, length))
    out.paste(Image.fromarray(heat(bar)), (x, y + 2))
    _text(draw, (x + length + MARGIN, y), scale.high, INK)


def _text(draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, colour: tuple[int, int, int]) -> None:
    draw.text(at, text, fill=colour, font=_font(TEXT))
