"""inat18@ROOT and inat19@ROOT: the competitions' annotation files."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from triptych.data.images import UnreadableImage
from triptych.data.sources import open_source, splits
from triptych.errors import UserError

SPECIES = {17: "Lynx lynx", 4: "Bubo bubo", 900: "Poa annua"}  # ids with gaps, in no order


def annotations(root: Path, year: int, split: str, images: list[tuple[int, int]]) -> None:
    """A file as of the competition, with (image id, category id) in this order; names of categories are numbers."""
    files = [f"train_val{year}/Kingdom/{category}/{image:03d}.jpg" for image, category in images]
    for (image, _), file in zip(images, files, strict=True):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (image, 0, 0)).save(root / file, quality=100)
    about = {
        "info": {"year": year},
        "images": [{"id": i, "file_name": f, "height": 8} for (i, _), f in zip(images, files, strict=True)],
        "categories": [{"id": id_, "name": str(id_), "supercategory": "x"} for id_ in SPECIES],
        # in another order than the images, and with ids of their own
        "annotations": [{"id": 90 - i, "image_id": i, "category_id": c} for i, c in reversed(images)],
    }
    (root / f"{split}{year}.json").write_text(json.dumps(about))


@pytest.fixture(params=[2018, 2019])
def inat(request, tmp_path) -> tuple[str, Path]:
    annotations(tmp_path, request.param, "train", [(30, 900), (10, 17), (20, 4), (40, 17)])
    annotations(tmp_path, request.param, "val", [(50, 17), (60, 900)])
    (tmp_path / "categories.json").write_text(json.dumps([{"id": i, "name": n} for i, n in SPECIES.items()]))
    return f"inat{request.param % 100}@{tmp_path}", tmp_path


def test_labels_count_the_category_ids_in_order_and_names_are_those_of_the_species(inat):
    spec, _ = inat
    source = open_source(spec)
    assert source.classes == ("Bubo bubo", "Lynx lynx", "Poa annua")
    assert [source.label(i) for i in range(len(source))] == [2, 1, 0, 1]
    assert source.key(0).endswith("/Kingdom/900/030.jpg")
    assert [np.asarray(source.image(i))[0, 0, 0] // 10 for i in range(4)] == [3, 1, 2, 4]
    again = pickle.loads(pickle.dumps(source))
    assert again.fingerprint() == source.fingerprint()


def test_the_part_to_measure_on_is_val_under_either_name(inat):
    spec, root = inat
    pair = splits(spec)
    assert pair is not None
    train, test = pair
    assert (len(train), [test.label(i) for i in range(len(test))]) == (4, [1, 2])
    assert train.classes == test.classes
    name = spec.partition("@")[0]
    assert open_source(f"{name}:val@{root}").fingerprint() == test.fingerprint() != train.fingerprint()
    assert splits(f"{name}:val@{root}") is None
    with pytest.raises(UserError, match=f"{name} has no split 'test2018'; it has train, val"):
        open_source(f"{name}:test2018@{root}")


def test_without_categories_the_names_are_those_of_the_annotations(inat):
    spec, root = inat
    (root / "categories.json").unlink()
    assert open_source(spec).classes == ("4", "17", "900")


def test_missing_and_damaged_files_are_named(inat):
    spec, root = inat
    name, year = spec.partition("@")[0], 2000 + int(spec[4:6])
    with pytest.raises(UserError, match=f"say where its files lie: {name}@FOLDER"):
        open_source(name)
    with pytest.raises(UserError, match=rf"nowhere/train{year}\.json is missing"):
        open_source(f"{name}@{root}/nowhere")
    (root / f"train_val{year}/Kingdom/4/020.jpg").unlink()
    with pytest.raises(UnreadableImage, match=r"020\.jpg: No such file"):  # one of many: met when it is read
        open_source(spec).image(2)
    (root / f"train_val{year}").rename(root / "elsewhere")
    with pytest.raises(UserError, match=rf"lacks train_val{year}/Kingdom/900/030\.jpg .*unpack"):
        open_source(spec)
    (root / "elsewhere").rename(root / f"train_val{year}")
    (root / "categories.json").write_text('{"names": []}')
    with pytest.raises(UserError, match=r"categories\.json is not of iNaturalist's form"):
        open_source(spec)
    (root / f"train{year}.json").write_text('{"images": []}')
    with pytest.raises(UserError, match=rf"train{year}\.json is not of iNaturalist's form \(KeyError: 'categories'\)"):
        open_source(spec)
    (root / f"train{year}.json").write_text("{")
    with pytest.raises(UserError, match=rf"train{year}\.json is no JSON"):
        open_source(spec)


def test_an_image_without_annotation_is_an_error(inat):
    spec, root = inat
    file = root / f"val20{spec[4:6]}.json"
    about = json.loads(file.read_text())
    about["annotations"].pop()
    file.write_text(json.dumps(about))
    with pytest.raises(UserError, match="not of iNaturalist's form"):
        splits(spec)
