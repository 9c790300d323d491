"""Views per second of one core: ours against torchvision's transforms on PIL images, the way DINO was released.

    python benchmarks/data_path.py --data ../shared/data/imagenette128/train.zip

Both read and decode the same files and make 2 x 224 + 8 x 96 crops with DINO's colours; ours returns uint8 with boxes,
the reference normalised floats.
"""

import argparse

import cv2
import numpy as np
import torch
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

from timing import interleaved, report
from triptych.data.loader import ViewDataset, ViewsConfig
from triptych.data.sources import load_rgb, open_source
from triptych.data.views import ViewSpec


def reference(global_scale: tuple[float, float], local_scale: tuple[float, float]):
    """DINO's three recipes out of torchvision's parts."""
    from PIL import ImageFilter, ImageOps

    def blur(p: float):
        def apply(image):
            return (
                image.filter(ImageFilter.GaussianBlur(np.random.uniform(0.1, 2.0))) if np.random.rand() < p else image
            )

        return apply

    jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
    finish = T.Compose([T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])

    def recipe(size: int, scale: tuple[float, float], p_blur: float, p_solarise: float):
        crop = T.RandomResizedCrop(size, scale=scale, interpolation=InterpolationMode.BICUBIC)
        steps = [crop, T.RandomHorizontalFlip(), jitter, T.RandomGrayscale(0.2), blur(p_blur)]
        if p_solarise:
            steps.append(T.RandomApply([ImageOps.solarize], p=p_solarise))
        return T.Compose([*steps, finish])

    first, second = recipe(224, global_scale, 1.0, 0.0), recipe(224, global_scale, 0.1, 0.2)
    local = recipe(96, local_scale, 0.5, 0.0)
    return lambda image: [first(image), second(image), *(local(image) for _ in range(8))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="scenes:64")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    source = open_source(options.data)
    config = ViewsConfig(global_scale=(0.4, 1.0), local_scale=(0.05, 0.4), local_crops=8)
    dataset = ViewDataset(source, config, ViewSpec(), patch_size=16, seed=0)
    theirs, indices = reference(config.global_scale, config.local_scale), range(min(options.images, len(source)))
    seconds = interleaved(
        {
            "ours": lambda: [dataset[0, i] for i in indices],
            "torchvision on PIL": lambda: [theirs(load_rgb(source, i)) for i in indices],
            "decode alone": lambda: [load_rgb(source, i) for i in indices],
        },
        options.rounds,
    )
    table = ["| path | images/s of one core | ratio |", "|---|---|---|"]
    for name, value in seconds.items():
        table.append(f"| {name} | {len(indices) / value:.1f} | {seconds['torchvision on PIL'] / value:.2f} |")
    command = (
        f"python benchmarks/data_path.py --data {options.data} --images {options.images} --rounds {options.rounds}"
    )
    report("data-path", "Data path, 2 x 224 + 8 x 96 crops, one thread", command, table)


if __name__ == "__main__":
    main()
