"""COCO's format: boxes, polygons and run lengths, where the images lie, and mistakes in it."""

import builtins
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from written import in_folder, in_zip

from triptych.data.annotated import coco_splits, open_annotated, open_coco
from triptych.data.coco import rasterised
from triptych.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"

PIXELS = np.zeros((6, 8, 3), np.uint8)
SQUARE = [1, 1, 5, 1, 5, 4, 1, 4]  # x 1..4, y 1..3
SQUARE_MASK = np.zeros((6, 8), bool)
SQUARE_MASK[1:4, 1:5] = True


def runs(mask):
    """COCO's uncompressed run lengths: down the columns, zeros first."""
    counts, value = [0], False
    for pixel in mask.T.ravel():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


def compressed(mask):
    """The same counts as COCO writes them: from the third on as differences to the last but one, in signed groups of 5
    bits, lowest first, the sixth bit meaning that more follow, each plus 48."""
    counts, text = runs(mask)["counts"], ""
    for i, count in enumerate(counts):
        x = count - counts[i - 2] if i > 2 else count
        more = True
        while more:
            group = x & 31
            x >>= 5
            more = x != (-1 if group & 16 else 0)
            text += chr(48 + (group | 32 if more else group))
    return {"size": list(mask.shape), "counts": text}


def annotation(id_, image, category, **changes):
    about = {"id": id_, "image_id": image, "category_id": category, "bbox": [1, 1, 4, 3], "area": 12.5, "iscrowd": 0}
    return about | {"segmentation": [SQUARE]} | changes


def document(names=("b.png", "a.png"), annotations=(), **changes):
    """Images with the ids 70, 71 ...; categories cat (9) and dog (3)."""
    images = [{"id": 70 + i, "file_name": name, "height": 6, "width": 8} for i, name in enumerate(names)]
    categories = [{"id": 9, "name": "cat"}, {"id": 3, "name": "dog"}]
    return {"images": images, "categories": categories, "annotations": list(annotations)} | changes


def one(tmp_path, *annotations, **changes):
    """A source of one file with its images beside."""
    content = json.dumps(document(annotations=annotations, **changes))
    return open_coco(in_folder(tmp_path, {"instances_val.json": content, "a.png": PIXELS, "b.png": PIXELS}))


def test_objects_go_to_their_images_with_positions_for_category_ids(tmp_path):
    source = one(
        tmp_path,
        annotation(5, 71, 9, bbox=[0.5, 1.25, 2, 3], area=4.5),
        annotation(8, 71, 3, iscrowd=1, segmentation=runs(SQUARE_MASK)),
        annotation(2, 70, 9),
        annotation(6, 71, 9),
    )
    assert source.classes == ("dog", "cat"), "in the order of ids"
    assert source.category_ids == (3, 9)
    assert [source.key(i) for i in range(len(source))] == ["b.png", "a.png"], "in the order of the file"
    assert (source.image_id(1), source.size(1), source.label(1)) == (71, (6, 8), None)
    boxes = source.boxes(1)
    assert boxes.xyxy.tolist() == [[0.5, 1.25, 2.5, 4.25], [1, 1, 5, 4], [1, 1, 5, 4]]
    assert [boxes.labels.tolist(), boxes.crowd.tolist(), boxes.ids.tolist()] == [
        [1, 0, 1],
        [False, True, False],
        [5, 8, 6],
    ]
    assert boxes.area.tolist() == [4.5, 12.5, 12.5]
    assert [a.dtype for a in (boxes.xyxy, boxes.labels, boxes.crowd, boxes.area, boxes.ids)] == [
        "f4",
        "i8",
        "?",
        "f4",
        "i8",
    ]
    assert [(r.category, r.crowd) for r in source.regions(1)] == [(1, False), (0, True), (1, False)], "as the boxes"


def test_what_a_user_does_with_boxes_does_not_change_the_source(tmp_path):
    source = one(tmp_path, annotation(1, 70, 9))
    source.boxes(0).xyxy[:] = 0
    assert source.boxes(0).xyxy.any()


def test_images_without_objects_stay_and_boxes_without_size_go(tmp_path):
    flat = [annotation(i, 70, 9, bbox=box) for i, box in enumerate(([1, 1, 0, 3], [1, 1, 3, -1]))]
    source = one(tmp_path, *flat, annotation(9, 70, 3))
    assert (len(source), source.dropped) == (2, 2)
    assert source.boxes(0).ids.tolist() == [9]
    assert source.boxes(1).xyxy.shape == (0, 4)
    assert source.regions(1) == []
    assert len(source.regions(0)) == 1


@pytest.mark.parametrize(
    ("segmentation", "expected"),
    [
        ([SQUARE], SQUARE_MASK),
        (runs(SQUARE_MASK), SQUARE_MASK),
        (compressed(SQUARE_MASK), SQUARE_MASK),
        (
            [[0, 0, 2, 0, 2, 2, 0, 2], [4, 4, 8, 4, 8, 6, 4, 6]],
            np.kron([[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1]], np.ones((2, 2))),
        ),
        ([[0, 0, 3, 3], SQUARE], SQUARE_MASK),
        ([[0, 0, 3, 3]], np.zeros((6, 8))),
    ],
    ids=["polygon", "run lengths", "compressed", "two polygons", "with a line", "a line alone"],
)
def test_masks_are_what_their_coding_means(tmp_path, segmentation, expected):
    pytest.importorskip("faster_coco_eval")
    found = one(tmp_path, annotation(1, 70, 9, segmentation=segmentation)).regions(0)[0].mask
    assert found.dtype == bool
    np.testing.assert_array_equal(found, expected.astype(bool))


@pytest.mark.parametrize("seed", range(3))
def test_run_lengths_of_any_mask_come_back(seed):
    pytest.importorskip("faster_coco_eval")
    mask = np.random.default_rng(seed).random((70, 90)) < (0.5, 0.01, 0.999)[seed]
    for coding in (runs(mask), compressed(mask)):
        np.testing.assert_array_equal(rasterised(coding, (70, 90)), mask)


# --- where files lie ---


@pytest.mark.parametrize(
    ("json_name", "image_folder", "file_folder"),
    [
        ("instances_{}.json", "", ""),
        ("instances_{}.json", "images/", ""),
        ("annotations/instances_{}2017.json", "{}2017/", ""),
        ("annotations/instances_{}.json", "images/{}/", ""),
        ("instances_{}.json", "{}/", "{}/"),
        ("instances_{}.json", "images/{}/", "{}/"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_images_are_found_in_the_usual_folders(tmp_path, json_name, image_folder, file_folder, packed):
    files, images = {}, {}
    for number, split in enumerate(("train", "val")):
        names = [f"{file_folder.format(split)}{split}.png"]
        files[json_name.format(split)] = json.dumps(document(names, [annotation(number, 70, 3)]))
        images[f"{image_folder.format(split)}{split}.png"] = PIXELS + number
    in_folder(tmp_path, files | ({} if packed else images))
    if packed:
        in_zip(tmp_path / "images.zip", images)
    train, val = coco_splits(tmp_path)
    assert [np.asarray(s.image(0))[0, 0, 0] for s in (train, val)] == [0, 1]
    assert [s.boxes(0).ids.tolist() for s in (train, val)] == [[0], [1]]
    opened = (
        open_coco(tmp_path),
        open_coco(f"coco:val@{tmp_path}"),
        open_coco(tmp_path, "val"),
        open_annotated(tmp_path),
    )
    assert [s.fingerprint() for s in opened] == [s.fingerprint() for s in (train, val, val, val)]
    assert json.loads(val.json_path.read_text())["annotations"][0]["id"] == 1


def test_of_several_years_the_last_one_counts(tmp_path):
    files = {
        f"annotations/instances_{s}.json": json.dumps(document([f"{s}.png"]))
        for s in ("train2014", "val2014", "train2017", "val2017")
    }
    in_folder(tmp_path, files | {f"images/{s}.png": PIXELS for s in ("train2014", "val2014", "train2017", "val2017")})
    assert [s.key(0) for s in coco_splits(tmp_path)] == ["images/train2017.png", "images/val2017.png"]
    assert open_coco(f"coco:val2014@{tmp_path}").key(0) == "images/val2014.png"


def test_one_file_goes_with_any_folder_of_images(tmp_path):
    in_folder(tmp_path, {"x/my labels.json": json.dumps(document()), "y/a.png": PIXELS, "y/b.png": PIXELS})
    source = open_coco(f"coco:{tmp_path}/x/my labels.json@{tmp_path}/y")
    assert source.json_path == tmp_path / "x" / "my labels.json"
    assert len(open_coco(str(in_folder(tmp_path / "x", {"a.png": PIXELS, "b.png": PIXELS}) / "my labels.json"))) == 2
    with pytest.raises(UserError, match="one file and has no split 'val'"):
        open_coco(f"coco:{tmp_path}/x/my labels.json@{tmp_path}/y", "val")


def test_a_source_travels_to_workers(tmp_path):
    source = one(tmp_path, annotation(1, 70, 9, segmentation=runs(SQUARE_MASK)))
    other = pickle.loads(pickle.dumps(source))
    assert other.fingerprint() == source.fingerprint()
    np.testing.assert_array_equal(other.regions(0)[0].mask, source.regions(0)[0].mask)
    assert other.image(1).size == (8, 6)


def test_a_fingerprint_tells_annotations_and_images_apart(tmp_path):
    kinds = annotation(1, 70, 9), annotation(1, 70, 9, bbox=[1, 1, 4, 4]), annotation(1, 70, 3)
    made = [one(tmp_path / str(i), kind).fingerprint() for i, kind in enumerate(kinds)]
    assert one(tmp_path / "again", kinds[0]).fingerprint() == made[0]
    in_folder(tmp_path / "2", {"a.png": PIXELS + np.arange(8, dtype=np.uint8)[:, None]})
    assert len({*made, open_coco(tmp_path / "2").fingerprint()}) == 4


# --- mistakes ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"annotations": [annotation(4, 99, 9)]},
            r"annotations \[4\] are of images or categories that it does not list",
        ),
        ({"annotations": [annotation(4, 70, 1)]}, r"annotations \[4\] are of images or categories"),
        ({"annotations": [{"id": 4}]}, "KeyError: 'image_id'"),
        (
            {"annotations": [annotation(4, 70, 9, bbox=[1, 2])]},
            r"boxes of annotations \[4\] are not four finite numbers",
        ),
        (
            {"annotations": [annotation(4, 70, 9, bbox=[float("nan"), 2, 3, 4])]},
            r"annotations \[4\] are not four finite",
        ),
        ({"annotations": [annotation(4, 70, 9), annotation(4, 70, 3)]}, "an id is given to two annotations"),
        ({"images": []}, "it has no images"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "an id is given to two categories"),
        (
            {"images": [{"id": 1, "file_name": "c.png", "height": 6, "width": 8}]},
            r"1 of 1 images of .* are missing: c\.png\nLooked in",
        ),
        ({"images": None}, "no COCO file"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        one(tmp_path, **changes) if "annotations" not in changes else one(tmp_path, *changes["annotations"])


def test_what_is_no_json_or_not_there_is_said(tmp_path):
    in_folder(tmp_path, {"instances_val.json": "[", "a.png": PIXELS})
    with pytest.raises(UserError, match=r"instances_val\.json is no COCO file"):
        open_coco(tmp_path)
    with pytest.raises(UserError, match=r"cannot read .*nowhere\.json: No such file"):
        open_coco(f"coco:{tmp_path}/nowhere.json@{tmp_path}")
    with pytest.raises(UserError, match=r"no layout that is known; it must hold one of\n  coco: instances_SPLIT"):
        open_coco(in_folder(tmp_path / "x", {"a.png": PIXELS}))
    packed = in_zip(
        tmp_path / "z.zip", {"instances_val.json": json.dumps(document()), "a.png": PIXELS, "b.png": PIXELS}
    )
    with pytest.raises(UserError, match="lies in a zip file: unpack it"):
        open_coco(packed)


def test_an_image_of_another_size_is_refused(tmp_path):
    source = one(tmp_path)
    in_folder(tmp_path, {"a.png": PIXELS[:5]})
    with pytest.raises(UserError, match=r"a\.png is 8 x 5 pixels, and instances_val\.json says 8 x 6"):
        source.image(1)
    assert source.image(0).size == (8, 6)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [6, 8], "counts": [3, 4]}, "the mask of annotation 1 of instances_val.json is neither"),
        ({"size": [6, 8], "counts": "zz~~"}, "neither polygons nor run lengths"),
        ({"size": [6, 8]}, "neither polygons nor run lengths .KeyError"),
        ([["a", "b", "c", "d", "e", "f"]], "neither polygons nor run lengths"),
        (runs(SQUARE_MASK.T), "the mask of annotation 1 of .* is 6 x 8 pixels"),
    ],
)
def test_a_damaged_mask_is_named(tmp_path, segmentation, message):
    pytest.importorskip("faster_coco_eval")
    source = one(tmp_path, annotation(1, 70, 9, segmentation=segmentation), annotation(2, 71, 9))
    with pytest.raises(UserError, match=message):
        source.regions(0)
    assert len(source.regions(1)) == 1


def test_boxes_alone_are_not_taken_for_masks(tmp_path):
    source = one(tmp_path, annotation(1, 70, 9), annotation(2, 70, 9, segmentation=[]))
    assert not source.has_masks
    assert len(source.boxes(0).ids) == 2
    with pytest.raises(UserError, match=r"1 of 2 objects of .* have no mask .*: use it for boxes alone"):
        source.regions(0)
    with pytest.raises(UserError, match="use it for boxes alone"):
        open_annotated(tmp_path)


def test_splits_of_other_categories_are_refused(tmp_path):
    one(tmp_path)
    in_folder(tmp_path, {"instances_train.json": json.dumps(document(categories=[{"id": 1, "name": "cow"}]))})
    with pytest.raises(UserError, match="have other categories"):
        coco_splits(tmp_path)


def test_the_package_for_masks_is_asked_for_by_name(tmp_path, monkeypatch):
    source, real = one(tmp_path, annotation(1, 70, 9)), builtins.__import__

    def without(name, *args):
        if name.startswith("faster_coco_eval"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"^masks of COCO files need .*: pip install \"triptych\[coco\]\"$"):
        source.regions(0)
    assert len(source.boxes(0).ids) == 1, "boxes need none"


# --- photographs ---


@pytest.mark.skipif(not SHARED.exists(), reason=f"{SHARED} is not on this machine")
def test_coco_mini_is_as_its_card_says():
    train, val = coco_splits(SHARED / "coco_mini")
    assert (len(train), len(val), len(train.classes), train.has_masks) == (121, 106, 80, True)
    counts = [sum(len(s.boxes(i).ids) for i in range(len(s))) for s in (train, val)]
    assert (*counts, train.dropped, val.dropped) == (1216, 1072, 0, 0)
    assert sum(s.boxes(i).crowd.sum() for s in (train, val) for i in range(len(s))) == 27
    assert sum(len(train.boxes(i).ids) == 0 for i in range(len(train))) == 2
    assert [len({c for i in range(len(s)) for c in s.boxes(i).labels}) for s in (train, val)] == [76, 74]
    assert train.image(0).size[::-1] == train.size(0)


@pytest.mark.skipif(not SHARED.exists(), reason=f"{SHARED} is not on this machine")
def test_masks_of_coco_mini_are_as_large_as_its_file_says_and_lie_in_their_boxes():
    pytest.importorskip("faster_coco_eval")
    source = open_coco(SHARED / "coco_mini", "val")
    ratios = []
    for i in range(0, len(source), 8):
        boxes = source.boxes(i)
        for k, region in enumerate(source.regions(i)):
            y, x = np.nonzero(region.mask)
            assert region.category == boxes.labels[k]
            left, top, right, bottom = boxes.xyxy[k]
            assert left - 1 <= x.min() <= x.max() <= right + 1
            assert top - 1 <= y.min() <= y.max() <= bottom + 1
            if boxes.area[k] >= 400 and not region.crowd:  # the rim of small ones counts for more
                ratios.append(region.mask.sum() / boxes.area[k])
    assert len(ratios) > 40
    assert 0.95 < np.percentile(ratios, 1) < np.percentile(ratios, 99) < 1.04


@pytest.mark.skipif(not SHARED.exists(), reason=f"{SHARED} is not on this machine")
def test_bccd_has_boxes_alone():
    train, val = coco_splits(SHARED / "bccd")
    test = open_coco(f"coco:test@{SHARED / 'bccd'}")
    found = [(len(s), sum(len(s.boxes(i).ids) for i in range(len(s)))) for s in (train, val, test)]
    assert found == [(205, 2804), (87, 1137), (72, 945)]
    assert train.classes == ("RBC", "WBC", "Platelets")
    assert not train.has_masks
    with pytest.raises(UserError, match="2804 of 2804 objects"):
        train.regions(0)


def test_masks_of_an_image_that_is_not_of_the_files_size_are_refused_without_decoding_it(tmp_path):
    source = one(tmp_path, annotation(4, 70, 9), images=[{"id": 70, "file_name": "b.png", "height": 8, "width": 6}])
    with pytest.raises(UserError, match=r"b\.png is 8 x 6 pixels, and .* says 6 x 8"):
        source.regions(0)
