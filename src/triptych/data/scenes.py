"""The built-in data set: seeded, labelled drawings of textured shapes on cluttered backgrounds; no download.

A class is one silhouette with one texture; colours, size, place, angle, stretch and period are random alike in all.
"The same bytes" is meant on one machine: another processor's sine may round a pixel the other way.
"""

import colorsys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from triptych.errors import UserError

CLASSES: tuple[str, ...] = ("disc", "triangle", "square", "star", "ring", "cross", "crescent", "heart")
TEST_START = 2**30  # index of the first test scene: a multiple of 8, and past any training set that fits on a disk

_Rng = np.random.Generator
_Array = np.ndarray


@dataclass(frozen=True)
class Scene:
    """One labelled picture."""

    image: np.ndarray  # (H, W, 3) uint8, RGB
    mask: np.ndarray  # (H, W) uint8: 0 = background, 1 + class index where the main object is seen
    label: int  # class index of the main object, 0 .. len(CLASSES) - 1


@dataclass(frozen=True)
class Clip:
    """One labelled short film of a moving object."""

    frames: np.ndarray  # (T, H, W, 3) uint8, RGB
    masks: np.ndarray  # (T, H, W) uint8, ids as in Scene.mask
    label: int  # class index of the main object, 0 .. len(CLASSES) - 1


def scene(index: int, *, seed: int = 0, size: int = 96) -> Scene:
    """Draw scene number `index`: the same arguments give the same bytes, and the label is index % len(CLASSES).

    index, seed: 0 or more.  size: side of the square picture in pixels, 16 or more; another size gives the same
    composition.  The object covers about 24 to 43 % of the picture.  Raises UserError on other values.
    """
    _at_least(index=(index, 0), seed=(seed, 0), size=(size, 16))
    rng = np.random.default_rng([seed, index, 1])
    label = index % len(CLASSES)
    canvas = _background(rng, size)
    area = rng.uniform(0.24, 0.42)
    sprite = _sprite(rng, _OUTLINES[label], label, area)
    turn = area**0.5 * size * np.exp(2j * np.pi * rng.random())
    room = max(0.04 * size, 0.5 * size - 0.9 * np.abs(turn * sprite.outline[0]).max())  # else too much is cut off
    place = complex(*(size / 2 + rng.uniform(-room, room, 2)))
    return Scene(*_shoot(rng, canvas, sprite, place, turn), label)


def clip(index: int, *, seed: int = 0, size: int = 96, frames: int = 8) -> Clip:
    """Draw clip number `index`: the object wanders, turns and breathes over a slowly panning background.

    index, seed: 0 or more; size: side in pixels, 16 or more; frames: length, 1 or more.  The same arguments give the
    same bytes, and a longer clip begins with the shorter one.  Between two frames the centre moves by at most 7 % of
    the side.  Raises UserError on other values.
    """
    _at_least(index=(index, 0), seed=(seed, 0), size=(size, 16), frames=(frames, 1))
    rng = np.random.default_rng([seed, index, 2])  # 2, not 1: shares nothing with the scene of the same index
    label = index % len(CLASSES)
    margin = size // 12
    backdrop = _background(rng, size + 2 * margin)
    area = rng.uniform(0.16, 0.24)
    sprite = _sprite(rng, _OUTLINES[label], label, area)
    reach = rng.uniform(0.12, 0.2, 2)  # swings, not straight lines: the object stays in view however long the clip is
    rates = rng.uniform(0.15, 0.24, 4)  # radians per frame: x, y, size, background pan
    starts = rng.uniform(0, 2 * np.pi, 6)  # phases of the same four, of the vertical pan, and the first angle
    spin = rng.choice([-1, 1]) * rng.uniform(0.06, 0.18)  # radians per frame
    shots = []
    for t in range(frames):
        x, y = 0.5 + reach * np.sin(rates[:2] * t + starts[:2])
        turn = area**0.5 * (1 + 0.12 * np.sin(rates[2] * t + starts[2])) * np.exp(1j * (starts[5] + spin * t))
        pan = margin * (1 + np.sin(0.4 * rates[3] * t + starts[3:5]))  # read between the pixels, or it would jerk
        canvas = cv2.warpAffine(backdrop, np.column_stack([np.eye(2), -pan]), (size, size))
        shots.append(_shoot(rng, canvas, sprite, complex(x, y) * size, turn * size))
    pictures, masks = (np.stack(part) for part in zip(*shots, strict=True))
    return Clip(pictures, masks, label)


def write(folder: Path, *, train: int, test: int, clips: int = 0, seed: int = 0, size: int = 96) -> None:
    """Write a data set: `train` and `test` scenes and `clips` clips of 8 frames, the classes in turn.

    Pictures: folder/train/<class>/<00000>.jpg, folder/test/<class>/<00000>.jpg, folder/clips/<00000>/<00>.jpg.
    Masks, under the same names as PNG: folder/masks/train, folder/masks/test, folder/clip_masks.  The number is the
    position in the split, so it is unique in it; no test scene is a training scene, whatever the counts.  Files of the
    same name are replaced and others are left.  Raises UserError on counts below 0 and where `scene` does.
    """
    _at_least(train=(train, 0), test=(test, 0), clips=(clips, 0))
    for split, first, count in (("train", 0, train), ("test", TEST_START, test)):
        for i in range(count):
            one = scene(first + i, seed=seed, size=size)
            name = f"{split}/{CLASSES[one.label]}/{i:05d}"
            _save(folder / f"{name}.jpg", one.image, folder / f"masks/{name}.png", one.mask)
    for i in range(clips):
        film = clip(i, seed=seed, size=size)
        for t, (frame, mask) in enumerate(zip(film.frames, film.masks, strict=True)):
            _save(folder / f"clips/{i:05d}/{t:02d}.jpg", frame, folder / f"clip_masks/{i:05d}/{t:02d}.png", mask)


def _at_least(**given: tuple[int, int]) -> None:
    for name, (value, least) in given.items():
        if value < least:
            raise UserError(f"{name} is {value}; it must be a whole number of at least {least}")


def _save(image_path: Path, image: np.ndarray, mask_path: Path, mask: np.ndarray) -> None:
    options: dict[str, Any]
    for path, picture, options in ((image_path, image, {"quality": 92}), (mask_path, mask, {})):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path, **options)


# Silhouettes: closed contours of unit area about the middle of their bounding box; a point is x + iy.
def _unit(outer: _Array, *holes: _Array) -> tuple[_Array, ...]:
    whole, *gaps = (abs(np.imag(np.vdot(c, np.roll(c, -1)))) / 2 for c in (outer, *holes))
    x, y = np.real(outer), np.imag(outer)
    middle = complex(x.max() + x.min(), y.max() + y.min()) / 2
    return tuple((c - middle) / (whole - sum(gaps)) ** 0.5 for c in (outer, *holes))


def _spokes(*radii: float) -> _Array:
    return np.array(radii) * np.exp(2j * np.pi * np.arange(len(radii)) / len(radii))


_BITE = np.exp(1j * np.linspace(2 * np.pi - 1, 1, 30)) * np.sin(0.6) / np.sin(1)
_BOW = np.exp(1j * np.linspace(0.6, 2 * np.pi - 0.6, 40))  # ends where the bite begins, once that is moved there
_ANGLE = np.linspace(0, 2 * np.pi, 48, endpoint=False)
_LOBES = 5 * np.cos(2 * _ANGLE) + 2 * np.cos(3 * _ANGLE) + np.cos(4 * _ANGLE) - 13 * np.cos(_ANGLE)
_OUTLINES = (
    _unit(np.exp(1j * _ANGLE)),
    _unit(_spokes(1, 1, 1)),
    _unit(_spokes(1, 1, 1, 1)),
    _unit(_spokes(*[1, 0.5] * 5)),
    _unit(np.exp(1j * _ANGLE), 0.5 * np.exp(1j * _ANGLE)),
    _unit(np.outer([1, 1j, -1, -1j], [1 - 0.38j, 1 + 0.38j, 0.38 + 0.38j]).ravel()),
    _unit(np.concatenate([_BOW, _BITE + _BOW[-1] - _BITE[0]])),
    _unit(16 * np.sin(_ANGLE) ** 3 + 1j * _LOBES),
)
_CLOUDS = cv2.GaussianBlur(np.random.default_rng(0).uniform(-6, 6, (128, 128)).astype(np.float32), (0, 0), 1.4)
# Textures, one per class: (u, v, spot) -> about -1 .. 1, the sign telling the colour; u and v in radians.
_TEXTURES: tuple[Callable[[_Array, _Array, _Array], _Array], ...] = (
    lambda u, v, _: np.sin(u),  # stripes
    lambda u, v, _: np.sin(0.8 * u) + np.sin(0.8 * v) - 0.55,  # dots
    lambda u, v, _: np.sin(np.hypot(u, v)),  # ripples
    lambda u, v, _: 0.05 * u,  # gradient
    lambda u, v, _: 1.4 * np.sin(0.6 * u) * np.sin(0.6 * v),  # checker
    lambda u, v, _: np.sin(v + np.arcsin(np.sin(0.8 * u))),  # zigzag
    lambda u, v, spot: cv2.remap(_CLOUDS, 0.8 * u + spot[0], 0.8 * v + spot[1], cv2.INTER_LINEAR),  # blotches
    lambda u, v, _: 2 * np.maximum(np.abs(np.sin(0.5 * u)), np.abs(np.sin(0.5 * v))) - 1.8,  # grid
)


@dataclass(frozen=True)
class _Sprite:
    outline: tuple[_Array, ...]
    texture: int  # place in _TEXTURES, the class index
    colours: _Array  # (2, 3) float32, 0 .. 1: one dark, one light
    period: float  # of the texture, in the outline's unit
    phase: complex  # of the texture, radians
    spot: _Array  # (2,) float32, the part of the noise that blotches show


def _sprite(rng: _Rng, outline: tuple[_Array, ...], texture: int, area: float) -> _Sprite:
    """`outline` in random colours, its texture's period fit for a drawing that covers `area` of the picture."""
    squeeze = rng.uniform(0.9, 1.1)
    outline = tuple(np.real(c) * squeeze + 1j * np.imag(c) / squeeze for c in outline)
    a, b = (np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.6, 0.95), 1.0)) for _ in range(2))
    dark, light = a * rng.uniform(0.2, 0.45), 1 - (1 - b) * rng.uniform(0.25, 0.6)
    colours = np.array([dark, light] if rng.random() < 0.5 else [light, dark], np.float32)
    period, phase = rng.uniform(0.11, 0.16) / area**0.5, complex(*rng.uniform(-3, 3, 2))
    return _Sprite(outline, texture, colours, period, phase, rng.uniform(32, 96, 2).astype(np.float32))


# Drawing: canvases are (H, W, 3) float32, 0 .. 1; a sprite's point z lies on pixel place + turn * z.
def _shoot(rng: _Rng, canvas: _Array, sprite: _Sprite, place: complex, turn: complex) -> tuple[_Array, _Array]:
    """Draw the main object and its soft shadow; return image and mask, as in Scene."""
    size, shape = canvas.shape[0], canvas.shape[:2]
    shadow = _coverage(sprite, place + (0.015 + 0.025j) * size, turn, shape)
    canvas *= 1 - 0.5 * cv2.GaussianBlur(shadow, (0, 0), 0.025 * size)[..., None]
    cover = _coverage(sprite, place, turn, shape)
    _blend(canvas, sprite, place, turn, cover, 1.0)
    canvas += (rng.random(canvas.shape, np.float32) - np.float32(0.5)) * np.float32(0.05)  # a camera's grain
    return np.rint(canvas.clip(0, 1) * 255).astype(np.uint8), (cover >= 0.5) * np.uint8(1 + sprite.texture)


def _coverage(sprite: _Sprite, place: complex, turn: complex, shape: tuple[int, ...]) -> _Array:
    fine = np.zeros((2 * shape[0], 2 * shape[1]), np.uint8)  # OpenCV's own smooth edges are half a pixel too far out
    cv2.fillPoly(fine, [_fixed(2 * (place + turn * c)) for c in sprite.outline], 255, cv2.LINE_AA, 4)
    return cv2.resize(fine, shape[::-1], interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def _fixed(points: _Array) -> _Array:
    # OpenCV takes sixteenths of a pixel (shift=4) and has pixel centres, not corners, at whole numbers.
    return np.rint((points[:, None] * (1, -1j)).real * 16 - 8).astype(np.int32)


def _blend(canvas: _Array, sprite: _Sprite, place: complex, turn: complex, cover: _Array, contrast: float) -> None:
    """Mix the textured sprite into `canvas` in place, as far as `cover`, (H, W) float32, says."""
    step = turn * sprite.period / (2 * np.pi)  # one radian of the texture, in pixels
    across = ((np.arange(cover.shape[1]) + 0.5 - place) / step + sprite.phase).astype(np.complex64)
    down = ((np.arange(cover.shape[0]) + 0.5) * 1j / step).astype(np.complex64)[:, None]
    value = _TEXTURES[sprite.texture](across.real + down.real, across.imag + down.imag, sprite.spot)
    if sprite.texture != CLASSES.index("star"):  # whose texture is a gradient, without edges
        value = value * np.float32(0.8 * abs(step))  # edges about a pixel and a half wide, at any picture size
    value = 0.5 + np.float32(contrast) * np.clip(value, -0.5, 0.5)
    for i, (first, second) in enumerate(sprite.colours.T):  # one colour at a time is three times as fast
        plane = canvas[..., i]
        plane += (first + (second - first) * value - plane) * cover


def _background(rng: _Rng, size: int) -> _Array:
    """Clutter: clouds of colour, patches of every class's texture, lines, and small silhouettes of every class."""
    clouds = rng.uniform(0.3, 0.7, 3) + rng.uniform(-0.2, 0.2, (6, 6, 1)) + rng.uniform(-0.13, 0.13, (6, 6, 3))
    flat = cv2.resize((clouds.clip(0, 1) * 255).astype(np.uint8), (size, size), interpolation=cv2.INTER_CUBIC)
    canvas = flat.astype(np.float32) / 255
    for _ in range(3):
        _patch(rng, canvas, side=rng.uniform(0.2, 0.4))
    flat = np.rint(canvas * 255).astype(np.uint8)  # OpenCV smooths edges on 8 bits only
    lines, scraps = rng.integers(4, 9), rng.integers(5, 9)
    inks = rng.uniform(25, 230, (lines + scraps, 3)).tolist()
    for ink, ends, width in zip(inks, rng.uniform(-0.1, 1.1, (lines, 4)), rng.uniform(0.6, 3, lines), strict=False):
        a, b = _fixed(ends.view(complex) * size).tolist()
        cv2.line(flat, a, b, ink, max(1, round(width * size / 100)), cv2.LINE_AA, 4)
    for ink, (x, y, side, angle) in zip(inks[lines:], rng.random((scraps, 4)), strict=True):
        place, turn = complex(x, y) * size, (0.05 + 0.07 * side) * size * np.exp(2j * np.pi * angle)
        shape = [_fixed(place + turn * c) for c in _OUTLINES[rng.integers(len(CLASSES))]]
        cv2.fillPoly(flat, shape, ink, cv2.LINE_AA, 4)
    return flat.astype(np.float32) / 255


def _patch(rng: _Rng, canvas: _Array, side: float) -> None:
    """Draw an irregular blob of some texture, touching only the part of `canvas` that it covers."""
    size = canvas.shape[0]
    sprite = _sprite(rng, _unit(_spokes(*rng.uniform(0.6, 1.3, 9))), int(rng.integers(len(CLASSES))), side**2)
    place, turn = complex(*rng.uniform(0, size, 2)), side * size * np.exp(2j * np.pi * rng.random())
    reach = np.abs(turn * sprite.outline[0]).max() + 1
    x, y = max(0, int(place.real - reach)), max(0, int(place.imag - reach))
    part = canvas[y : int(place.imag + reach) + 1, x : int(place.real + reach) + 1]
    place -= complex(x, y)
    _blend(part, sprite, place, turn, _coverage(sprite, place, turn, part.shape[:2]), rng.uniform(0.2, 0.7))
