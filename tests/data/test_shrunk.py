"""The cache of smaller images: same pictures, made once, gone on with, never taken for more than it is."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from triptych.data import shrunk as module
from triptych.data.images import UnreadableImage
from triptych.data.loader import ViewDataset, ViewsConfig
from triptych.data.pixels import Picture
from triptych.data.shrunk import shrunk
from triptych.data.sources import load_rgb, open_source
from triptych.data.views import ViewSpec
from triptych.errors import UserError

SIZES = [(60, 80), (200, 90), (20, 31), (64, 64), (33, 400)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pixels"


@pytest.fixture
def source(tmp_path):
    """Five pictures in two classes, and one file that is none."""
    for i, (height, width) in enumerate(SIZES):
        small = np.random.default_rng(i).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        file = tmp_path / "data" / ("a" if i < 2 else "b") / f"{i}.{'jpg' if i % 2 else 'png'}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(file)
    (tmp_path / "data" / "b" / "broken.jpg").write_bytes(b"broken")
    return open_source(tmp_path / "data")


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """Indices of the images that were made smaller."""
    done, get = [], module._Shrinking.__getitem__
    monkeypatch.setattr(module._Shrinking, "__getitem__", lambda self, i: done.append(self.start + i) or get(self, i))
    return done


@pytest.mark.parametrize("workers", [0, 2])
def test_images_have_the_side_asked_for_and_show_the_same(source, workers):
    small = shrunk(source, 32, workers=workers)
    assert (len(small), small.name, small.classes) == (6, source.name, source.classes)
    for i, (height, width) in enumerate(SIZES):
        factor = min(1, 32 / min(height, width))
        size = round(factor * width), round(factor * height)
        image = small.image(i)
        assert image.size == size
        whole = load_rgb(source, i)
        expected = whole.resize((size[0], height), Image.Resampling.BICUBIC).resize(size, Image.Resampling.BICUBIC)
        difference = np.abs(np.asarray(image).astype(int) - np.asarray(expected))
        assert difference.max() <= 2
        assert difference.mean() < 0.2
        assert (small.label(i), small.key(i)) == (source.label(i), source.key(i))
    assert len({small.fingerprint(), source.fingerprint(), shrunk(source, 48).fingerprint()}) == 3


def test_an_unreadable_image_is_still_reported_by_the_source(source):
    small = shrunk(source, 32, workers=0)
    with pytest.raises(UnreadableImage, match=r"broken\.jpg: not an image"):
        Picture(small, 5)
    views = ViewsConfig(global_size=16, local_size=8, local_crops=1)
    sample = ViewDataset(small, views, ViewSpec(), 8, 0)[0, 5]
    assert sample.unreadable == ("b/broken.jpg: not an image, or of a format that Pillow cannot read",)
    assert torch.equal(sample.pixel, torch.tensor([1 / 32, 1 / 43]))  # image 0 stands in, at its smaller size


def test_it_is_made_once(source, decoded):
    shrunk(source, 32, workers=0)
    assert decoded == [*range(6)]
    shrunk(source, 32, workers=0)
    assert len(decoded) == 6
    shrunk(source, 24, workers=0)
    assert len(decoded) == 12


class Killed(Exception):
    pass


@pytest.mark.parametrize("lost", ["nothing", "half a row of sizes", "all pixels"])
def test_what_was_interrupted_goes_on(source, decoded, lost, monkeypatch, cache):
    monkeypatch.setattr(module, "_BATCH", 2)
    whole = shrunk(source, 40, workers=0)
    expected = [np.asarray(whole.image(i)) for i in range(5)]
    for file in cache.glob("*"):
        file.unlink()
    decoded.clear()

    def kill(images: int, size: int) -> None:
        if images == 4:
            raise Killed

    with pytest.raises(Killed):
        shrunk(source, 40, workers=0, show=kill)
    (pixels,), (sizes,) = cache.glob("*.rgb.part"), cache.glob("*.sizes.part")
    with pixels.open("ab") as file:
        file.write(b"of the next image")
    if lost == "half a row of sizes":
        sizes.write_bytes(sizes.read_bytes()[:-5])
    if lost == "all pixels":
        pixels.write_bytes(b"")
    decoded.clear()
    shown: list[tuple[int, int]] = []
    again = shrunk(source, 40, workers=0, show=lambda *at: shown.append(at))
    assert decoded == list(range({"nothing": 4, "half a row of sizes": 3, "all pixels": 0}[lost], 6))
    assert all(np.array_equal(np.asarray(again.image(i)), expected[i]) for i in range(5))
    assert shown[-1] == (6, sum(e.size for e in expected))
    assert not list(cache.glob("*.part"))


def test_another_data_set_has_another_cache(source, tmp_path, decoded):
    shrunk(source, 32, workers=0)
    Image.new("RGB", (70, 70)).save(tmp_path / "data" / "a" / "0.png")
    changed = open_source(tmp_path / "data")
    assert shrunk(changed, 32, workers=0).image(0).size == (32, 32)
    assert len(decoded) == 12


class Pixels:
    def __init__(self, source):
        self.source = source

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return self.source.stored(index).astype(int).sum()


def test_workers_map_the_file_themselves(source):
    small = shrunk(source, 32, workers=0)
    expected = [int(np.asarray(small.image(i)).astype(int).sum()) for i in range(5)]
    pickled = pickle.dumps(small)
    assert len(pickled) < 4000
    assert [int(pickle.loads(pickled).stored(i).astype(int).sum()) for i in range(5)] == expected
    loaded = DataLoader(Pixels(small), batch_size=None, num_workers=2)  # pyright: ignore[reportArgumentType]
    assert [int(x) for x in loaded] == expected


def test_a_place_that_cannot_be_written_is_an_error_with_remedies(source, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot write .*set TRIPTYCH_CACHE .* leave --loader.cache_side out"):
        shrunk(source, 32, workers=0)
