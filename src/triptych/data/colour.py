"""Photometric augmentation: which recipes there are, and what is drawn for each view.

Drawing and doing are apart: workers draw, from (seed, epoch, image) alone, and what was drawn is carried out either
there (``data/operations.py``) or for the whole batch on the device (``data/batched_operations.py``).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from triptych.data import operations
from triptych.data.randaug import DrawnRandAugment, RandAugment
from triptych.errors import UserError, nearest

JITTERS = ("brightness", "contrast", "saturation", "hue")
COLUMNS = 11  # of a row of `Drawn.row`


@dataclass(frozen=True)
class Drawn:
    """What one view gets: jitters in this order, then grey, blur and solarisation."""

    jitters: tuple[tuple[int, float], ...] = ()  # (position in JITTERS, factor), each operation at most once
    grey: bool = False
    sigma: float = 0.0  # of the blur, pixels; 0 = none
    threshold: int = 256  # values from here on are inverted; 256 = none

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 RGB, contiguous -> the same shape; the given array is not changed."""
        for operation, factor in self.jitters:
            image = getattr(operations, JITTERS[operation])(image, factor)
        if self.grey:
            image = operations.grey(image)
        if self.sigma:
            image = operations.blur(image, self.sigma)
        if self.threshold < 256:
            image = operations.solarise(image, self.threshold)
        return image

    def row(self) -> list[float]:
        """COLUMNS numbers: four operations (-1 = none), their factors, grey (0 or 1), sigma, threshold."""
        left_out = [-1.0] * (4 - len(self.jitters))
        order, factors = [float(o) for o, _ in self.jitters], [f for _, f in self.jitters]
        return [*order, *left_out, *factors, *left_out, float(self.grey), self.sigma, float(self.threshold)]


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

    def draw(self, rng: np.random.Generator, blur_scale: float = 1.0) -> Drawn:
        """blur_scale multiplies the blur's radii."""
        jitters = self._jitters(rng) if rng.random() < self.p_jitter else ()
        grey = bool(rng.random() < self.p_grey)
        low, high = self.blur_radius
        sigma = rng.uniform(blur_scale * low, blur_scale * high) if rng.random() < self.p_blur else 0.0
        threshold = self.solarise_threshold if rng.random() < self.p_solarise else 256
        return Drawn(jitters, grey, sigma, threshold)

    def _jitters(self, rng: np.random.Generator) -> tuple[tuple[int, float], ...]:
        """The four jitters in a random order, as torchvision's ``ColorJitter``; one of strength 0 is left out."""
        strengths, centres = (self.brightness, self.contrast, self.saturation, self.hue), (1.0, 1.0, 1.0, 0.0)
        drawn = []
        for i in rng.permutation(4).tolist():
            low = centres[i] - strengths[i] if JITTERS[i] == "hue" else max(0.0, centres[i] - strengths[i])
            factor = rng.uniform(low, centres[i] + strengths[i])
            if strengths[i] > 0:
                drawn.append((i, factor))
        return tuple(drawn)


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


def known(policy: str) -> str:
    """The policy's name; raises UserError for one that is not in COLOURS."""
    if policy not in COLOURS:
        raise UserError(f"no colour policy {policy!r}{nearest(policy, COLOURS)}; choose one of {', '.join(COLOURS)}")
    return policy


def batchable(policy: str) -> bool:
    """Can the device carry this policy out?  RandAugment's operations exist for PIL images alone."""
    return all(isinstance(recipe, Colour) for mixture in COLOURS[policy].values() for _, recipe in mixture)


def draw(policy: str, role: Role, rng: np.random.Generator, *, blur_scale: float = 1.0) -> Drawn | DrawnRandAugment:
    """What the recipe that ``COLOURS[policy]`` has (or draws) for ``role`` does to one view.

    blur_scale multiplies the recipe's blur radii, which are meant for crops of 96 to 224 pixels.
    """
    recipe = _recipe(COLOURS[known(policy)][role], rng)
    return recipe.draw(rng) if isinstance(recipe, RandAugment) else recipe.draw(rng, blur_scale)


def _recipe(mixture: Mixture, rng: np.random.Generator) -> Colour | RandAugment:
    u = rng.random()
    for weight, recipe in mixture:
        u -= weight
        if u < 0:
            return recipe
    return mixture[-1][1]  # weights that sum to 1 - epsilon
