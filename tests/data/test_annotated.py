"""Images with index masks: the layouts of published sets, and mistakes in them."""

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from written import in_folder, in_zip

from triptych.data.annotated import ANNOTATED, IGNORE, open_annotated, open_segmented, segmented_splits
from triptych.data.images import UnreadableImage
from triptych.data.segmented_classes import CITYSCAPES
from triptych.data.sources import load_rgb
from triptych.errors import UserError

CAMVID = Path(__file__).parents[3] / "shared" / "data" / "camvid"

RGB = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def mask(*rows):
    """(4, 6) uint8: each value is the first pixel of its row; the others are the first one."""
    found = np.full((4, 6), rows[0], np.uint8)
    found[: len(rows), 0] = rows
    return found


def palette(values):
    image = Image.fromarray(values)
    image.putpalette(list(range(256)) * 3)  # its mode is P from now on
    return image


# --- every layout, wherever it lies ---

CLASSIC = {
    **{f"{s}/0001TP_0{i}.png": RGB for s, i in (("train", 1), ("train", 2), ("val", 3), ("test", 4))},
    **{f"{s}annot/0001TP_0{i}.png": mask(3, 11, 10) for s, i in (("train", 1), ("train", 2), ("val", 3), ("test", 4))},
    "train.txt": "/SegNet/CamVid/train/0001TP_01.png /SegNet/CamVid/trainannot/0001TP_01.png\n",
}
VOC = {
    **{f"JPEGImages/2007_00{i}.jpg": RGB for i in range(5)},
    **{f"SegmentationClass/2007_00{i}.png": palette(mask(0, 20, 255)) for i in (0, 1, 2)},
    **{f"SegmentationClassAug/2007_00{i}.png": mask(15) for i in (0, 3, 4)},
    "ImageSets/Segmentation/train.txt": "2007_000\n",
    "ImageSets/Segmentation/aug.txt": "2007_003\n2007_000\n2007_004\n",
    "ImageSets/Segmentation/val.txt": "2007_001\n2007_002\n",
    "Annotations/2007_000.xml": "<annotation/>",
}
ADE = {
    **{f"images/{s}/ADE_{i}.jpg": RGB for s, i in (("training", 1), ("training", 2), ("validation", 3))},
    **{
        f"annotations/{s}/ADE_{i}.png": mask(1, 150, 0)
        for s, i in (("training", 1), ("training", 2), ("validation", 3))
    },
    "objectInfo150.txt": "Idx\tRatio\tTrain\tVal\tName\n"
    + "".join(f"{i}\t0.1\t9\t9\t{'building, edifice' if i == 2 else f'thing {i}'}\n" for i in range(1, 151)),
}
CITY = {
    **{f"leftImg8bit/{s}/ulm/ulm_{i}_leftImg8bit.png": RGB for s, i in (("train", 1), ("train", 2), ("val", 3))},
    **{
        f"gtFine/{s}/ulm/ulm_{i}_gtFine_labelTrainIds.png": mask(18, 0, 255)
        for s, i in (("train", 1), ("train", 2), ("val", 3))
    },
    "gtFine/val/ulm/ulm_3_gtFine_color.png": RGB,
    "gtFine/val/ulm/ulm_3_gtFine_labelIds.png": mask(33),
}
MASKS = {
    **{f"images/{s}/{i}.png": RGB for s, i in (("train", "a"), ("train", "sub/b"), ("val", "c"))},
    **{f"masks/{s}/{i}.png": mask(0, 2, 255) for s, i in (("train", "a"), ("train", "sub/b"), ("val", "c"))},
    "classes.json": '["sky", "road", "car"]',
}
# kind: files, number of classes, (train, val), values of the first training mask
KINDS = {
    "camvid": (CLASSIC, 11, (2, 1), {3, 10, IGNORE}),
    "voc": (VOC, 21, (3, 2), {0, 20, IGNORE}),
    "ade20k": (ADE, 150, (2, 1), {0, 149, IGNORE}),
    "cityscapes": (CITY, 19, (2, 1), {18, 0, IGNORE}),
    "masks": (MASKS, 3, (2, 1), {0, 2, IGNORE}),
}
PLACES = {
    "folder": in_folder,
    "folder in a folder": lambda path, files: in_folder(path / "a" / "b", files) and path,
    "zip": lambda path, files: in_zip(path / "set.zip", files),
    "folder with a zip": lambda path, files: in_zip(path / "set.zip", files) and path,
    "folder in a zip": lambda path, files: in_zip(path / "set.zip", files, "ADEChallengeData2016/"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layout_is_recognised_and_read_wherever_it_lies(tmp_path, kind, place):
    files, classes, lengths, values = KINDS[kind]
    path = PLACES[place](tmp_path, files)
    pair = segmented_splits(path)
    assert tuple(map(len, pair)) == lengths
    for spec in (path, f"{kind}@{path}", f"{kind.upper()}@{path}"):
        assert open_segmented(spec).fingerprint() == pair[0].fingerprint(), "None is the part to train on"
    assert open_segmented(f"{kind}:val@{path}").fingerprint() == pair[1].fingerprint()
    assert open_annotated(path).fingerprint() == pair[1].fingerprint(), "regions are for measuring"
    train = pickle.loads(pickle.dumps(pair[0]))
    assert len(train.classes) == classes
    found = train.mask(0)
    assert (found.dtype, found.shape, set(np.unique(found).tolist())) == (np.uint8, (4, 6), values)
    assert load_rgb(train, 0).size == (6, 4)
    regions = train.regions(0)
    assert [r.category for r in regions] == sorted(values - {IGNORE})
    assert all((r.mask == (found == r.category)).all() and not r.crowd for r in regions)
    assert train.label(0) is None


def test_an_image_keeps_its_own_mask(tmp_path):
    """Pairs go by name, not by order: every image and every mask says the same number."""
    names = [f"{i}.x" for i in (10, 9, 1, 100)]
    files = {f"images/{n}.jpg": np.full((4, 6, 3), i, np.uint8) for i, n in enumerate(names)}
    files |= {f"masks/{n}.png": mask(i) for i, n in enumerate(names)} | {"classes.json": '["a", "b", "c", "d"]'}
    for path in (in_folder(tmp_path / "f", files), in_zip(tmp_path / "z.zip", dict(reversed(files.items())))):
        source = open_segmented(path)
        for i in range(4):
            assert np.asarray(source.image(i))[0, 0, 0] == source.mask(i)[0, 0]


def test_what_is_to_be_measured_is_val_then_test_unless_it_is_named(tmp_path):
    path = in_folder(tmp_path, CLASSIC)
    assert segmented_splits(path)[1].key(0) == "val/0001TP_03.png"
    train, test = segmented_splits(f"camvid:test@{path}")
    assert (train.key(0), test.key(0)) == ("train/0001TP_01.png", "test/0001TP_04.png")
    rest = in_folder(tmp_path / "n", {k: v for k, v in CLASSIC.items() if not k.startswith("val")})
    assert open_annotated(rest).key(0) == "test/0001TP_04.png"
    train, val = segmented_splits(f"voc:train@{in_folder(tmp_path / 'v', VOC)}")
    assert (len(train), len(val)) == (1, 2), "a training split that is named is learnt from"


@pytest.mark.parametrize("names", [("valid",), ("validation",), ("test",)])
def test_held_out_parts_of_other_names_are_found(tmp_path, names):
    files = {k.replace("val/", f"{names[0]}/").replace("train/", "training/"): v for k, v in MASKS.items()}
    assert [len(s) for s in segmented_splits(in_folder(tmp_path, files))] == [2, 1]


# --- what the layouts' values mean ---


def test_voc_trains_on_the_union_and_prefers_its_own_masks(tmp_path):
    source = open_segmented(in_folder(tmp_path / "union", VOC))
    assert [source.key(i) for i in range(3)] == [f"JPEGImages/2007_00{i}.jpg" for i in (0, 3, 4)]
    assert source.mask(0)[1, 0] == 20, "train.txt has it, so VOC's mask counts and not SBD's"
    assert source.mask(1)[0, 0] == 15
    assert source.classes[15] == "person"
    one_list = "".join(f"/JPEGImages/2007_00{i}.jpg /SegmentationClassAug/2007_00{i}.png\n" for i in (4, 0))
    for name in ("train_aug", "trainaug"):
        other = open_segmented(in_folder(tmp_path / name, VOC | {f"ImageSets/Segmentation/{name}.txt": one_list}))
        assert [other.key(i) for i in range(2)] == ["JPEGImages/2007_004.jpg", "JPEGImages/2007_000.jpg"]
    plain = in_folder(tmp_path / "plain", {k: v for k, v in VOC.items() if "Aug" not in k and "aug" not in k})
    assert len(open_segmented(plain)) == 1


def test_cityscapes_label_ids_become_train_ids_by_the_official_table(tmp_path):
    ids = np.arange(36, dtype=np.uint8).clip(0, 33)
    files = {k: v for k, v in CITY.items() if "TrainIds" not in k and "labelIds" not in k}
    files = {k: np.zeros((1, 36, 3), np.uint8) if "leftImg" in k else v for k, v in files.items()}
    files |= {
        k.replace("leftImg8bit", "gtFine", 1).replace("_leftImg8bit", "_gtFine_labelIds"): ids[None]
        for k in files
        if "leftImg" in k
    }
    found = open_segmented(in_folder(tmp_path, files)).mask(0)[0]
    named = {int(i): CITYSCAPES[c] for i, c in zip(ids, found, strict=True) if c != IGNORE}
    assert named == {
        7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
        20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car",
        27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
    }  # fmt: skip


def test_ade20k_has_the_first_name_of_each_class_or_numbers(tmp_path):
    assert open_segmented(in_folder(tmp_path / "named", ADE)).classes[:2] == ("thing 1", "building")
    numbered = open_segmented(in_folder(tmp_path / "n", {k: v for k, v in ADE.items() if k != "objectInfo150.txt"}))
    assert (numbered.classes[0], numbered.classes[-1]) == ("1", "150")


@pytest.mark.parametrize(
    ("content", "classes", "values"),
    [
        (["a", "b", "c"], ("a", "b", "c"), {0, 2, 255}),
        ({"classes": ["a", "b", "c"], "ignore_index": 255}, ("a", "b", "c"), {0, 2, 255}),
        ({"classes": ["a", "b", "c"], "ignore_index": 0}, ("a", "b", "c"), {2, 255}),
        ({"2": "road", "0": "sky"}, ("sky", "road"), {0, 1, 255}),
        ({"classes": {"0": "sky", "2": "road"}}, ("sky", "road"), {0, 1, 255}),
        (None, ("0", "1", "2"), {0, 2, 255}),
    ],
)
def test_classes_are_a_list_or_named_values_or_counted(tmp_path, content, classes, values):
    files = {k: v for k, v in MASKS.items() if k != "classes.json"}
    files |= {} if content is None else {"classes.json": json.dumps(content)}
    source = open_segmented(in_folder(tmp_path, files))
    assert source.classes == classes
    assert set(np.unique(source.mask(0)).tolist()) == values


def test_images_and_masks_without_splits_are_one_part(tmp_path):
    path = in_folder(tmp_path, {k.replace("train/", "").replace("val/", ""): v for k, v in MASKS.items()})
    assert len(open_segmented(path)) == len(open_annotated(path)) == 3
    with pytest.raises(UserError, match=r"train, val.*all images are one part"):
        segmented_splits(path)
    with pytest.raises(UserError, match="no split 'val'; there are none: all images"):
        open_segmented(path, "val")


@pytest.mark.parametrize("line", ["sub/b", "/x/images/train/a.png /x/masks/train/a.png", "images/train/a", "a.png"])
def test_a_list_chooses_among_the_images_of_a_split(tmp_path, line):
    source = open_segmented(in_folder(tmp_path, MASKS | {"train.txt": f"{line}\n\n{line}\n"}))
    assert [source.key(i) for i in range(len(source))] == [f"images/train/{'sub/b' if 'sub' in line else 'a'}.png"]


def test_one_bit_and_16_bit_masks_are_read_if_they_hold_small_numbers(tmp_path):
    small = mask(0, 1)
    for name, image in (("one", Image.fromarray(small > 0)), ("16", Image.fromarray(small.astype(np.uint16)))):
        files = {"images/a.png": RGB, "masks/a.png": image, "classes.json": '["a", "b"]'}
        np.testing.assert_array_equal(open_segmented(in_folder(tmp_path / name, files)).mask(0), small)


# --- what is wrong with it ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masks/train/a.png": None}, r"every image needs a mask.*1 of 2.*: a \(no mask\)"),
        ({"images/train/a.png": None}, r"every image needs a mask.*a \(no image\)"),
        (
            {f"images/train/{i}.png": RGB for i in range(9)},
            r"9 of 11.*0 \(no mask\), 1 \(no mask\), 2 \(no mask\) \.\.\.",
        ),
        ({"images/train/a.jpg": RGB}, "a.jpg and .*a.png have one name"),
        ({"train.txt": "\n"}, "train.txt of .* is empty"),
        ({"train.txt": "a\nnowhere\n"}, r"nowhere \(no image\)"),
        ({"classes.json": "[]"}, "one or more names"),
        ({"classes.json": "[unfinished"}, r"classes.json of .* must be \["),
        ({"classes.json": '{"sky": 0}'}, "classes.json of .* must be"),
        ({"classes.json": '{"classes": ["a"], "ignore_index": 999}'}, "classes.json"),
        ({"classes.json": '"sky"'}, "classes.json"),
    ],
)
def test_a_broken_data_set_is_refused_when_it_is_opened(tmp_path, changes, message):
    files = {name: content for name, content in (MASKS | changes).items() if content is not None}
    with pytest.raises(UserError, match=message):
        open_segmented(in_folder(tmp_path, files))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (mask(0, 3, 77), r"masks/train/a.png of .* has the values 3, 77; its 3 classes have values in 0\.\.2"),
        (np.zeros((6, 4), np.uint8), "masks/train/a.png is 4 x 6 pixels and its image images/train/a.png 6 x 4"),
        (RGB, "masks/train/a.png is no index mask .mode RGB"),
        (np.full((4, 6), 256, np.uint16), "no index mask .*values up to 256"),
    ],
)
def test_a_mask_that_cannot_be_right_is_named(tmp_path, content, message):
    source = open_segmented(in_folder(tmp_path, MASKS | {"masks/train/a.png": content}))
    with pytest.raises(UserError, match=message):
        source.mask(0)
    assert source.mask(1).shape == (4, 6), "the others can be read"


@pytest.mark.parametrize("name", ["images/train/a.png", "masks/train/a.png"])
def test_a_damaged_file_is_named(tmp_path, name):
    source = open_segmented(in_folder(tmp_path, MASKS | {name: b"no image"}))
    with pytest.raises(UnreadableImage, match=f"{name}: not an image"):
        source.mask(0)


def test_masks_are_compared_with_upright_images(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    file = io.BytesIO()
    Image.fromarray(RGB.transpose(1, 0, 2).copy()).save(file, "JPEG", exif=exif)
    files = {"images/a.jpg": file.getvalue(), "masks/a.png": mask(0), "classes.json": '["a"]'}
    source = open_segmented(in_folder(tmp_path, files))
    assert load_rgb(source, 0).size == source.mask(0).shape[::-1] == (6, 4)


def test_a_fingerprint_tells_images_masks_and_classes_apart(tmp_path):
    changes = [
        {},
        {"masks/train/a.png": mask(0, 1, 2, 255)},
        {"images/train/a.png": RGB // 2},
        {"classes.json": '["sky", "road", "bus"]'},
        {"classes.json": '{"classes": ["sky", "road", "car"], "ignore_index": 1}'},
    ]
    made = [open_segmented(in_folder(tmp_path / str(i), MASKS | c)).fingerprint() for i, c in enumerate(changes)]
    assert len(set(made)) == len(made)
    assert open_segmented(in_zip(tmp_path / "z.zip", MASKS)).fingerprint() == made[0], "wherever they lie"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("camvd@{path}", r"did you mean camvid.*\n.*\n  masks: images/ and masks/"),
        ("nowhere", "neither an existing path nor a known KIND@PATH"),
        ("voc@{path}", r"does not lie as voc; it must hold\n  voc: JPEGImages/"),
        ("masks", "say where its files lie: masks@FOLDER"),
        ("masks@/nowhere", "/nowhere does not exist"),
        ("masks@{path}/classes.json", "neither a folder nor a .zip"),
        ("masks:dev@{path}", "no split 'dev'; there are train, val"),
        ("coco@{path}", "will not do here"),
        ("{path}/images/train/sub", "has no layout that is known; it must hold one of"),
        ("{path}/empty", "no images in"),
    ],
)
def test_a_specification_that_finds_nothing_says_what_there_is(tmp_path, spec, message):
    in_folder(tmp_path, MASKS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        open_segmented(spec.format(path=tmp_path))


def test_a_split_is_named_once(tmp_path):
    with pytest.raises(UserError, match="names a split already"):
        open_segmented(f"masks:val@{in_folder(tmp_path, MASKS)}", "train")


def test_an_image_in_two_zip_files_is_refused_and_a_broken_one_named(tmp_path):
    in_zip(tmp_path / "a.zip", MASKS)
    in_zip(tmp_path / "b.zip", MASKS)
    for spec in (tmp_path, f"masks@{tmp_path}"):
        with pytest.raises(UserError, match=r"two zip files of .* both have images/train/a.png"):
            open_segmented(spec)
    (tmp_path / "b.zip").write_bytes(b"no zip file")
    with pytest.raises(UserError, match=r"b\.zip is broken"):
        open_segmented(tmp_path)


def test_an_archive_that_lies_beside_what_was_unpacked_does_not_count(tmp_path):
    in_zip(in_folder(tmp_path, MASKS) / "set.zip", MASKS)
    (tmp_path / "half a download.zip").write_bytes(b"no zip file")
    assert [len(s) for s in segmented_splits(tmp_path)] == [2, 1]


def test_parts_in_zip_files_of_their_own_lie_side_by_side(tmp_path):
    """As Cityscapes is downloaded."""
    in_zip(tmp_path / "gtFine_trainvaltest.zip", {k: v for k, v in CITY.items() if k.startswith("gtFine")})
    in_zip(tmp_path / "leftImg8bit_trainvaltest.zip", {k: v for k, v in CITY.items() if not k.startswith("gtFine")})
    assert [len(s) for s in segmented_splits(tmp_path)] == [2, 1]


def test_every_kind_is_in_the_list_of_kinds():
    assert {spec.partition("[")[0].partition(":")[0] for spec in ANNOTATED} == {*KINDS, "coco", "davis"}


# --- photographs ---


@pytest.mark.skipif(not CAMVID.exists(), reason=f"{CAMVID} is not on this machine")
def test_camvid_is_as_its_card_says():
    train, val = segmented_splits(CAMVID)
    test = open_segmented(f"camvid:test@{CAMVID}")
    assert (len(train), len(val), len(test)) == (367, 101, 233)
    assert train.classes == val.classes == tuple(json.loads((CAMVID / "classes.json").read_text())["classes"])
    np.testing.assert_array_equal(test.mask(9), open_segmented(CAMVID, "test").mask(9), "recognised as masks")
    counts = sum(np.bincount(test.mask(i).ravel(), minlength=256) for i in range(0, 233, 8))
    assert counts[11:255].sum() == 0
    assert counts[3] / counts[:11].sum() == pytest.approx(0.27, abs=0.02), "the floor of the card: always Road = 26.8 %"
    archive = open_segmented(f"camvid@{CAMVID / 'camvid.zip'}")
    assert [archive.key(i) for i in (0, 366)] == [train.key(i) for i in (0, 366)], "names and lists lie beside the zip"
