"""A small set in COCO's form, drawn here: rectangles of two classes on grey, with their masks."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from triptych.data.coco import CocoSource, open_file

COLOURS = {1: (200, 40, 40), 5: (40, 40, 200)}  # by category id
NAMES = {1: "red", 5: "blue"}


def draw_coco(
    folder: Path,
    split: str = "train",
    count: int = 4,
    *,
    side: tuple[int, int] = (48, 64),  # height, width in pixels
    seed: int = 0,
    masks: bool = True,
    empty: int | None = None,  # position of an image without objects
) -> CocoSource:
    """instances_SPLIT.json and SPLIT/0.png ... with two rectangles each, of 12 to 30 px, one of each class."""
    rng, annotations = np.random.default_rng(seed), []
    (folder / split).mkdir(parents=True)
    for i in range(count):
        pixels = np.full((*side, 3), 128, np.uint8)
        for category in COLOURS if i != empty else ():
            w, h = (int(n) for n in rng.integers(12, min(side) // 2 + 6, 2))
            x, y = int(rng.integers(side[1] - w)), int(rng.integers(side[0] - h))
            pixels[y : y + h, x : x + w] = COLOURS[category]
            corners = [[x, y, x + w, y, x + w, y + h, x, y + h]] if masks else []
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 10 + i,
                    "category_id": category,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": corners,
                }
            )
        Image.fromarray(pixels).save(folder / split / f"{i}.png")
    height, width = side
    images = [{"id": 10 + i, "file_name": f"{i}.png", "height": height, "width": width} for i in range(count)]
    categories = [{"id": c, "name": name} for c, name in NAMES.items()]
    file = folder / f"instances_{split}.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return open_file(str(file), file, folder)
