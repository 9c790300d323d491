"""Images with boxes and instance masks in COCO's JSON format (Lin et al. 2014)."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from triptych.data.regions import Region
from triptych.data.segmented import check_size, upright_size
from triptych.data.stored import Stored
from triptych.data.subsets import digest
from triptych.data.tree import Tree
from triptych.errors import UserError


@dataclass(frozen=True)
class Boxes:
    """Annotated objects, in the order of the file."""

    xyxy: np.ndarray  # (n, 4) float32: left, top, right, bottom in pixels, as annotated: not clipped to the image
    labels: np.ndarray  # (n,) int64: position in classes
    crowd: np.ndarray  # (n,) bool: a group that was not told apart
    area: np.ndarray  # (n,) float32: pixels, as annotated; evaluators sort objects into small and large by it
    ids: np.ndarray  # (n,) int64: of annotations in the file

    def rows(self, rows: slice) -> "Boxes":
        arrays = self.xyxy, self.labels, self.crowd, self.area, self.ids
        return Boxes(*(array[rows].copy() for array in arrays))


class CocoSource:
    """An `Annotated` source of one JSON file; images are in the order of the file, those without objects too.

    classes are in the order of category ids.  regions(i)[k] is the mask of row k of boxes(i).  Boxes without width or
    height are left out with their masks.  Annotations are kept as arrays: workers share their memory.
    """

    def __init__(self, name: str, json_path: Path, tree: Tree, split: str) -> None:
        """split: the folder that images may lie in ("" = none).

        Raises UserError for a file of another form, images that are missing, categories or images that annotations
        name and the file does not, and an id given twice.
        """
        self.name, self.json_path = name, json_path
        data = _read(json_path)
        try:
            document = json.loads(data)
            images, categories = document["images"], sorted(document["categories"], key=lambda c: c["id"])
            of_image, of_category = _numbers(images, "images"), _numbers(categories, "categories")
            self.category_ids = tuple(of_category)  # in the file, by position in classes
            self.classes = tuple(str(category["name"]) for category in categories)
            self._image_ids = list(of_image)
            self._sizes = np.array([(image["height"], image["width"]) for image in images], np.int64)
            self._load(document["annotations"], of_image, of_category)
            names = [str(image["file_name"]) for image in images]
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            said = f"{type(error).__name__}: {error}"
            raise UserError(f"{json_path} is no COCO file (images, annotations, categories): {said}") from error
        self._images = Stored(name, tree, _find(tree, names, split, json_path), None, self.classes)
        self._json_digest = hashlib.blake2b(data).hexdigest()

    def _load(self, found: Sequence[Any], of_image: dict[int, int], of_category: dict[int, int]) -> None:
        if lost := [a["id"] for a in found if a["image_id"] not in of_image or a["category_id"] not in of_category]:
            raise ValueError(f"annotations {lost[:3]} are of images or categories that it does not list")
        _numbers(found, "annotations", may_be_none=True)
        if odd := [a["id"] for a in found if len(a["bbox"]) != 4 or not np.isfinite(a["bbox"]).all()]:
            raise ValueError(f"the boxes of annotations {odd[:3]} are not four finite numbers")
        kept = [a for a in found if a["bbox"][2] > 0 and a["bbox"][3] > 0]
        kept.sort(key=lambda a: of_image[a["image_id"]])  # stable: the order of the file within an image
        self.dropped = len(found) - len(kept)  # boxes without width or height
        boxes = np.array([a["bbox"] for a in kept], np.float64).reshape(-1, 4)
        self._objects = Boxes(
            np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1).astype(np.float32),
            np.array([of_category[a["category_id"]] for a in kept], np.int64),
            np.array([bool(a.get("iscrowd", 0)) for a in kept], bool),
            np.array([a.get("area", a["bbox"][2] * a["bbox"][3]) for a in kept], np.float32),
            np.array([a["id"] for a in kept], np.int64),
        )
        self._first = np.searchsorted([of_image[a["image_id"]] for a in kept], np.arange(len(of_image) + 1))
        # As text in one array: Python's lists of numbers would take several times the memory, in every worker anew.
        texts = [json.dumps(a.get("segmentation") or []).encode() for a in kept]
        self.without_mask = sum(text == b"[]" for text in texts)  # objects
        self.has_masks = bool(kept) and not self.without_mask  # all of them
        self._segmentations = np.frombuffer(b"".join(texts), np.uint8)
        self._ends = np.cumsum([0, *map(len, texts)])

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int) -> Image.Image:
        """Raises UserError where its size is not the file's."""
        image = self._images.image(index)
        self._check_size(index, image)
        return image

    def _check_size(self, index: int, image: Image.Image) -> None:
        """Of an image, of which the header is enough."""
        size, found = self.size(index), upright_size(image)
        if size != found:
            raise UserError(
                f"{self.key(index)} is {found[1]} x {found[0]} pixels, and {self.json_path.name} says {size[1]} x "
                f"{size[0]}: boxes would not fit; give the images that were annotated"
            )

    def label(self, index: int) -> None:
        return None

    def key(self, index: int) -> str:
        return self._images.key(index)

    def image_id(self, index: int) -> int:
        """Its id in the file."""
        return self._image_ids[index]

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) in pixels, as the file says."""
        height, width = self._sizes[index]
        return int(height), int(width)

    def boxes(self, index: int) -> Boxes:
        return self._objects.rows(slice(self._first[index], self._first[index + 1]))

    def regions(self, index: int) -> list[Region]:
        """Masks in the order of `boxes`, rasterised as COCO does.

        Raises UserError where objects have no masks or the image is not of the file's size, and UnreadableImage.
        """
        self.check_masks()
        self._check_size(index, self._images.header(index))
        rows, size, of = range(self._first[index], self._first[index + 1]), self.size(index), self._objects
        return [Region(self._mask(row, size), int(of.labels[row]), bool(of.crowd[row])) for row in rows]

    def check_masks(self) -> None:
        """Raises UserError unless all objects have masks."""
        if not len(self._objects.ids):
            raise UserError(f"{self.json_path} has no objects: give annotations with masks")
        if not self.has_masks:
            raise UserError(
                f"{self.without_mask} of {len(self._objects.ids)} objects of {self.json_path} have no mask (their "
                "segmentation is empty): use it for boxes alone, or give annotations with masks"
            )

    def _mask(self, row: int, size: tuple[int, int]) -> np.ndarray:
        """(H, W) bool."""
        text = self._segmentations[self._ends[row] : self._ends[row + 1]].tobytes()
        what = f"the mask of annotation {self._objects.ids[row]} of {self.json_path.name}"
        try:
            mask = rasterised(json.loads(text), size)
        except UserError:  # a ValueError, too
            raise
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise UserError(f"{what} is neither polygons nor run lengths ({type(error).__name__}: {error})") from error
        check_size("has, by the same file,", size, what, mask)
        return mask

    def fingerprint(self) -> str:
        """Of names and sizes (bytes) of images, and of the annotations."""
        return digest([self._images.fingerprint(), self._json_digest])


def _numbers(items: Sequence[Any], what: str, *, may_be_none: bool = False) -> dict[int, int]:
    """Position of each by its id."""
    of = {item["id"]: position for position, item in enumerate(items)}
    if (not items and not may_be_none) or len(of) < len(items):
        raise ValueError(f"an id is given to two {what}" if items else f"it has no {what}")
    return of


def rasterised(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool from polygons (x, y of corners in pixels), or run lengths, compressed or not.

    Raises UserError without the package that does it, and KeyError, TypeError, ValueError or RuntimeError for what is
    neither.
    """
    try:
        from faster_coco_eval.core import mask as rle
    except ImportError as error:
        raise UserError('masks of COCO files need another package: pip install "triptych[coco]"') from error
    if isinstance(segmentation, list):
        # Fewer than three corners enclose nothing, and four numbers would be taken as a box.
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
        if not polygons:
            return np.zeros(size, bool)
        coded = rle.merge(rle.frPyObjects(polygons, *size))  # pyright: ignore - a list, for a list
    elif isinstance(segmentation["counts"], list):
        coded = rle.frPyObjects(segmentation, *segmentation["size"])
    else:
        coded = {"size": segmentation["size"], "counts": segmentation["counts"].encode()}
    return np.ascontiguousarray(rle.decode(coded)).astype(bool)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; check its name") from error


def _find(tree: Tree, names: list[str], split: str, json_path: Path) -> list[int]:
    """Positions of images: in the folder SPLIT/, images/SPLIT/, at the top or in images/, all in the same one."""
    ends = [f"{split}/", f"images/{split}/"] if split else []
    folders = [start + end for end in [*ends, "", "images/"] for start in dict.fromkeys(["", tree.root])]
    best = max(folders, key=lambda folder: sum(folder + name in tree.positions for name in names))
    if missing := [name for name in names if best + name not in tree.positions]:
        looked = ", ".join(dict.fromkeys(f"{tree.path}/{folder}" for folder in folders))
        raise UserError(
            f"{len(missing)} of {len(names)} images of {json_path} are missing: {', '.join(missing[:3])}"
            f"{' ...' if len(missing) > 3 else ''}\nLooked in {looked}; say where they lie: coco:{json_path}@FOLDER"
        )
    return [tree.positions[best + name] for name in names]


# --- what lies in a folder ---


def coco_splits_of(tree: Tree) -> list[str]:
    """SPLIT of files instances_SPLIT.json; the training one first, and of years the last one first."""

    def order(split: str) -> tuple[bool, str, int]:
        name = split.rstrip("0123456789")
        return not split.startswith("train"), name, -int(split[len(name) :] or 0)

    return sorted(_files(tree), key=order)


def _files(tree: Tree) -> dict[str, str]:
    """Files instances_SPLIT.json at the top or in annotations/, by SPLIT."""
    found = {}
    for name in tree.texts():
        folder, _, file = name.rpartition("/")
        if folder in ("", "annotations") and file.startswith("instances_") and file.endswith(".json"):
            found[file.removeprefix("instances_").removesuffix(".json")] = name
    return found


def open_file(name: str, json_path: Path, images: Path) -> CocoSource:
    tree = Tree(images)
    tree.check_unique()
    return CocoSource(name, json_path, tree, json_path.stem.removeprefix("instances_"))


def open_split(name: str, tree: Tree, split: str) -> CocoSource:
    file = _files(tree)[split]
    path = tree.file(file)
    if path is None:
        raise UserError(f"{file} of {tree.path} lies in a zip file: unpack it beside the images, which may stay packed")
    return CocoSource(name, path, tree, split)
