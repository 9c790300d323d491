"""Sources give the same images, labels and keys whatever holds the files, and say what is wrong with bad input."""

import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from triptych.data.images import UnreadableImage
from triptych.data.sources import SOURCES, load_rgb, open_source, splits
from triptych.data.subsets import Subset
from triptych.data.torchvision_sets import SETS, split_of
from triptych.errors import UserError

KEYS = ["cat/1.png", "cat/2.JPG", "dog/deep/3.png", "dog/4.png"]


def picture(number: int, size: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8))


def folder_of(root: Path, keys: list[str]) -> Path:
    for number, key in enumerate(keys):
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(root / key)
    return root


def zip_of(folder: Path, target: Path, top: str = "", method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(target, "w", method) as archive:
        for file in folder.rglob("*"):
            archive.write(file, top + file.relative_to(folder).as_posix())
    return target


def tar_of(folder: Path, target: Path, top: str = "", mode: Literal["w", "w:gz", "w:xz"] = "w") -> Path:
    with tarfile.open(target, mode) as archive:
        archive.add(folder, top or ".")
    return target


def list_of(folder: Path, target: Path) -> Path:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    names = [file.relative_to(folder).as_posix() for file in files]
    target.write_text("# path, label\n\n" + "".join(f"{name}\t{name.partition('/')[0]}\n" for name in names))
    return target


def content(source) -> list:
    return [(source.key(i), source.label(i), np.asarray(load_rgb(source, i)).tolist()) for i in range(len(source))]


@pytest.fixture
def animals(tmp_path) -> Path:
    return folder_of(tmp_path / "animals", KEYS)


# --- the same through every kind ---


def test_folder_zip_tar_and_list_give_the_same_images_labels_keys_and_fingerprint(animals, tmp_path):
    holders = [
        zip_of(animals, tmp_path / "deflated.zip"),
        zip_of(animals, tmp_path / "stored.ZIP", method=zipfile.ZIP_STORED),
        tar_of(animals, tmp_path / "plain.tar"),
        list_of(animals, animals / "list.txt"),
    ]
    folder = open_source(animals)
    assert [(folder.key(i), folder.label(i)) for i in range(4)] == [
        ("cat/1.png", 0),
        ("cat/2.JPG", 0),
        ("dog/4.png", 1),
        ("dog/deep/3.png", 1),
    ]
    np.testing.assert_array_equal(np.asarray(folder.image(2)), np.asarray(picture(3)))
    for holder in holders:
        source = open_source(str(holder))
        assert source.classes == folder.classes == ("cat", "dog")
        assert content(source) == content(folder)
        assert source.fingerprint() == folder.fingerprint()
        assert source.name == str(holder)


def test_the_fingerprint_changes_with_keys_labels_and_sizes(animals):
    seen = {open_source(animals).fingerprint()}
    assert len(seen.copy().pop()) == 16
    picture(0, size=9).save(animals / "cat/1.png")
    seen.add(open_source(animals).fingerprint())
    (animals / "cat/1.png").rename(animals / "cat/0.png")
    seen.add(open_source(animals).fingerprint())
    (animals / "dog").rename(animals / "ant")
    seen.add(open_source(animals).fingerprint())
    assert len(seen) == 4


@pytest.mark.parametrize("pack", [zip_of, tar_of])
def test_one_common_top_folder_of_an_archive_is_no_class(pack, animals, tmp_path):
    name = "a.zip" if pack is zip_of else "a.tar"
    source = open_source(pack(animals, tmp_path / name, top="data/"))
    assert source.classes == ("cat", "dog")
    assert [source.key(i) for i in range(2)] == ["data/cat/1.png", "data/cat/2.JPG"]
    assert source.label(3) == 1


def test_hard_links_in_a_tar_give_the_image_they_link_to(tmp_path):
    folder = folder_of(tmp_path / "x", ["a.png"])
    os.link(folder / "a.png", folder / "b.png")
    source = open_source(tar_of(folder, tmp_path / "x.tar"))
    assert np.array_equal(np.asarray(source.image(0)), np.asarray(source.image(1)))


class Pixels:
    """A map-style data set for DataLoader."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return np.asarray(load_rgb(self.source, index))


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archives_can_be_pickled_and_read_by_two_workers(kind, animals, tmp_path):
    from torch.utils.data import DataLoader

    pack = zip_of if kind == "zip" else tar_of
    source = open_source(pack(animals, tmp_path / f"a.{kind}"))
    expected = [np.asarray(load_rgb(source, i)) for i in range(4)]  # opens the parent's handle before the fork
    again = pickle.loads(pickle.dumps(source))
    assert content(again) == content(source)
    loader = DataLoader(
        Pixels(again),  # pyright: ignore[reportArgumentType]
        batch_size=None,
        num_workers=2,
        multiprocessing_context="fork",
    )
    np.testing.assert_array_equal([np.asarray(image) for image in loader], expected)


# --- classes and splits ---


@pytest.mark.parametrize(
    "keys", [["1.png", "2.png"], ["only/1.png", "only/2.png"], ["0.png", "cat/1.png", "dog/2.png"]]
)
def test_flat_single_and_mixed_folders_are_unlabelled(keys, tmp_path):
    source = open_source(folder_of(tmp_path, keys))
    assert (source.classes, len(source), source.label(0)) == (None, len(keys), None)
    assert [source.key(i) for i in range(len(keys))] == keys


PARTS = ["train/cat/1.png", "train/cow/2.png", "train/dog/3.png", "val/cat/4.png", "val/dog/5.png"]


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_train_and_val_folders_are_splits_with_the_classes_of_train(kind, tmp_path):
    spec = folder_of(tmp_path / "data", PARTS)
    if kind != "folder":
        spec = (zip_of if kind == "zip" else tar_of)(spec, tmp_path / f"data.{kind}", top="")
    train = open_source(spec)
    assert (train.classes, [train.key(i) for i in range(len(train))]) == (("cat", "cow", "dog"), PARTS[:3])
    val = open_source(spec, split="val")
    assert (val.classes, [val.key(i) for i in range(len(val))]) == (train.classes, PARTS[3:])
    assert [val.label(i) for i in range(2)] == [0, 2]  # dog is 2 although val lacks cow
    np.testing.assert_array_equal(np.asarray(val.image(1)), np.asarray(picture(4)))
    pair = splits(spec)
    assert pair is not None
    assert [source.fingerprint() for source in pair] == [train.fingerprint(), val.fingerprint()]
    assert open_source(spec, split="test").fingerprint() == val.fingerprint()


def test_an_unlabelled_test_folder_gives_way_to_a_labelled_val_folder(tmp_path):
    pair = splits(folder_of(tmp_path, [*PARTS, "test/6.png"]))
    assert pair is not None
    assert pair[1].key(0) == "val/cat/4.png"


def test_sources_without_a_held_out_part_have_no_splits(animals):
    assert splits(animals) is None
    assert splits(list_of(animals, animals / "list.txt")) is None
    assert splits("eurosat") is None
    assert splits("cifar10:train") is None


def test_a_class_that_only_the_held_out_part_has_is_an_error(tmp_path):
    with pytest.raises(UserError, match="train folder lacks: owl"):
        open_source(folder_of(tmp_path, [*PARTS, "val/owl/6.png"]), split="val")


def test_an_unknown_split_lists_the_folders(tmp_path):
    with pytest.raises(UserError, match=r"'tset'.*train, val"):
        open_source(folder_of(tmp_path, PARTS), split="tset")


# --- archives as parts, and classes that lie deeper ---


@pytest.fixture
def packed(tmp_path) -> Path:
    """A folder with an archive for each part, and other things beside them."""
    parts = folder_of(tmp_path / "parts", [*PARTS, "test/dog/6.png", "test/cow/7.png", "iconic/8.png"])
    folder = tmp_path / "packed"
    folder.mkdir()
    zip_of(parts / "train", folder / "train.zip")
    tar_of(parts / "val", folder / "Val.tar", top="val")
    zip_of(parts / "test", folder / "test.ZIP")
    zip_of(parts / "iconic", folder / "iconic.zip")
    (folder / "classes.json").write_text("{}")
    return folder


def test_archives_named_after_parts_are_the_splits_of_their_folder(packed):
    train = open_source(packed)
    assert (train.classes, [train.key(i) for i in range(3)]) == (
        ("cat", "cow", "dog"),
        ["cat/1.png", "cow/2.png", "dog/3.png"],
    )
    assert train.fingerprint() == open_source(packed / "train.zip").fingerprint()
    val = open_source(packed, split="val")
    assert (val.classes, [val.label(i) for i in range(2)]) == (train.classes, [0, 2])  # counted as in train
    assert val.key(0) == "val/cat/4.png"
    pair = splits(packed)
    assert pair is not None
    assert [part.name for part in pair] == [f"{packed} [train]", f"{packed} [test]"]  # test before val
    assert [pair[1].key(i) for i in range(len(pair[1]))] == ["cow/7.png", "dog/6.png"]
    assert (pair[1].classes, [pair[1].label(i) for i in range(2)]) == (train.classes, [1, 2])
    np.testing.assert_array_equal(np.asarray(pair[1].image(1)), np.asarray(picture(5)))
    assert content(pickle.loads(pickle.dumps(pair[1]))) == content(pair[1])
    with pytest.raises(UserError, match=r"'iconic' of .*there are test, train, val"):
        open_source(packed, split="iconic")


def test_without_a_test_archive_the_next_held_out_one_counts_and_without_any_there_is_none(packed):
    (packed / "test.ZIP").unlink()
    pair = splits(packed)
    assert pair is not None
    assert pair[1].key(0) == "val/cat/4.png"
    (packed / "Val.tar").unlink()
    assert splits(packed) is None
    assert len(open_source(packed)) == 3


def test_an_archive_unpacked_beside_itself_is_read_from_its_folders(packed):
    folder_of(packed, ["train/ant/8.png", "train/bee/9.png", "val/bee/8.png"])
    pair = splits(packed)
    assert pair is not None
    assert [part.classes for part in pair] == [("ant", "bee")] * 2
    assert pair[1].key(0) == "val/bee/8.png"


def test_two_archives_of_one_part_are_an_error_that_names_both(packed):
    shutil.copy(packed / "train.zip", packed / "train.tar")
    with pytest.raises(UserError, match=r"train\.tar and train\.zip, both its part train: keep one"):
        open_source(packed)


def test_tar_files_of_other_names_are_shards_still(tmp_path):
    (tmp_path / "shards").mkdir()
    for part in ("train-0", "train-1"):
        tar_of(folder_of(tmp_path / part, [f"{part}.png"]), tmp_path / "shards" / f"{part}.tar")
    assert len(open_source(tmp_path / "shards")) == 2
    assert splits(tmp_path / "shards") is None


ALPHABETS = [
    "Greek/character01/1.png",
    "Greek/character02/2.png",
    "Latin/character01/3.png",
    "Latinate/character01/4.png",
]


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_leaf_class_is_the_whole_path_of_the_folder(kind, tmp_path):
    path = folder_of(tmp_path / "letters", ALPHABETS)
    if kind == "zip":
        path = zip_of(path, tmp_path / "letters.zip")
    assert open_source(path).classes == ("Greek", "Latin", "Latinate")
    source = open_source(f"leaf@{path}")
    assert source.classes == tuple(key.rpartition("/")[0] for key in ALPHABETS)
    assert [source.label(i) for i in range(4)] == [0, 1, 2, 3]
    latin = open_source(f"leaf:Latin@{path}")  # Latinate begins alike but is another folder
    assert (latin.classes, len(latin), latin.label(0)) == (("Latin/character01",), 1, 0)
    some = open_source(f"leaf:Latinate,Greek/character02@{path}")
    assert some.classes == ("Greek/character02", "Latinate/character01")
    assert [(some.key(i), some.label(i)) for i in range(2)] == [(ALPHABETS[1], 0), (ALPHABETS[3], 1)]
    with pytest.raises(UserError, match="no class lies in a folder 'Lati'; there are Greek, Latin, Latinate"):
        open_source(f"leaf:Lati@{path}")
    assert splits(f"leaf@{path}") is None


def test_leaf_classes_of_two_parts_are_the_same(tmp_path):
    keys = ["train/a/x/1.png", "train/a/y/2.png", "val/a/y/3.png"]
    spec = f"leaf@{folder_of(tmp_path, keys)}"
    pair = splits(spec)
    assert pair is not None
    assert [part.classes for part in pair] == [("a/x", "a/y")] * 2
    assert pair[1].label(0) == 1
    assert open_source(f"leaf:val@{tmp_path}").fingerprint() == pair[1].fingerprint()
    assert splits(f"leaf:val@{tmp_path}") is None


def test_leaf_without_a_folder_or_archive_is_an_error(tmp_path):
    for spec in ("leaf", "leaf@", f"leaf@{tmp_path}/nowhere", "leaf@cifar10"):
        with pytest.raises(UserError, match=r"leaf takes a folder or archive.*leaf@PATH"):
            open_source(spec)


# --- folders ---


def test_hidden_files_macosx_and_other_extensions_are_ignored(tmp_path):
    folder_of(tmp_path, ["a.png", ".hidden/b.png", "__MACOSX/c.png", ".d.png"])
    (tmp_path / "notes.txt").write_text("x")
    for spec in (
        tmp_path,
        zip_of(tmp_path, tmp_path.with_suffix(".zip")),
        tar_of(tmp_path, tmp_path.with_suffix(".tar")),
    ):
        source = open_source(spec)
        assert [source.key(i) for i in range(len(source))] == ["a.png"]


def test_links_to_files_and_folders_are_followed_but_not_in_circles(animals, tmp_path):
    linked = folder_of(tmp_path / "linked", ["real/1.png"])
    (linked / "real/2.png").symlink_to(animals / "cat/1.png")
    (linked / "other").symlink_to(animals / "dog")
    (linked / "real/loop").symlink_to(linked)
    (linked / "real/gone.png").symlink_to(linked / "nowhere.png")
    source = open_source(linked)
    assert source.classes == ("other", "real")
    keys = [source.key(i) for i in range(len(source))]
    assert keys == ["other/4.png", "other/deep/3.png", "real/1.png", "real/2.png", "real/gone.png"]
    with pytest.raises(UnreadableImage, match=r"real/gone\.png: No such file"):
        source.image(4)


def test_a_relative_folder_stays_readable_after_a_change_of_directory(animals, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = open_source("animals")
    monkeypatch.chdir("/")
    assert source.image(0).size == (8, 8)


# --- lists ---


def test_a_list_takes_absolute_and_relative_paths_with_and_without_labels(animals, tmp_path):
    lst = tmp_path / "some.lst"
    lst.write_text(f"{animals}/cat/1.png\t10\r\nanimals/dog/4.png\t9\n  \n# comment\nanimals/cat/2.JPG\n")
    source = open_source(lst)
    assert source.classes == ("9", "10")  # by number
    assert [source.label(i) for i in range(3)] == [1, 0, None]
    assert source.key(1) == "animals/dog/4.png"
    lst.write_text("animals/cat/1.png\n")
    assert open_source(lst).classes is None


def test_missing_files_of_a_list_are_counted_and_named(animals):
    (animals / "l.txt").write_text("cat/1.png\n" + "".join(f"gone{i}.png\n" for i in range(5)))
    with pytest.raises(UserError, match=r"5 of 6 files .* gone0.png, gone1.png, gone2.png \.\.\."):
        open_source(animals / "l.txt")


def test_an_empty_list_and_a_split_of_a_list_are_errors(animals):
    (animals / "l.txt").write_text("# nothing\n")
    with pytest.raises(UserError, match="no paths in"):
        open_source(animals / "l.txt")
    with pytest.raises(UserError, match="has no split 'test'"):
        open_source(list_of(animals, animals / "l.txt"), split="test")


# --- unreadable images ---


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_damaged_files_raise_an_error_that_names_the_key(kind, tmp_path):
    folder = folder_of(tmp_path / "x", ["good.png"])
    picture(1, size=64).save(folder / "cut.jpg", quality=95)
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:2000])
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("no image at all")
    spec = folder if kind == "folder" else (zip_of if kind == "zip" else tar_of)(folder, tmp_path / f"x.{kind}")
    source = pickle.loads(pickle.dumps(open_source(spec)))
    assert load_rgb(source, 2).size == (8, 8)
    for index, key, reason in [(0, "cut.jpg", "truncated"), (1, "empty.png", "empty"), (3, "text.jpg", "not an image")]:
        with pytest.raises(UnreadableImage, match=reason) as caught:
            load_rgb(source, index)
        assert caught.value.key == key


def test_a_vanished_file_and_a_decompression_bomb_are_unreadable(animals, monkeypatch):
    source = open_source(animals)
    (animals / "cat/1.png").unlink()
    with pytest.raises(UnreadableImage, match=r"cat/1\.png: No such file"):
        source.image(0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UnreadableImage, match="decompression bomb"):
        source.image(1)


def test_a_forbidden_file_is_unreadable(animals, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)  # as root, chmod would not refuse
    with pytest.raises(UnreadableImage, match=r"cat/1\.png: Permission denied"):
        open_source(animals).image(0)


def test_a_damaged_zip_member_is_unreadable(tmp_path):
    archive = zip_of(folder_of(tmp_path / "x", ["a.bmp"]), tmp_path / "x.zip", method=zipfile.ZIP_STORED)
    data = bytearray(archive.read_bytes())
    data[150] ^= 255  # a pixel, so only the checksum tells
    archive.write_bytes(data)
    with pytest.raises(UnreadableImage, match=r"a\.bmp: damaged"):
        open_source(archive).image(0)


def test_what_cannot_be_converted_is_unreadable(animals, monkeypatch):
    def fail(image):
        raise ValueError("conversion not supported")

    monkeypatch.setattr("triptych.data.sources.to_rgb", fail)
    with pytest.raises(UnreadableImage, match=r"cat/1\.png: conversion not supported"):
        load_rgb(open_source(animals), 0)


# --- errors of the user ---


def test_a_missing_path_lists_the_data_sets_and_the_nearest_name():
    with pytest.raises(
        UserError, match=r"(?s)'cifar01' is neither.*did you mean.*cifar10.*one of: scenes, imagenet100, cifar10"
    ):
        open_source("cifar01")


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    for i in range(12):
        (tmp_path / f"{i}.json").touch()
    with pytest.raises(UserError, match=r"no images in .*looked for \.jpg .*found instead 12 \.json"):
        open_source(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="found instead no files"):
        open_source(tmp_path / "empty")


def test_a_single_image_is_answered_with_its_folder(animals):
    with pytest.raises(UserError, match=f"give its folder: {animals}/cat"):
        open_source(animals / "cat/1.png")


def test_csv_is_no_list(tmp_path):
    (tmp_path / "x.csv").write_text("a.png,0\n")
    with pytest.raises(UserError, match=r"list of paths \(\.txt, \.lst\); a list has one path per line"):
        open_source(tmp_path / "x.csv")


@pytest.mark.parametrize(("name", "mode"), [("a.tar.gz", "w:gz"), ("a.tgz", "w:gz"), ("a.tar.xz", "w:xz")])
def test_a_compressed_tar_is_refused_with_the_remedy(name, mode, animals, tmp_path):
    with pytest.raises(UserError, match=r"unpack it.*without compression"):
        open_source(tar_of(animals, tmp_path / name, mode=mode))


def test_broken_archives_are_errors(animals, tmp_path):
    whole = tar_of(animals, tmp_path / "whole.tar").read_bytes()
    (tmp_path / "text.zip").write_text("not a zip")
    (tmp_path / "text.tar").write_text("not a tar")
    (tmp_path / "cut.tar").write_bytes(whole[: whole.rindex(b"IEND") - 20])
    (tmp_path / "cut.zip").write_bytes(zip_of(animals, tmp_path / "whole.zip").read_bytes()[:-100])
    for name in ("text.zip", "text.tar", "cut.tar", "cut.zip"):
        with pytest.raises(UserError, match=rf"{name} is broken or no"):
            open_source(tmp_path / name)


# --- subsets and scenes ---


def test_a_subset_keeps_images_labels_and_classes_of_the_chosen(animals):
    whole = open_source(animals)
    part = pickle.loads(pickle.dumps(Subset(whole, [3, 0], " (half)")))
    assert (part.name, len(part), part.classes) == (f"{animals} (half)", 2, whole.classes)
    assert content(part) == [content(whole)[3], content(whole)[0]]
    assert len({part.fingerprint(), whole.fingerprint(), Subset(whole, [0, 3], "").fingerprint()}) == 3


def test_scenes_are_labelled_reproducible_and_held_out():
    source = open_source("scenes:24@7")
    assert (len(source), source.image(0).size, source.name) == (24, (96, 96), "scenes:24@7")
    from triptych.data.scenes import scene

    for index in (0, 23):
        drawn = scene(index, seed=7)
        np.testing.assert_array_equal(np.asarray(source.image(index)), drawn.image)
        assert source.label(index) == drawn.label
    pair = splits("scenes:24@7")
    assert pair is not None
    assert pair[0].fingerprint() == source.fingerprint() != pair[1].fingerprint()
    assert not {pair[0].key(i) for i in range(24)} & {pair[1].key(i) for i in range(24)}
    assert len(open_source("scenes")) == 1000
    assert pickle.loads(pickle.dumps(source)).fingerprint() == source.fingerprint()


@pytest.mark.parametrize("spec", ["scenes:0", "scenes:many", "scenes:5@x"])
def test_malformed_scenes_are_errors(spec):
    with pytest.raises(UserError, match="scenes:N@SEED"):
        open_source(spec)


def test_neither_torch_nor_opencv_is_imported_for_listing_sources():
    code = "import sys, triptych.data.sources; print([m for m in ('torch', 'torchvision', 'cv2') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
    assert {"cifar10", "stl10", "scenes[:N][@SEED]"} <= SOURCES.keys()


# --- torchvision ---


@pytest.fixture
def offline(monkeypatch):
    """Every attempt to reach the network fails, as without a connection."""
    import urllib.error
    import urllib.request

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network in this test")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def cifar10(tmp_path, monkeypatch, offline) -> Path:
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    data = np.arange(2 * 3072).reshape(2, 3072).astype(np.uint8)
    for name, _ in CIFAR10.train_list + CIFAR10.test_list:
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": [3, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{i}" for i in range(10)]}))
    for files in ("train_list", "test_list"):
        sums = [[name, md5(folder / name)] for name, _ in getattr(CIFAR10, files)]
        monkeypatch.setattr(CIFAR10, files, sums)
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5(folder / "batches.meta")})
    return tmp_path


def test_cifar10_opens_from_its_files(cifar10):
    source = open_source(f"cifar10@{cifar10}")
    assert (len(source), source.label(1), source.key(9)) == (10, 9, "train/000009")
    assert source.classes is not None
    assert source.classes[3] == "class3"
    expected = np.arange(3072).astype(np.uint8).reshape(3, 32, 32).transpose(1, 2, 0)
    np.testing.assert_array_equal(np.asarray(load_rgb(source, 0)), expected)
    assert content(pickle.loads(pickle.dumps(source))) == content(source)
    pair = splits(f"cifar10@{cifar10}")
    assert pair is not None
    assert [len(part) for part in pair] == [10, 2]
    assert pair[0].fingerprint() == source.fingerprint()
    assert open_source(f"CIFAR10:test@{cifar10}").fingerprint() == pair[1].fingerprint()


def test_the_root_comes_from_the_environment_and_a_folder_of_the_name_wins(cifar10, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIPTYCH_DATA", str(cifar10))
    monkeypatch.chdir(tmp_path)
    assert len(open_source("cifar10")) == 10
    folder_of(tmp_path / "cifar10", ["a.png"])
    assert len(open_source("cifar10")) == 1
    assert len(open_source("cifar10:train")) == 10


def test_unknown_and_conflicting_splits_list_what_there_is():
    with pytest.raises(UserError, match="cifar10 has no split 'val'; it has train, test"):
        open_source("cifar10:val@/nowhere")
    with pytest.raises(UserError, match="names a split already"):
        open_source("cifar10:train", split="test")


def test_stl10_opens_from_its_files_and_its_unlabelled_part_has_no_labels(tmp_path, monkeypatch, offline):
    from torchvision.datasets import STL10

    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    for number, part in enumerate(("train", "test", "unlabeled")):
        np.full((2, 3, 96, 96), number, np.uint8).tofile(folder / f"{part}_X.bin")
        np.array([1, 10], np.uint8).tofile(folder / f"{part}_y.bin")
    (folder / "class_names.txt").write_text("\n".join(f"class{i}" for i in range(10)))
    for files in ("train_list", "test_list"):
        monkeypatch.setattr(STL10, files, [[name, md5(folder / name)] for name, _ in getattr(STL10, files)])
    pair = splits(f"stl10@{tmp_path}")
    assert pair is not None
    assert [[part.label(i) for i in range(2)] for part in pair] == [[0, 9], [0, 9]]
    assert pair[1].image(0).getpixel((5, 5)) == (1, 1, 1)
    unlabelled = open_source(f"stl10:unlabeled@{tmp_path}")
    assert (unlabelled.classes, unlabelled.label(0), len(unlabelled)) == (None, None, 2)
    both = open_source(f"stl10:train+unlabeled@{tmp_path}")
    assert [both.label(i) for i in range(4)] == [0, 9, None, None]


def test_imagenette_opens_from_its_files_with_one_name_per_class(tmp_path, offline):
    for part in ("train", "val"):
        folder_of(tmp_path / "imagenette2" / part, ["n01440764/a.JPEG", "n02102040/b.JPEG"])
    source = open_source(f"imagenette@{tmp_path}")
    assert (source.classes, source.label(1)) == (("tench", "English springer"), 1)
    assert source.key(0) == "imagenette2/train/n01440764/a.JPEG"
    assert open_source(f"imagenette@{tmp_path}", split="test").key(0).startswith("imagenette2/val/")
    (tmp_path / "imagenette2/train/n02102040/b.JPEG").write_text("damaged")
    with pytest.raises(UnreadableImage, match=r"b\.JPEG: not an image"):
        source.image(1)


def test_oxford_iiit_pet_opens_from_its_files(tmp_path, offline):
    base = tmp_path / "oxford-iiit-pet"
    folder_of(base / "images", ["Abyssinian_1.jpg", "great_dane_2.jpg"])
    (base / "annotations").mkdir()
    for part in ("trainval", "test"):
        (base / f"annotations/{part}.txt").write_text("Abyssinian_1 1 1 1\ngreat_dane_2 2 2 1\n")
    source = open_source(f"oxford-iiit-pet@{tmp_path}")
    assert (source.classes, source.label(1)) == (("Abyssinian", "Great Dane"), 1)
    assert source.key(1) == "oxford-iiit-pet/images/great_dane_2.jpg"
    (base / "annotations/test.txt").write_text("great_dane_2 2 2 1\n")
    pair = splits(f"oxford-iiit-pet@{tmp_path}")
    assert pair is not None
    assert [len(part) for part in pair] == [2, 1]


def test_the_part_to_train_on_is_the_same_alone_and_in_a_pair(tmp_path, monkeypatch):
    asked = []

    class Store:
        keys, labels, classes = ("a",), [0], ("x",)

        def __init__(self, name, split, root):
            asked.append(split_of(name, SETS[name], split))

    monkeypatch.setattr("triptych.data.sources.TorchvisionStore", Store)
    for name, known in SETS.items():
        if known.test:
            open_source(name)
            splits(name)
            assert asked == [known.splits[0], known.splits[0], known.test]
            asked.clear()


@pytest.fixture
def flowers(tmp_path, monkeypatch, offline) -> Path:
    from scipy.io import savemat
    from torchvision.datasets import Flowers102

    base = tmp_path / "flowers-102"
    folder_of(base / "jpg", [f"image_{i:05d}.jpg" for i in (1, 2, 3)])
    savemat(base / "imagelabels.mat", {"labels": [[77, 5, 102]]})
    savemat(base / "setid.mat", {"trnid": [[3, 1]], "valid": [[2, 2]], "tstid": [[1, 2]]})
    sums = {key: (name, md5(base / name)) for key, (name, _) in Flowers102._file_dict.items() if key != "image"}
    monkeypatch.setattr(Flowers102, "_file_dict", {**Flowers102._file_dict, **sums})
    return tmp_path


def test_flowers102_learns_from_train_and_val_as_transfer_does(flowers):
    source = open_source(f"flowers102@{flowers}")
    assert source.classes is not None
    assert len(source.classes) == 102
    assert [(source.key(i)[-9:], source.label(i)) for i in range(4)] == [
        ("00003.jpg", 101),
        ("00001.jpg", 76),
        ("00002.jpg", 4),
        ("00002.jpg", 4),
    ]
    assert source.key(0) == "flowers-102/jpg/image_00003.jpg"
    for i in range(4):
        np.testing.assert_array_equal(
            np.asarray(source.image(i)), np.asarray(Image.open(flowers / source.key(i)).convert("RGB"))
        )
    assert content(pickle.loads(pickle.dumps(source))) == content(source)
    pair = splits(f"flowers102@{flowers}")
    assert pair is not None
    assert pair[0].fingerprint() == source.fingerprint()
    assert [pair[1].label(i) for i in range(2)] == [76, 4]
    assert [len(open_source(f"flowers102:{part}@{flowers}")) for part in ("trainval", "train", "val")] == [4, 2, 2]


def test_a_missing_package_is_named_with_the_command_that_installs_it(flowers, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(UserError, match="pip install scipy"):
        open_source(f"flowers102@{flowers}")


@pytest.mark.parametrize("name", ["cifar10", "mnist", "imagenette", "flowers102", "svhn"])
def test_a_failing_download_names_root_and_remedy(name, tmp_path, offline):
    with pytest.raises(UserError, match=f"not complete in {tmp_path}.*check the network.*{name}@FOLDER"):
        open_source(f"{name}@{tmp_path}")


def test_every_torchvision_set_and_split_is_one_that_torchvision_accepts(tmp_path, offline):
    for name, known in SETS.items():
        for split in known.splits:
            with pytest.raises(UserError, match="not complete in"):
                open_source(f"{name}:{split}@{tmp_path}")
            shutil.rmtree(tmp_path)
