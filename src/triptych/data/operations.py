"""Photometric operations on one uint8 RGB image: brightness, contrast, saturation, hue, grey, blur, solarisation.

The reference is torchvision's v1 transforms on PIL images, with which DINO and UDI were trained; the operations below
agree with it to about one grey level (``tests/data/test_operations.py`` says how closely) at a fraction of its time.
All images are (H, W, 3) uint8 RGB arrays, contiguous.  No function modifies its input.  The same on a batch of
tensors, on any device: ``data/batched_operations.py``.

OpenCV keeps a thread pool of its own: a DataLoader worker should call ``cv2.setNumThreads(0)`` once.
"""

import cv2
import numpy as np

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL's mode L
# PIL truncates where OpenCV rounds: floor(x) = round(x - 1/2).  Just under 1/2, lest an exact integer lose one.
_TRUNCATE = -0.49


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend with black; ``factor`` >= 0, 0 is black and 1 the image (torchvision ``adjust_brightness``)."""
    return cv2.convertScaleAbs(image, alpha=factor, beta=_TRUNCATE)


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the mean grey level, rounded; ``factor`` >= 0, 1 is the image (torchvision ``adjust_contrast``)."""
    mean = int(np.dot(cv2.mean(image)[:3], LUMA) + 0.5)
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


def blur_kernel(sigma: float) -> np.ndarray:
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
    kernel = blur_kernel(sigma)
    return cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)


def solarise(image: np.ndarray, threshold: int = 128) -> np.ndarray:
    """Invert every value v >= ``threshold`` to 255 - v (PIL ``ImageOps.solarize``)."""
    if threshold == 128:  # every policy's: then it is the darker of the image and its negative, 6 times as fast
        return cv2.min(image, cv2.bitwise_not(image))
    values = np.arange(256, dtype=np.uint8)
    return cv2.LUT(image, np.where(values < threshold, values, 255 - values))
