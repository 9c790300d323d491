"""Indices of tar files: written once, used as long as they are right, never trusted further; and sets of shards."""

import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from triptych.data import archives
from triptych.data.sources import load_rgb, open_source, splits
from triptych.errors import UserError

KEYS = ["cat/1.png", "cat/2.png", "dog/3.png", "dog/4.png"]


def pack(target: Path, keys: list[str], first: int = 0) -> Path:
    """A tar file of 8 x 8 pictures; number `first + i` at key i."""
    folder = target.with_suffix(".folder")
    with tarfile.open(target, "w") as archive:
        for i, key in enumerate(keys):
            file = folder / key
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(first + i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file, "PNG")
            archive.add(file, key)
    shutil.rmtree(folder)
    return target


def content(source) -> list:
    return [(source.key(i), source.label(i), np.asarray(load_rgb(source, i)).tolist()) for i in range(len(source))]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def scans(monkeypatch) -> list[Path]:
    """The tar files that were read through."""
    done, scan = [], archives._tar_members
    monkeypatch.setattr(archives, "_tar_members", lambda path: done.append(path) or scan(path))
    return done


def index_of(tar: Path) -> Path:
    return tar.with_name(tar.name + ".index")


def test_a_tar_is_read_through_once_and_gives_the_same_again(tmp_path, scans):
    tar = pack(tmp_path / "a.tar", KEYS)
    first = content(open_source(tar))
    assert index_of(tar).exists()
    assert content(open_source(tar)) == first
    assert scans == [tar]


@pytest.mark.parametrize("names", [["ä.png", "line\nbreak.png"], ["raw\udcff.png", "b.png"]])
def test_odd_names_survive(names, tmp_path, scans):
    tar = pack(tmp_path / "a.tar", names)
    first = content(open_source(tar))
    assert sorted(key for key, *_ in first) == sorted(names)
    assert content(open_source(tar)) == first
    assert len(scans) == 1


def test_a_changed_tar_is_read_again(tmp_path, scans):
    tar = pack(tmp_path / "a.tar", KEYS)
    before = content(open_source(tar))
    pack(tar, KEYS, first=10)  # of the same size
    os.utime(tar, ns=(0, 1))
    after = content(open_source(tar))
    assert after != before
    assert len(scans) == 2
    pack(tar, [*KEYS, "dog/5.png"])
    assert len(open_source(tar)) == 5
    assert len(scans) == 3


def damaged(index: Path) -> dict[str, bytes]:
    whole = index.read_bytes()
    with np.load(index) as stored:
        parts = dict(stored)

    def changed(**arrays) -> bytes:
        np.savez(index.with_suffix(".npz"), **{**parts, **arrays})
        return index.with_suffix(".npz").read_bytes()

    return {
        "empty": b"",
        "cut off": whole[: len(whole) // 2],
        "text": b"no index",
        "pickled": pickle.dumps({"about": parts["about"]}),
        "objects": changed(keys=np.array([object()], dtype=object)),
        "fewer rows": changed(index=parts["index"][:-1]),
        "beyond the end": changed(index=parts["index"] + 10**6),
        "before the start": changed(index=parts["index"] - 10**6),
        "floats": changed(index=parts["index"].astype(float)),
        "other version": changed(about=parts["about"] + [1, 0, 0]),
    }


@pytest.mark.parametrize("kind", range(10))
def test_a_damaged_index_is_made_again(kind, tmp_path, scans):
    tar = pack(tmp_path / "a.tar", KEYS)
    first, whole = content(open_source(tar)), index_of(tar).read_bytes()
    index_of(tar).write_bytes(list(damaged(index_of(tar)).values())[kind])
    assert content(open_source(tar)) == first
    assert len(scans) == 2
    assert len(index_of(tar).read_bytes()) == len(whole)
    assert content(open_source(tar)) == first
    assert len(scans) == 2


def test_where_the_folder_cannot_be_written_the_index_goes_to_the_cache(tmp_path, cache, scans, monkeypatch):
    tar = pack(tmp_path / "a.tar", KEYS)
    replace = Path.replace

    def refuse(self, target):  # as root, chmod would not
        if target == index_of(tar):
            raise PermissionError(13, "Permission denied", str(target))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    first = content(open_source(tar))
    assert [file.parent.name for file in tmp_path.rglob("*.index*")] == ["tar"]
    assert content(open_source(tar)) == first
    assert scans == [tar]


def test_without_any_place_for_it_the_tar_is_read_every_time(tmp_path, scans, monkeypatch):
    tar = pack(tmp_path / "a.tar", KEYS)

    def refuse(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    assert content(open_source(tar)) == content(open_source(tar))
    assert len(scans) == 2
    assert not list(tmp_path.rglob("*.part"))


# --- shards ---


@pytest.fixture
def shards(tmp_path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    pack(folder / "train-1.tar", KEYS[1::2], first=5)
    pack(folder / "train-0.tar", KEYS[::2])
    return folder


@pytest.mark.parametrize("spec", ["shards", "shards/*.tar", "shards/train-[01].tar"])
def test_a_folder_or_pattern_of_tars_is_one_source(spec, shards, tmp_path):
    source = open_source(tmp_path / spec)
    assert [source.key(i) for i in range(4)] == KEYS
    assert source.classes == ("cat", "dog")
    assert [source.label(i) for i in range(4)] == [0, 0, 1, 1]
    alone = {key: pixels for tar in shards.glob("*.tar") for key, _, pixels in content(open_source(tar))}
    assert {key: pixels for key, _, pixels in content(source)} == alone
    again = pickle.loads(pickle.dumps(source))
    assert content(again) == content(source)
    assert again.fingerprint() == source.fingerprint()
    assert open_source(tmp_path / spec).name == str(tmp_path / spec)


def test_indices_beside_shards_are_no_images(shards, scans):
    open_source(shards)
    assert len(list(shards.glob("*.index"))) == 2
    assert len(open_source(shards)) == 4
    assert len(scans) == 2


def test_splits_may_lie_across_shards(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    pack(folder / "0.tar", ["set/train/cat/1.png", "set/val/dog/2.png"])
    pack(folder / "1.tar", ["set/train/dog/3.png", "set/val/cat/4.png"])
    for spec in (folder, f"{folder}/?.tar"):
        pair = splits(spec)
        assert pair is not None
        assert [[part.key(i) for i in range(2)] for part in pair] == [
            ["set/train/cat/1.png", "set/train/dog/3.png"],
            ["set/val/cat/4.png", "set/val/dog/2.png"],
        ]
        assert open_source(spec, split="test").fingerprint() == pair[1].fingerprint()


def test_a_folder_with_anything_else_is_a_folder_of_images(shards):
    Image.new("RGB", (8, 8)).save(shards / "a.png")
    source = open_source(shards)
    assert [source.key(i) for i in range(len(source))] == ["a.png"]


def test_an_image_in_two_shards_is_an_error_that_names_them(shards):
    pack(shards / "train-2.tar", ["dog/9.png", KEYS[2]])
    with pytest.raises(UserError, match=r"train-0.tar and train-2.tar both have dog/3.png"):
        open_source(shards)


def test_a_pattern_that_fits_no_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"no file is named like .*nothing-\*\.tar"):
        open_source(tmp_path / "nothing-*.tar")


def test_many_shards_do_not_need_as_many_open_files(shards, monkeypatch):
    monkeypatch.setattr(archives, "_HANDLES", 1)
    source = open_source(shards)
    assert content(source) == content(source)
    assert len(source.open_store._reader._files) == 1
