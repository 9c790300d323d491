"""Views per second of one core: ours against torchvision's transforms on PIL images, the way DINO was released.

    python benchmarks/data_path.py --data ../shared/data/bccd/images.zip

All read the same JPEG files and make two crops of 224 and ten of 96 pixels with DINO's colours; ours gives uint8 with
boxes, the reference normalised floats.  Where the device changes the colours, workers and device are measured apart.
"""

import argparse
import os
import tempfile
from pathlib import Path

import cv2
import numpy as np
import torch
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

from timing import Ratio, report, rounds_of
from triptych.data.loader import ViewDataset, ViewsConfig, collate
from triptych.data.pixels import Picture
from triptych.data.shrunk import shrunk
from triptych.data.sources import Source, load_rgb, open_source
from triptych.data.subsets import Subset
from triptych.data.views import ViewSpec


def reference(config: ViewsConfig):
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

    first, second = recipe(224, config.global_scale, 1.0, 0.0), recipe(224, config.global_scale, 0.1, 0.2)
    local = recipe(96, config.local_scale, 0.5, 0.0)
    return lambda image: [first(image), second(image), *(local(image) for _ in range(config.local_crops))]


def chosen(data: str, count: int) -> Source:
    """`count` JPEG files, spread over the source."""
    source = open_source(data)
    jpegs = [i for i in range(len(source)) if source.key(i).lower().endswith((".jpg", ".jpeg"))]
    return Subset(source, jpegs[:: max(1, len(jpegs) // count)][:count], "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--local-crops", type=int, default=10)
    parser.add_argument("--cache-side", type=int, default=256)
    parser.add_argument("--name", default="data-path", help="of the file in results/")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    source, device = chosen(options.data, options.images), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = ViewsConfig(global_scale=(0.4, 1.0), local_scale=(0.05, 0.4), local_crops=options.local_crops)
    spec, indices, theirs = ViewSpec(), range(len(source)), reference(config)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRIPTYCH_CACHE"] = folder
        small = shrunk(source, options.cache_side, workers=0)
        ours, cached = ViewDataset(source, config, spec, 16, 0), ViewDataset(small, config, spec, 16, 0)
        left = ViewDataset(source, config, spec, 16, 0, colour_on_device=True)
        cached_left = ViewDataset(small, config, spec, 16, 0, colour_on_device=True)
        views, _ = collate([left[0, i] for i in indices])
        moved = views.map(lambda x: x.to(device))
        first = "torchvision v1 on PIL images"
        rows = {
            first: lambda: [theirs(load_rgb(source, i)) for i in indices],
            "all on the CPU": lambda: [ours[0, i] for i in indices],
            "workers, where the device changes colours": lambda: [left[0, i] for i in indices],
            f"the device ({device.type}), in a batch of {len(views)}": lambda: moved.coloured(views),
            f"all on the CPU, cache of {options.cache_side} px": lambda: [cached[0, i] for i in indices],
            f"workers, colours on the device, cache of {options.cache_side} px": lambda: [
                cached_left[0, i] for i in indices
            ],
            "decoding alone": lambda: [Picture(source, i).pixels() for i in indices],
            "decoding alone, PIL": lambda: [np.asarray(load_rgb(source, i)) for i in indices],
        }
        # Seconds of the process, which neighbours on a shared machine disturb less; a GPU's do not show there.
        clock = "wall" if device.type == "cuda" else "cpu"
        seconds = rounds_of(rows, options.rounds, clock)
    table = [
        "| path | ms per image (least) | times the reference: median [least, most] of the rounds |",
        "|---|---|---|",
    ]
    lines = []
    for name, each in seconds.items():
        ms, ratio = 1e3 * min(each) / len(source), Ratio.of(seconds[first], each)
        table.append(f"| {name} | {ms:.2f} | {ratio} |")
        lines.append({"row": name, "ms_per_image": ms, "ratio": ratio.median, "least": ratio.low, "most": ratio.high})
    sizes = sorted({load_rgb(source, i).size for i in indices})
    title = f"Data path, 2 x 224 + {options.local_crops} x 96 crops, one thread, {Path(options.data).parent.name}"
    command = (
        f"python benchmarks/data_path.py --data {options.data} --images {options.images} --rounds {options.rounds} "
        f"--local-crops {options.local_crops} --cache-side {options.cache_side}"
    )
    report(options.name, title, command, table, lines, {"clock": clock, "sizes": [f"{w}x{h}" for w, h in sizes[:5]]})


if __name__ == "__main__":
    main()
