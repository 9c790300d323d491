"""Stanford Cars (Krause et al. 2013): 16 185 photographs of 196 models, in either of the two published layouts."""

from pathlib import Path
from typing import Any

import numpy as np

from triptych.data.stores import Files, exists
from triptych.errors import UserError


def stanford_cars(root: Path, split: str) -> tuple[Files, list[int], tuple[str, ...]]:
    """-> store, labels 0 .. 195 and class names of `split` (train or test), in the order of its file.

    root, or the folder stanford_cars in it, holds devkit/ with cars_train_annos.mat and cars_meta.mat, cars_train/,
    cars_test/ and, here or in devkit/, cars_test_annos_withlabels.mat; or else cars_annos.mat and car_ims/.  Labels are
    the field "class", which counts from 1; other readers have taken a corner of the box for it.  Raises UserError.
    """
    folder = root / "stanford_cars" if exists(root / "stanford_cars") else root
    if exists(folder / "devkit"):
        names = _read(folder / "devkit/cars_meta.mat", "class_names")
        file = folder / "devkit/cars_train_annos.mat"
        if split == "test":
            places = [folder / "cars_test_annos_withlabels.mat", folder / "devkit/cars_test_annos_withlabels.mat"]
            file = next(filter(exists, places), places[0])
        rows = _read(file, "annotations", "fname", "class")
        keys = [f"cars_{split}/{name}" for name in rows["fname"]]
    elif exists(file := folder / "cars_annos.mat"):
        names = _read(file, "class_names")
        rows = _read(file, "annotations", "relative_im_path", "class", "test")
        rows = rows[rows["test"] == (split == "test")]
        keys = [str(path) for path in rows["relative_im_path"]]
    else:
        raise UserError(f"{folder} has neither devkit/ nor cars_annos.mat: give the folder of Stanford Cars' files")
    labels = [int(number) - 1 for number in rows["class"]]
    if not labels or not 0 <= min(labels) <= max(labels) < len(names):
        raise UserError(f"{file} does not give each image one of the classes 1 to {len(names)}; download it again")
    if not exists(folder / keys[0]):
        raise UserError(f"{folder} lacks {keys[0]} of {file.name}: unpack the images there")
    return Files(folder, keys), labels, tuple(str(name) for name in names)


def _read(file: Path, variable: str, *fields: str) -> Any:
    """(N,) of a variable in a MATLAB file, with these fields."""
    from scipy.io import loadmat  # here, because it takes a while to import

    if not exists(file):
        raise UserError(f"{file} is missing: download all of Stanford Cars' files")
    try:
        found = np.atleast_1d(loadmat(file, squeeze_me=True)[variable])
    except Exception as error:  # of any kind: the parser meets the file's own bytes here
        raise UserError(f"{file} is damaged or not of Stanford Cars ({error}); download it again") from error
    if lacking := set(fields) - set(found.dtype.names or ()):
        raise UserError(f"{file} lacks the fields {', '.join(sorted(lacking))} of {variable}: is it another file?")
    return found
