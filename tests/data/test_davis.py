"""Videos with masks: DAVIS-2017 and DAVIS-2016, frames of several objects, and mistakes."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from written import in_folder, in_zip

from triptych.data.annotated import open_annotated, open_videos
from triptych.data.davis import DAVIS_PALETTE
from triptych.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data" / "davis16_dev"

PALETTE = [7, 8, 9, *range(3, 256)] + [0] * 512


def objects(*values, mode="P"):
    """(4, 6): columns of the values, and background."""
    pixels = np.zeros((4, 6), np.uint8)
    pixels[:, : len(values)] = values
    image = Image.fromarray(pixels)
    if mode == "P":
        image.putpalette(PALETTE)  # changes the mode
    return image


def frame(number):
    return np.full((4, 6, 3), number, np.uint8)


def videos(size="480p/", **sequences):
    """{name: masks of its frames, None = not annotated} -> files; frame i of any is the colour 10 i."""
    files = {}
    for name, masks in sequences.items():
        for i, mask in enumerate(masks):
            files[f"JPEGImages/{size}{name}/{i:05}.png"] = frame(10 * i)
            if mask is not None:
                files[f"Annotations/{size}{name}/{i:05}.png"] = mask
    return files


TWO = videos(bear=[objects(1), objects(1)], bikes=[objects(2, 1), objects(0), objects(2)])
LISTS = {
    "ImageSets/2017/val.txt": "bikes\nbear\n",
    "ImageSets/2017/train.txt": "bear\n",
    "ImageSets/2016/val.txt": "bikes\n",
}
PLACES = {
    "folder": in_folder,
    "zip": lambda path, files: in_zip(path / "davis.zip", files, "DAVIS/"),
    "folder with a zip": lambda path, files: in_zip(path / "davis.zip", files) and path,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("size", ["480p/", ""])
def test_a_video_is_its_frames_in_order_and_their_objects(tmp_path, place, size):
    masks = {"bear": [objects(1), objects(1)], "bikes": [objects(2, 1), None, objects(2)]}
    path = PLACES[place](tmp_path, videos(size, **masks) | LISTS)
    for spec in (path, f"davis@{path}", f"davis:2017/val@{path}", f"DAVIS:val@{path}"):
        found = pickle.loads(pickle.dumps(open_videos(spec)))
        assert [(video.name, len(video), video.size) for video in found] == [("bikes", 3, (4, 6)), ("bear", 2, (4, 6))]
    bikes = found[0]
    assert [bikes.frame(i)[0, 0].tolist() for i in range(3)] == [[0] * 3, [10] * 3, [20] * 3]
    assert (bikes.frame(0).dtype, bikes.frame(0).shape) == (np.uint8, (4, 6, 3))
    assert bikes.mask(0)[0].tolist() == [2, 1, 0, 0, 0, 0]
    assert bikes.mask(0).dtype == np.uint8
    assert bikes.mask(1) is None
    assert bikes.palette == PALETTE
    assert [v.name for v in open_videos(path, "train")] == ["bear"]


def test_without_lists_all_sequences_count(tmp_path):
    assert [v.name for v in open_videos(in_folder(tmp_path, TWO))] == ["bear", "bikes"]


def test_lists_without_a_year_count_before_2016(tmp_path):
    lists = {"ImageSets/val.txt": "bear\n", "ImageSets/2016/val.txt": "bikes\n"}
    assert [v.name for v in open_videos(in_folder(tmp_path, TWO | lists))] == ["bear"]


@pytest.mark.parametrize("of", ["2016/val", "480p/val"])
def test_davis_2016_has_one_object_and_may_list_pairs_of_frames(tmp_path, of):
    pairs = "".join(f"/JPEGImages/480p/bikes/0000{i}.jpg /Annotations/480p/bikes/0000{i}.png\n" for i in range(3))
    path = in_folder(tmp_path, TWO | {f"ImageSets/{of}.txt": pairs})
    (bikes,) = open_videos(f"davis:{of}@{path}")
    assert bikes.mask(0)[0].tolist() == [1, 1, 0, 0, 0, 0]
    (alone,) = open_videos(path)
    assert alone.name == "bikes"


def test_where_the_first_mask_is_of_0_and_255_that_is_object_1(tmp_path):
    masks = [objects(255, 255, mode="L"), objects(0, mode="L"), objects(0, 255, mode="L")]
    (video,) = open_videos(in_folder(tmp_path, videos(bear=masks)))
    assert [video.mask(i)[0].tolist() for i in range(3)] == [[1, 1, 0, 0, 0, 0], [0] * 6, [0, 1, 0, 0, 0, 0]]


def test_255_beside_objects_is_void_also_in_frames_that_hold_nothing_else(tmp_path):
    path = in_folder(tmp_path, videos(bear=[objects(1, 255), objects(255, 2), objects(0, 255)]))
    (video,) = open_videos(path)
    assert [video.mask(i)[0, :2].tolist() for i in range(3)] == [[1, 255], [255, 2], [0, 255]]
    assert open_annotated(path).classes == ("bear/1", "bear/2"), "void is no object"


def test_masks_without_a_palette_get_that_of_davis(tmp_path):
    (video,) = open_videos(in_folder(tmp_path, videos(bear=[objects(1, mode="L")])))
    assert video.palette == DAVIS_PALETTE
    assert len(DAVIS_PALETTE) == 768
    assert DAVIS_PALETTE[: 3 * 9] == [
        *(0, 0, 0), *(128, 0, 0), *(0, 128, 0), *(128, 128, 0), *(0, 0, 128),
        *(128, 0, 128), *(0, 128, 128), *(128, 128, 128), *(64, 0, 0),
    ]  # fmt: skip


def test_objects_of_annotated_frames_are_regions_each_a_category_of_its_own(tmp_path):
    masks = {"bear": [objects(1), objects(1)], "bikes": [objects(2, 1), None, objects(2, 2, 3), objects(0)]}
    source = pickle.loads(pickle.dumps(open_annotated(in_folder(tmp_path, videos(**masks)))))
    assert source.classes == ("bear/1", "bikes/1", "bikes/2", "bikes/3"), "also what appears later"
    ends = [source.key(i).removeprefix("JPEGImages/480p/") for i in range(len(source))]
    assert ends == ["bear/00000.png", "bear/00001.png", "bikes/00000.png", "bikes/00002.png", "bikes/00003.png"]
    assert [[r.category for r in source.regions(i)] for i in range(5)] == [[0], [0], [1, 2], [2, 3], []]
    assert source.regions(3)[0].mask[0].tolist() == [True, True, False, False, False, False]
    assert np.asarray(source.image(3))[0, 0].tolist() == [20, 20, 20]
    assert source.label(0) is None


def test_a_fingerprint_tells_masks_and_the_year_apart(tmp_path):
    path = in_folder(tmp_path / "a", TWO | LISTS | {"ImageSets/2016/val.txt": LISTS["ImageSets/2017/val.txt"]})
    other = in_folder(tmp_path / "b", TWO | LISTS | {"Annotations/480p/bikes/00002.png": objects(2, 0, 1, 0, 1)})
    specs = f"davis:2017/val@{path}", f"davis:2016/val@{path}", f"davis:2017/val@{other}", f"davis:train@{path}"
    assert len({open_annotated(spec).fingerprint() for spec in specs}) == 4
    assert open_annotated(path).fingerprint() == open_annotated(specs[0]).fingerprint()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"ImageSets/2017/val.txt": "bear\ncat\ndog\n"},
            r"lacks 2 of 3 sequences of 2017/val: cat, dog; each needs JPEGImages/480p/NAME/",
        ),
        ({"ImageSets/2017/val.txt": "\n"}, r"ImageSets/2017/val\.txt of .* is empty"),
        ({"Annotations/480p/bikes/00000.png": None}, "the first frame 00000 of bikes has no annotation"),
        ({"JPEGImages/480p/bikes/00001.png": None}, "lacks frames of bikes that have an annotation: 00001"),
        (
            {k: None for k in TWO if k.startswith("Ann")},
            r"no layout that is known; it must hold one of\n  davis: JPEGImages/",
        ),
    ],
)
def test_a_broken_set_of_videos_is_refused_when_it_is_opened(tmp_path, changes, message):
    files = {name: content for name, content in (TWO | LISTS | changes).items() if content is not None}
    with pytest.raises(UserError, match=message):
        open_videos(in_folder(tmp_path, files))


def test_a_frame_that_is_missing_with_its_mask_leaves_a_gap_that_is_named(tmp_path):
    five = videos(bear=[objects(1)] * 5)
    whole = in_folder(tmp_path / "whole", five)
    assert len(open_videos(whole)[0]) == 5
    torn = {name: content for name, content in five.items() if "00002" not in name}
    with pytest.raises(UserError, match="bear lacks frames after 00001"):
        open_videos(in_folder(tmp_path / "torn", torn))
    every_other = {name: content for name, content in five.items() if name[-9:-4] in ("00000", "00002", "00004")}
    assert len(open_videos(in_folder(tmp_path / "every_other", every_other))[0]) == 3


def test_frames_and_masks_of_another_size_are_named(tmp_path):
    changes = {
        "Annotations/480p/bear/00001.png": np.zeros((6, 4), np.uint8),
        "JPEGImages/480p/bikes/00002.png": np.zeros((5, 6, 3), np.uint8),
    }
    bear, bikes = open_videos(in_folder(tmp_path, TWO | changes))
    with pytest.raises(UserError, match=r"bear/00001\.png is 4 x 6 pixels and its image .*bear/00001\.png 6 x 4"):
        bear.mask(1)
    with pytest.raises(UserError, match=r"bikes/00002\.png is 6 x 5 pixels"):
        bikes.frame(2)


def test_what_is_no_set_of_videos_says_what_there_is(tmp_path):
    path = in_folder(tmp_path, TWO | LISTS)
    with pytest.raises(UserError, match=r"no split 'test'; there are 2017/val, 2016/val, 2017/train"):
        open_videos(f"davis:test@{path}")
    with pytest.raises(UserError, match="will not do here"):
        open_videos(f"voc@{path}")


@pytest.mark.skipif(not SHARED.exists(), reason=f"{SHARED} is not on this machine")
def test_davis16_dev_is_as_its_card_says():
    found = open_videos(SHARED)
    assert {v.name: len(v) for v in found} == {
        "bmx-trees": 80,
        "dog": 60,
        "horsejump-high": 50,
        "libby": 49,
        "scooter-black": 43,
    }
    assert found[0].palette[:6] == [0, 0, 0, 128, 0, 0]
    for video in found:
        assert video.frame(len(video) - 1).shape == (480, 854, 3)
        assert set(np.unique(video.mask(len(video) // 2)).tolist()) == {0, 1}
    dog = found[1]
    overlap = [((dog.mask(0) & m).sum(), (dog.mask(0) | m).sum()) for m in (dog.mask(i) for i in range(1, 59))]
    assert np.mean([i / u for i, u in overlap]) == pytest.approx(0.33, abs=0.005), "the floor of the card"
