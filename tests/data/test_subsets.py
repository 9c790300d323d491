"""Parts of a data set: imagenet100@ROOT, a hundred classes of an ImageNet; subset:FILE@DATA, the images of a list."""

import numpy as np
import pytest
from PIL import Image

from triptych.data.sources import open_source, splits
from triptych.data.subsets import IMAGENET100
from triptych.errors import UserError

OTHERS = ("n00000000", "n02000000", "n99999999")  # before, among and behind the hundred


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    root = tmp_path_factory.mktemp("imagenet")
    for split, count in (("train", 2), ("val", 1)):
        for number, name in enumerate(sorted((*IMAGENET100, *OTHERS))):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(folder / f"{i}.png")
    return root


def test_the_list_is_a_hundred_classes_in_the_order_of_their_labels():
    assert len(set(IMAGENET100)) == 100
    assert list(IMAGENET100) == sorted(IMAGENET100)


def test_both_splits_hold_the_hundred_classes_alone_with_labels_of_their_own(imagenet):
    pair = splits(f"imagenet100@{imagenet}")
    assert pair is not None
    for source, count in zip(pair, (200, 100), strict=True):
        assert len(source) == count
        assert source.classes == IMAGENET100
        for i in range(0, count, 17):
            folder = source.key(i).split("/")[-2]
            assert IMAGENET100[source.label(i)] == folder
            assert np.asarray(source.image(i))[0, 0, 0] == sorted((*IMAGENET100, *OTHERS)).index(folder)
    assert len(open_source(f"imagenet100@{imagenet}")) == 200  # the part to train on
    assert len(open_source(f"imagenet100:val@{imagenet}")) == 100
    assert pair[0].fingerprint() != open_source(imagenet, split="train").fingerprint()


def test_a_folder_without_some_of_the_classes_is_refused(imagenet, tmp_path):
    with pytest.raises(UserError, match="say where ImageNet lies"):
        open_source("imagenet100")
    (tmp_path / "train").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / "train" / name / "0.png")
    with pytest.raises(UserError, match="lacks 100 of 100 classes: n01558993"):
        open_source(f"imagenet100@{tmp_path}")
    with pytest.raises(UserError, match="neither an existing path nor a data set"):
        open_source(f"imagenet100@{tmp_path / 'nowhere'}")


def test_a_subset_holds_the_images_of_a_list_and_leaves_the_held_out_part_whole(imagenet, tmp_path):
    names = [f"{OTHERS[2]}/1.png", f"{IMAGENET100[3]}/0.png", f"{IMAGENET100[3]}/1.png"]
    file = tmp_path / "few.txt"
    file.write_text("\n".join(names))  # no newline at the end: nothing is cut off
    pair = splits(f"subset:{file}@{imagenet}")
    assert pair is not None
    few, test = pair
    assert [few.key(i) for i in range(len(few))] == [f"train/{name}" for name in names]
    assert few.classes == test.classes == tuple(sorted((*IMAGENET100, *OTHERS)))  # also those without an image
    assert [few.classes[few.label(i)] for i in range(3)] == [OTHERS[2], IMAGENET100[3], IMAGENET100[3]]
    assert test.fingerprint() == open_source(imagenet, split="val").fingerprint()
    assert open_source(f"subset:{file}@{imagenet}").fingerprint() == few.fingerprint()
    assert few.name.endswith("[few.txt]")
    alone = open_source(f"subset:{file}@{imagenet / 'train'}")  # data without a held-out part
    assert [alone.key(i) for i in range(3)] == names
    assert splits(f"subset:{file}@{imagenet / 'train'}") is None


def test_a_subset_without_file_or_data_and_with_unknown_images_is_refused(imagenet, tmp_path):
    for spec in ("subset", "subset:few.txt", f"subset@{imagenet}"):
        with pytest.raises(UserError, match=r"subset:FILE\.txt@DATA"):
            open_source(spec)
    (tmp_path / "few.txt").write_text("n01558993/0.png\nn01558993/7.png\n")
    with pytest.raises(UserError, match=r"n01558993/7\.png"):
        open_source(f"subset:{tmp_path / 'few.txt'}@{imagenet}")
