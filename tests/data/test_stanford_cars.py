"""stanford-cars@ROOT: the development kit, and the older single file."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from triptych.data.sources import open_source, splits
from triptych.errors import UserError

NAMES = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "smart fortwo Convertible 2012"]
BOX = (30, 52, 246, 147)  # no class at all, whichever corner one takes
TRAIN, TEST = [("00001.jpg", 3), ("00002.jpg", 1), ("00003.jpg", 3)], [("00001.jpg", 2), ("00002.jpg", 3)]


def rows(fields: list[str], values: list[tuple]) -> np.ndarray:
    """A MATLAB struct array of 1 x N."""
    out = np.empty((1, len(values)), dtype=[(field, object) for field in fields])
    for i, value in enumerate(values):
        out[0, i] = value
    return out


def cells(names: list[str]) -> np.ndarray:
    out = np.empty((1, len(names)), dtype=object)
    out[0] = names
    return out


def pictures(root: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (10 * number, 0, 0)).save(root / name, quality=100)


BOXES = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2"]


def devkit(root: Path, where: str) -> None:
    (root / "devkit").mkdir(parents=True)
    fields = [*BOXES, "class", "fname"]
    savemat(root / "devkit/cars_meta.mat", {"class_names": cells(NAMES)})
    savemat(root / "devkit/cars_train_annos.mat", {"annotations": rows(fields, [(*BOX, c, f) for f, c in TRAIN])})
    unlabelled = rows([*BOXES, "fname"], [(*BOX, f) for f, _ in TEST])
    savemat(root / "devkit/cars_test_annos.mat", {"annotations": unlabelled})
    labelled = rows(fields, [(*BOX, c, f) for f, c in TEST])
    savemat(root / where / "cars_test_annos_withlabels.mat", {"annotations": labelled})
    pictures(root, [f"cars_train/{f}" for f, _ in TRAIN] + [f"cars_test/{f}" for f, _ in TEST])


def single_file(root: Path) -> None:
    files = [f"car_ims/{i:06d}.jpg" for i in range(1, 6)]
    values = [(files[i], *BOX, c, int(i >= 3)) for i, (_, c) in enumerate([*TRAIN, *TEST])]
    annotations = rows(["relative_im_path", *BOXES, "class", "test"], values)
    savemat(root / "cars_annos.mat", {"annotations": annotations, "class_names": cells(NAMES)})
    pictures(root, files)


@pytest.mark.parametrize("layout", ["kit", "kit in its folder", "single file"])
def test_either_layout_gives_the_class_and_not_a_corner_of_the_box(layout, tmp_path):
    if layout == "single file":
        single_file(tmp_path)
    else:
        inside = "folder" in layout
        devkit(tmp_path / "stanford_cars" if inside else tmp_path, "." if inside else "devkit")
    pair = splits(f"stanford-cars@{tmp_path}")
    assert pair is not None
    for source, expected, first in zip(pair, (TRAIN, TEST), (0, 3), strict=True):
        assert source.classes == tuple(NAMES)
        assert [source.label(i) for i in range(len(source))] == [c - 1 for _, c in expected]
        shades = [np.asarray(source.image(i))[0, 0, 0] for i in range(len(source))]
        assert shades == [10 * (first + i) for i in range(len(source))]
    assert open_source(f"stanford-cars@{tmp_path}").fingerprint() == pair[0].fingerprint()
    assert pickle.loads(pickle.dumps(pair[1])).fingerprint() == pair[1].fingerprint()


def test_the_kit_is_read_as_torchvision_reads_it(tmp_path):
    from torchvision.datasets import StanfordCars

    devkit(tmp_path / "stanford_cars", ".")
    for part in ("train", "test"):
        theirs, ours = StanfordCars(tmp_path, part), open_source(f"stanford-cars:{part}@{tmp_path}")
        paths = [str(tmp_path / "stanford_cars" / ours.key(i)) for i in range(len(ours))]
        assert theirs._samples == [(path, ours.label(i)) for i, path in enumerate(paths)]
        assert tuple(theirs.classes) == ours.classes


def test_missing_files_and_files_without_classes_are_named(tmp_path):
    spec = f"stanford-cars@{tmp_path}"
    with pytest.raises(UserError, match=r"neither devkit/ nor cars_annos\.mat"):
        open_source(spec)
    devkit(tmp_path, ".")
    labelled = tmp_path / "cars_test_annos_withlabels.mat"
    (tmp_path / "devkit/cars_test_annos.mat").replace(labelled)
    with pytest.raises(UserError, match=r"withlabels\.mat lacks the fields class"):
        open_source(spec, split="test")
    labelled.unlink()
    with pytest.raises(UserError, match=r"cars_test_annos_withlabels\.mat is missing"):
        open_source(spec, split="test")
    (tmp_path / "cars_train/00001.jpg").unlink()
    with pytest.raises(UserError, match=r"lacks cars_train/00001\.jpg"):
        open_source(spec)
    savemat(tmp_path / "devkit/cars_meta.mat", {"class_names": cells(NAMES[:2])})
    with pytest.raises(UserError, match="one of the classes 1 to 2"):
        open_source(spec)
    (tmp_path / "devkit/cars_meta.mat").write_text("no MATLAB file")
    with pytest.raises(UserError, match=r"cars_meta\.mat is damaged"):
        open_source(spec)
