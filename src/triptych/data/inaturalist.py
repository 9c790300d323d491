"""iNaturalist 2018 and 2019 (Van Horn et al. 2018) as their competitions lay them out: 8 142 and 1 010 species."""

import json
from pathlib import Path
from typing import Any

from triptych.data.stores import Files, exists
from triptych.errors import UserError


def inaturalist(year: int, root: Path, split: str) -> tuple[Files, list[int], tuple[str, ...]]:
    """-> store, labels and class names of `split` (train or val), in the order of its file.

    root holds train{year}.json, val{year}.json, the folder train_val{year}/ and, for names of the species,
    categories.json: the annotations of 2018 call them by numbers.  A label is the position of the category's id among
    all ids in order.  Raises UserError for files that are missing or of another form.
    """
    named = file = root / f"{split}{year}.json"
    about = _read(file)
    try:
        ids = sorted(category["id"] for category in about["categories"])
        number = {id_: label for label, id_ in enumerate(ids)}
        of_image = {a["image_id"]: number[a["category_id"]] for a in about["annotations"]}
        keys = [image["file_name"] for image in about["images"]]
        labels = [of_image[image["id"]] for image in about["images"]]
        names = {category["id"]: str(category["name"]) for category in about["categories"]}
        if exists(root / "categories.json"):
            named = root / "categories.json"
            names |= {category["id"]: str(category["name"]) for category in _read(named)}
    except (KeyError, TypeError) as error:
        said = f"{type(error).__name__}: {error}"
        raise UserError(f"{named} is not of iNaturalist's form ({said}); download it again") from error
    if not keys or not exists(root / keys[0]):
        what = keys[0] if keys else "every image"
        raise UserError(f"{root} lacks {what} of {file.name}; unpack train_val{year}.tar.gz there")
    return Files(root, keys), labels, tuple(names[id_] for id_ in ids)


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing: give the folder that the competition's files were unpacked in") from error
    except ValueError as error:
        raise UserError(f"{file} is no JSON ({error}); download it again") from error
