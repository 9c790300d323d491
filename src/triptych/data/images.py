"""Any image that Pillow can open becomes 8-bit RGB without clipped ranges, hidden colours or lost orientation."""

import numpy as np
from PIL import Image, ImageCms, ImageOps


class UnreadableImage(Exception):
    """One image of a source cannot be read.  key: its path within the source; reason: why, in a few words."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)  # both in args, so the error survives pickling
        self.key = key
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


def to_rgb(image: Image.Image) -> Image.Image:
    """The image upright (EXIF orientation applied), in mode RGB, 8 bit; the given image is left as it was.

    Transparency is composited on white.  16-bit values are divided by 257 and rounded.  32-bit integers are taken as
    16-bit where all lie in 0..65535, floats as 0..1 where all lie there; other values are stretched from their own
    minimum..maximum to 0..255, and NaN is black.  Of an animation this is the frame the image stands at, which is the
    first one of a file just opened.  Raises what Pillow raises for damaged data and for modes without a conversion.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return _grey(_from_16_bit(np.asarray(image)))
    if image.mode == "I":
        values = np.asarray(image)
        is_16_bit = values.min() >= 0 and values.max() <= 65535
        return _grey(_from_16_bit(values) if is_16_bit else _stretched(values.astype(np.float64)))
    if image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        finite = values[np.isfinite(values)]
        in_unit = finite.size > 0 and finite.min() >= 0 and finite.max() <= 1
        return _grey(_to_8_bit(values * 255) if in_unit else _stretched(values))
    if image.mode == "LAB":  # the one mode whose conversion needs colour management
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None  # None only with inPlace=True
        return converted
    if image.has_transparency_data:
        return _on_white(image)
    return image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # Pillow converts premultiplied grey to nothing but LA
        image = image.convert("LA")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _grey(values: np.ndarray) -> Image.Image:
    """(H, W) uint8 -> RGB."""
    return Image.fromarray(values).convert("RGB")


def _from_16_bit(values: np.ndarray) -> np.ndarray:
    """(H, W) integers in 0..65535 -> uint8: value / 257, rounded (never a tie, as 257 is odd)."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _stretched(values: np.ndarray) -> np.ndarray:
    """(H, W) float64 -> uint8, the least finite value to 0 and the greatest to 255; a constant image is black."""
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    return _to_8_bit((values - low) * 255 / ((high - low) or 1.0))


def _to_8_bit(values: np.ndarray) -> np.ndarray:
    """(H, W) float64 around 0..255 -> uint8: rounded, infinities to the ends of the range, NaN to 0."""
    return np.rint(np.clip(np.nan_to_num(values, nan=0.0, posinf=255.0, neginf=0.0), 0, 255)).astype(np.uint8)
