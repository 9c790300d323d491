"""torchvision's labelled data sets by name, opened where the files are and downloaded where they are not."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from triptych.errors import UserError


@dataclass(frozen=True)
class TorchvisionSet:
    """How torchvision spells one data set."""

    class_name: str  # in torchvision.datasets
    about: str  # one line for `triptych list`
    splits: tuple[str, ...]  # the first is the training one and the default
    test: str | None = None  # the split to measure on
    split_argument: str | None = "split"  # "train" stands for train=True/False, None for a set without splits
    more: dict[str, Any] = field(default_factory=dict)  # further arguments of the class
    joined: dict[str, tuple[str, ...]] = field(default_factory=dict)  # splits that are several of torchvision's

    def arguments(self, split: str) -> dict[str, Any]:
        """Keyword arguments of the class that select this split."""
        if self.split_argument is None:
            return self.more
        return {self.split_argument: split == "train" if self.split_argument == "train" else split, **self.more}


_TRAIN_TEST = {"splits": ("train", "test"), "test": "test"}
_FLAG = {**_TRAIN_TEST, "split_argument": "train"}
_IMAGENETTE = {"splits": ("train", "val"), "test": "val"}
_STL10 = ("train", "test", "unlabeled", "train+unlabeled")
_COUNTRIES = "photographs by country, 211 classes"

SETS: dict[str, TorchvisionSet] = {
    "cifar10": TorchvisionSet("CIFAR10", "60 000 photographs of 32 x 32 pixels, 10 classes", **_FLAG),
    "cifar100": TorchvisionSet("CIFAR100", "60 000 photographs of 32 x 32 pixels, 100 classes", **_FLAG),
    "country211": TorchvisionSet("Country211", _COUNTRIES, ("train", "valid", "test"), "test"),
    "dtd": TorchvisionSet("DTD", "5 640 textures, 47 classes", ("train", "val", "test"), "test"),
    "eurosat": TorchvisionSet("EuroSAT", "27 000 satellite tiles, 10 land uses", ("all",), split_argument=None),
    "fashion-mnist": TorchvisionSet("FashionMNIST", "70 000 grey pictures of clothes, 10 classes", **_FLAG),
    "fgvc-aircraft": TorchvisionSet(
        "FGVCAircraft", "10 000 aircraft, 100 classes", ("trainval", "train", "val", "test"), "test"
    ),
    "flowers102": TorchvisionSet(  # transfer learns from the 2 040 of train and val, and is measured on 6 149
        "Flowers102",
        "8 189 flowers, 102 classes",
        ("trainval", "train", "val", "test"),
        "test",
        joined={"trainval": ("train", "val")},
    ),
    "food101": TorchvisionSet("Food101", "101 000 dishes, 101 classes", **_TRAIN_TEST),
    "gtsrb": TorchvisionSet("GTSRB", "39 270 German traffic signs, 43 classes", **_TRAIN_TEST),
    "imagenette": TorchvisionSet("Imagenette", "13 394 photographs of ImageNet, 10 easy classes", **_IMAGENETTE),
    "imagenette-160": TorchvisionSet(
        "Imagenette", "imagenette with a shorter side of 160 pixels", **_IMAGENETTE, more={"size": "160px"}
    ),
    "imagenette-320": TorchvisionSet(
        "Imagenette", "imagenette with a shorter side of 320 pixels", **_IMAGENETTE, more={"size": "320px"}
    ),
    "mnist": TorchvisionSet("MNIST", "70 000 grey handwritten digits, 10 classes", **_FLAG),
    "oxford-iiit-pet": TorchvisionSet("OxfordIIITPet", "7 349 cats and dogs, 37 breeds", ("trainval", "test"), "test"),
    "stl10": TorchvisionSet("STL10", "13 000 labelled and 100 000 unlabelled photographs, 10 classes", _STL10, "test"),
    "svhn": TorchvisionSet("SVHN", "99 289 house-number digits, 10 classes", ("train", "test", "extra"), "test"),
}


class TorchvisionStore:
    """The images of one opened set.  keys: file paths relative to the root, or SPLIT/NUMBER of sets in one big file."""

    def __init__(self, name: str, split: str, root: str | None) -> None:
        """Open or download.  name: one of SETS; split: one of its splits or "train"/"test"; root: default_root().

        Raises UserError for an unknown split, a failing download, incomplete files and a missing package.
        """
        split = split_of(name, SETS[name], split)
        folder = str(Path(root).expanduser()) if root else default_root()
        parts = [_opened(name, part, folder) for part in SETS[name].joined.get(split, (split,))]
        self._places = [(part, i) for part in parts for i in range(len(part))]
        self._files = [file for part in parts for file in _files(part)]
        self.keys: Sequence[str] = (
            [os.path.relpath(f, folder).replace(os.sep, "/") for f in self._files]
            if self._files
            else [f"{split}/{i:06d}" for i in range(len(self._places))]
        )
        self.labels = [label for part in parts for label in _labels(part)]
        self.classes = _classes(parts[0], self.labels)

    def image(self, position: int) -> Image.Image:
        """The picture as torchvision gives it: RGB, or L of the MNIST family."""
        part, index = self._places[position]
        return part[index][0]

    def encoded(self, position: int) -> bytes | None:
        """The image's file; None in sets whose images have no file of their own."""
        return Path(self._files[position]).read_bytes() if self._files else None

    def size(self, position: int) -> int:
        """Bytes of the file; 0 in sets whose images have no file of their own."""
        return Path(self._files[position]).stat().st_size if self._files else 0


def default_root() -> str:
    """Where downloaded sets lie: $TRIPTYCH_DATA or ~/.cache/triptych."""
    return str(Path(os.environ.get("TRIPTYCH_DATA") or "~/.cache/triptych").expanduser())


class Splits(Protocol):
    """What a data set must tell of its splits."""

    @property
    def splits(self) -> tuple[str, ...]: ...

    @property
    def test(self) -> str | None: ...


def split_of(name: str, known: Splits, split: str) -> str:
    """The set's own name of a split; "" and "train" are the training one, "test" the one to measure on."""
    if split in known.splits:
        return split
    if split in ("", "train"):
        return known.splits[0]
    if split == "test" and known.test:
        return known.test
    raise UserError(f"{name} has no split {split!r}; it has {', '.join(known.splits)}: write {name}:SPLIT")


def _opened(name: str, split: str, root: str) -> Any:
    """The torchvision data set, from the files where they are, else downloaded to root."""
    from torchvision import datasets  # seconds to import, so only here

    build, arguments = getattr(datasets, SETS[name].class_name), SETS[name].arguments(split)
    try:
        try:
            return build(root=root, download=False, **arguments)
        except RuntimeError:  # torchvision's word for files that are missing or fail their checksum
            Path(root).mkdir(parents=True, exist_ok=True)
            return build(root=root, download=True, **arguments)
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise UserError(f"{name} needs the package {package}: pip install {package}") from error
    except (OSError, RuntimeError, HTTPException) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{name} is not complete in {root} and could not be downloaded ({reason}); check the network connection, "
            f"or put the files there as torchvision.datasets.{SETS[name].class_name} lays them out, or name the folder "
            f"that has them: {name}@FOLDER; files of an interrupted download must be removed first"
        ) from error


def _files(data: Any) -> list[str]:
    """One path per image; empty for sets that keep all images in a few big files."""
    for attribute in ("_image_files", "_images", "_samples", "samples"):
        if hasattr(data, attribute):
            entries = getattr(data, attribute)
            return [str(entry[0] if isinstance(entry, tuple) else entry) for entry in entries]
    return []


def _labels(data: Any) -> list[int | None]:
    """One class index per image; None for the unlabelled ones, which torchvision marks -1."""
    for attribute in ("targets", "labels", "_labels"):
        if hasattr(data, attribute):
            labels = [int(label) for label in getattr(data, attribute)]
            break
    else:
        labels = [int(label) for _, label in data._samples]
    return [label if label >= 0 else None for label in labels]


def _classes(data: Any, labels: list[int | None]) -> tuple[str, ...] | None:
    """Class names; numbers where the set has no names, None where no image has a label."""
    known = [label for label in labels if label is not None]
    if not known:
        return None
    names = getattr(data, "classes", None) or [str(i) for i in range(max(known) + 1)]
    return tuple(name if isinstance(name, str) else name[0] for name in names)  # imagenette gives tuples of synonyms
