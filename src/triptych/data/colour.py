"""Photometric augmentation of one uint8 RGB crop on the CPU: colour jitter, grey, blur, solarisation, RandAugment.

The reference is torchvision's v1 transforms on PIL images, with which DINO and UDI were trained; the operations below
agree with it to about one grey level (``tests/data/test_colour.py`` says how closely) at a fraction of its time.  All
images are (H, W, 3) uint8 RGB arrays.  No function modifies its input.

OpenCV keeps a thread pool of its own: a DataLoader worker should call ``cv2.setNumThreads(0)`` once.
"""

from dataclasses import dataclass, replace
from typing import Literal

import cv2
import numpy as np

from triptych.data.randaug import RandAugment
from triptych.errors import UserError, nearest

# PIL truncates where OpenCV rounds: floor(x) = round(x - 1/2).  Just under 1/2, lest an exact integer lose one.
_TRUNCATE = -0.49


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend with black; ``factor`` >= 0, 0 is black and 1 the image (torchvision ``adjust_brightness``)."""
    return cv2.addWeighted(image, factor, image, 0.0, _TRUNCATE)


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the mean grey level, rounded; ``factor`` >= 0, 1 is the image (torchvision ``adjust_contrast``)."""
    mean = int(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return cv2.addWeighted(image, factor, image, 0.0, (1 - factor) * mean + _TRUNCATE)


def saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the grey image; ``factor`` >= 0, 0 is grey and 1 the image (torchvision ``adjust_saturation``)."""
    return cv2.addWeighted(image, factor, grey(image), 1 - factor, _TRUNCATE)


def hue(image: np.ndarray, factor: float) -> np.ndarray:
    """Turn the hue by ``factor`` of a full circle, in [-1/2, 1/2] (torchvision ``adjust_hue``).

    PIL works in 8-bit HSV.  OpenCV's 8-bit HSV rounds elsewhere, which adds up (from PIL: mean 1.0/255, 99th percentile
    8/255), so this goes through float HSV, which is nearer (0.4 and 3) and, its hue being added in place, no slower.
    """
    # PIL's hue is 255 steps, cut off to whole ones: so is its shift, and its hues lie half a step low on average.
    degrees = (int(factor * 255) - 0.5) * (360 / 255)
    hsv = cv2.cvtColor(image.astype(np.float32), cv2.COLOR_RGB2HSV)
    # HSV2RGB wraps hues above 360 degrees but not below 0.
    hsv = cv2.add(hsv, np.array([degrees % 360, 0.0, 0.0, 0.0]), dst=hsv)
    return cv2.convertScaleAbs(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB, dst=hsv))


def grey(image: np.ndarray) -> np.ndarray:
    """Luma 0.299 R + 0.587 G + 0.114 B in all three channels (PIL mode L, ITU-R 601)."""
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def _blur_kernel(sigma: float) -> np.ndarray:
    """PIL's Gaussian of standard deviation ``sigma`` pixels, (K,): a box with soft ends convolved with itself twice.

    Gwosdek et al. 2011, "Theoretical foundations of Gaussian convolution by extended box filtering", section 2: the
    box is 2l+1 ones between two ends a <= 1, which bring its variance to sigma^2 / 3 exactly.  A sampled Gaussian
    would be another blur below sigma = 0.5, where it barely touches its neighbours (10/255 off on white noise).
    """
    variance = sigma * sigma / 3
    l = int((np.sqrt(12 * variance + 1) - 1) / 2)
    a = (2 * l + 1) * (variance - l * (l + 1) / 3) / (2 * ((l + 1) ** 2 - variance))
    box = np.array([a, *[1.0] * (2 * l + 1), a]) / (2 * l + 1 + 2 * a)
    kernel = np.convolve(np.convolve(box, box), box)
    return (kernel + kernel[::-1]) / 2  # bitwise symmetric, or OpenCV takes its slow path


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of standard deviation ``sigma`` >= 0 pixels, edges replicated (PIL ``GaussianBlur``)."""
    kernel = _blur_kernel(sigma)
    return cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)


def solarise(image: np.ndarray, threshold: int = 128) -> np.ndarray:
    """Invert every value v >= ``threshold`` to 255 - v (PIL ``ImageOps.solarize``)."""
    values = np.arange(256, dtype=np.uint8)
    return cv2.LUT(image, np.where(values < threshold, values, 255 - values))


@dataclass(frozen=True)
class Colour:
    """One photometric recipe: jitter, then grey, blur and solarisation, each with its own probability ``p_*``.

    The defaults are those of Caron et al. 2021 (DINO), after Grill et al. 2020 (BYOL), appendix B.
    """

    brightness: float = 0.4  # the factor is uniform in [max(0, 1 - x), 1 + x], as are the next two
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1  # in circles: the shift is uniform in [-x, x]; x <= 1/2
    p_jitter: float = 0.8
    p_grey: float = 0.2
    p_blur: float = 0.5
    blur_radius: tuple[float, float] = (0.1, 2.0)  # sigma in pixels of the crop, uniform
    p_solarise: float = 0.0
    solarise_threshold: int = 128

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(H, W, 3) uint8 RGB -> a new (H, W, 3) uint8 array; all randomness comes from ``rng``."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"an image is (H, W, 3) uint8, not {image.shape} {image.dtype}")
        # A copy: the caller's crop may be a mirrored view, and OpenCV takes no negative strides.
        image = np.array(image, order="C")
        if rng.random() < self.p_jitter:
            image = self._jitter(image, rng)
        if rng.random() < self.p_grey:
            image = grey(image)
        if rng.random() < self.p_blur:
            image = blur(image, rng.uniform(*self.blur_radius))
        if rng.random() < self.p_solarise:
            image = solarise(image, self.solarise_threshold)
        return image

    def _jitter(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The four jitters in a random order, as torchvision's ``ColorJitter``; one of strength 0 is left out."""
        steps = (
            (brightness, self.brightness, 1.0),
            (contrast, self.contrast, 1.0),
            (saturation, self.saturation, 1.0),
            (hue, self.hue, 0.0),
        )
        for i in rng.permutation(len(steps)):
            operation, strength, centre = steps[i]
            low = centre - strength if operation is hue else max(0.0, centre - strength)
            factor = rng.uniform(low, centre + strength)
            if strength > 0:
                image = operation(image, factor)
        return image


Role = Literal["global_1", "global_2", "local"]
Mixture = tuple[tuple[float, Colour | RandAugment], ...]
"""(weight, recipe) pairs, of which one is drawn per view; the weights sum to 1."""


def _each(*, global_1: Mixture, global_2: Mixture, local: Mixture) -> dict[Role, Mixture]:
    """A policy, role by role; the type checker sees to it that none is missing."""
    return {"global_1": global_1, "global_2": global_2, "local": local}


def _every(*mixture: tuple[float, Colour | RandAugment]) -> dict[Role, Mixture]:
    """A policy that treats every view alike."""
    return _each(global_1=mixture, global_2=mixture, local=mixture)


_BLUR_HALF = Colour(p_blur=0.5)
_BLUR_ALWAYS = Colour(p_blur=1.0)
_BLUR_OR_SOLARISE = Colour(p_blur=0.1, p_solarise=0.2)

COLOURS: dict[str, dict[Role, Mixture]] = {
    # Caron et al. 2021, "Implementation details".  The global pair is Grill et al. 2020's (BYOL), number for number,
    # and so MoCo v3's and MoBY's.
    "dino": _each(global_1=((1.0, _BLUR_ALWAYS),), global_2=((1.0, _BLUR_OR_SOLARISE),), local=((1.0, _BLUR_HALF),)),
    # Su & Ji 2024 (UDI), released code: overall P(blur) = 0.425 and P(solarise) = 0.1 for every view.
    "udi": _every((0.25, _BLUR_HALF), (0.25, _BLUR_ALWAYS), (0.5, _BLUR_OR_SOLARISE)),
    # Chen et al. 2020, colour strength 1, and Caron et al. 2020 (SwAV), whose numbers are the same.  SimCLR's own code
    # draws one blur radius per batch; here each view has its own, as in SwAV's.
    "simclr": _every((1.0, Colour(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2))),
    # Touvron et al. 2021 (DeiT) and He et al. 2022 (fine-tuning MAE): supervised training.
    "randaug": _every((1.0, RandAugment())),
    # Wu et al. 2023 (MMC): jitter 0.4 each; hue, grey and who is blurred are SiT's, whose policy is "dino".
    "mmc": _each(
        global_1=((1.0, Colour(saturation=0.4, p_blur=1.0)),),
        global_2=((1.0, Colour(saturation=0.4, p_blur=0.1, p_solarise=0.2)),),
        local=((1.0, Colour(saturation=0.4)),),
    ),
    # Assran et al. 2022 (MSN): SimCLR's at half its strength, every view alike.
    "msn": _every((1.0, Colour(saturation=0.4))),
    # Atito et al. 2022 (GMML): what is reconstructed keeps its colours.
    "gmml": _every((1.0, Colour(0.1, 0.1, 0.1, 0.01, p_jitter=0.3, p_grey=0.0, p_blur=0.1))),
    # Ours, for images whose colours tell nothing: views share no hue, so that only form can match them.
    "form": _every((1.0, Colour(saturation=0.4, hue=0.5, p_jitter=1.0, p_grey=0.3, p_blur=0.2))),
    # Touvron et al. 2022 (DeiT III), "3-Augment": one of grey, solarisation, blur, and a jitter.
    "three_augment": _every(
        *(
            (1 / 3, Colour(0.3, 0.3, 0.3, 0.0, p_jitter=1.0, p_grey=g, p_blur=b, p_solarise=s))
            for g, b, s in ((1, 0, 0), (0, 1, 0), (0, 0, 1))
        )
    ),
    "none": _every((1.0, Colour(p_jitter=0.0, p_grey=0.0, p_blur=0.0))),
}


def _draw(mixture: Mixture, rng: np.random.Generator) -> Colour | RandAugment:
    u = rng.random()
    for weight, recipe in mixture:
        u -= weight
        if u < 0:
            return recipe
    return mixture[-1][1]  # weights that sum to 1 - epsilon


def augment(
    image: np.ndarray, rng: np.random.Generator, *, policy: str, role: Role, blur_scale: float = 1.0
) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> the same shape, under the recipe that ``COLOURS[policy]`` has (or draws) for ``role``.

    blur_scale multiplies the recipe's blur radii, which are meant for crops of 96 to 224 pixels.
    """
    if policy not in COLOURS:
        raise UserError(f"no colour policy {policy!r}{nearest(policy, COLOURS)}; choose one of {', '.join(COLOURS)}")
    recipe = _draw(COLOURS[policy][role], rng)
    if isinstance(recipe, RandAugment):
        return recipe(image, rng)
    low, high = recipe.blur_radius
    return replace(recipe, blur_radius=(blur_scale * low, blur_scale * high))(image, rng)
