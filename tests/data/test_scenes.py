"""The built-in data set: reproducible, truthfully masked, and not to be told apart by colour."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from triptych.data.scenes import CLASSES, TEST_START, clip, scene, write
from triptych.errors import UserError

TRAIN, TEST = 400, 200


@pytest.fixture(scope="module")
def split():
    """Images and labels of 400 training and 200 test scenes, at 64 pixels."""
    train = [scene(i, size=64) for i in range(TRAIN)]
    return train, [scene(TEST_START + i, size=64) for i in range(TEST)]


def vote(distance, train, test, k=10):
    """Share of test scenes whose class most of the k nearest training scenes have; chance is 0.125."""
    votes = np.eye(len(CLASSES))[[s.label for s in train]][np.argsort(distance, axis=1)[:, :k]].sum(1)
    return float(np.mean(votes.argmax(1) == [s.label for s in test]))


def knn_accuracy(train, test, feature):
    """`vote` by the cosine of centred features."""
    a, b = (np.stack([feature(s.image) for s in part]).astype(np.float64) for part in (train, test))
    a, b = a - a.mean(0), b - a.mean(0)
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    return vote(-b @ a.T, train, test)


def colour_histogram(image):
    return np.concatenate([np.histogram(image[..., c], 8, (0, 256))[0] for c in range(3)])


def joint_colour_histogram(image):
    return np.histogramdd(image.reshape(-1, 3), (4, 4, 4), [(0, 256)] * 3)[0].ravel()


def raw_pixels(image):
    return cv2.resize(image, (16, 16), interpolation=cv2.INTER_AREA).ravel()


def spectrum_by_frequency(image):
    """Mean and peak of the middle's grey spectrum at each frequency: blind to colour, contrast, place and angle."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)[16:48, 16:48]
    grey = (grey - grey.mean()) / grey.std() * np.outer(np.hanning(32), np.hanning(32))
    spectrum = np.abs(np.fft.fftshift(np.fft.fft2(grey)))
    frequency = np.hypot(*(np.indices((32, 32)) - 16)).round()
    return np.log1p([f(spectrum[frequency == r]) for r in range(1, 14) for f in (np.mean, np.max)])


@pytest.mark.parametrize("index", [0, 5, TEST_START + 3])
def test_a_scene_depends_only_on_its_arguments(index):
    first = scene(index, seed=7, size=48)
    np.random.seed(1)  # global random state must not matter, nor what was drawn in between
    scene(99)
    again = scene(index, seed=7, size=48)
    assert first.image.tobytes() == again.image.tobytes()
    assert first.mask.tobytes() == again.mask.tobytes()
    for other in (scene(index + 8, seed=7, size=48), scene(index, seed=8, size=48)):
        assert np.abs(first.image.astype(int) - other.image).mean() > 20


@pytest.mark.parametrize("size", [16, 64, 97, 224])
def test_arrays_have_the_promised_shapes_and_types(size):
    one, film = scene(3, size=size), clip(3, size=size, frames=2)
    assert (one.image.shape, one.image.dtype) == ((size, size, 3), np.uint8)
    assert (one.mask.shape, one.mask.dtype) == ((size, size), np.uint8)
    assert (film.frames.shape, film.frames.dtype) == ((2, size, size, 3), np.uint8)
    assert (film.masks.shape, film.masks.dtype) == ((2, size, size), np.uint8)


def test_another_size_gives_the_same_composition():
    for i in range(8):
        small, large = scene(i, size=64), scene(i, size=192)
        shrunk = cv2.resize(large.image, (64, 64), interpolation=cv2.INTER_AREA)
        assert np.mean(large.mask[1::3, 1::3] == small.mask) > 0.98
        assert np.corrcoef(shrunk.ravel(), small.image.ravel())[0, 1] > 0.9


def test_the_mask_marks_the_object_and_its_class(split):
    for i, one in enumerate(split[0][:160]):
        assert one.label == i % len(CLASSES)
        assert set(np.unique(one.mask)) == {0, 1 + one.label}
        assert 0.2 < np.mean(one.mask > 0) < 0.5


def edge_strength(one, right, down):
    """Mean grey step across the border of the mask moved by so many pixels, the picture's rim left out."""
    grey = cv2.cvtColor(one.image, cv2.COLOR_RGB2GRAY).astype(int)[4:-4, 4:-4]
    moved = np.roll(one.mask, (down, right), (0, 1)).astype(int)[4:-4, 4:-4]
    return np.mean([np.abs(np.diff(grey, axis=a))[np.diff(moved, axis=a) != 0].mean() for a in (0, 1)])


def test_the_mask_lies_on_the_drawn_edge(split):
    moves = [(right, down) for right in range(-2, 3) for down in range(-2, 3)]
    strength = {move: np.mean([edge_strength(one, *move) for one in split[0][:64]]) for move in moves}
    assert max(strength, key=strength.__getitem__) == (0, 0)


def test_size_and_place_do_not_tell_the_class(split):
    def area_and_centre(part):
        return np.array([[np.mean(s.mask > 0), *np.argwhere(s.mask).mean(0) / 64] for s in part])

    train, test = map(area_and_centre, split)
    distance = np.linalg.norm((test[:, None] - train) / train.std(0), axis=-1)
    assert vote(distance, split[0], split[1]) < 0.3


def mean_colour(image):
    return image.mean((0, 1))


@pytest.mark.parametrize("feature", [mean_colour, colour_histogram, joint_colour_histogram])
def test_colour_alone_does_not_tell_the_class(split, feature):
    assert knn_accuracy(split[0], split[1], feature) < 0.28  # measured over two seeds: 0.10 to 0.21


def test_raw_pixels_hardly_tell_the_class(split):
    assert knn_accuracy(split[0], split[1], raw_pixels) < 0.45  # measured over two seeds: 0.33 to 0.37


def test_texture_tells_the_class(split):
    assert knn_accuracy(split[0], split[1], spectrum_by_frequency) > 0.8  # measured over two seeds: 0.90 and 0.94


def test_clips_move_smoothly_and_masks_follow():
    for i in range(16):
        film = clip(i, size=64, frames=12)
        assert film.label == i % len(CLASSES)
        centres = np.array([np.argwhere(m).mean(0) for m in film.masks]) / 64
        steps = np.diff(centres, axis=0)
        assert np.linalg.norm(steps, axis=1).max() < 0.07
        assert np.linalg.norm(np.diff(steps, axis=0), axis=1).max() < 0.03
        assert np.linalg.norm(steps, axis=1).sum() > 0.1
        for mask in film.masks:
            assert set(np.unique(mask)) == {0, 1 + film.label}
            assert 0.1 < np.mean(mask > 0) < 0.35


def test_what_moves_in_a_clip_is_under_the_mask():
    inside, outside = [], []
    for i in range(16):
        film = clip(i, size=64)
        change = np.abs(np.diff(film.frames.astype(int), axis=0)).mean(-1)
        moving = (film.masks[1:] > 0) | (film.masks[:-1] > 0)
        inside.append(change[moving].mean())
        outside.append(change[~moving].mean())
    assert np.mean(inside) > 2.5 * np.mean(outside)


def test_a_longer_clip_begins_with_the_shorter_one():
    short, long = clip(2, seed=3, size=48, frames=3), clip(2, seed=3, size=48, frames=6)
    assert short.frames.tobytes() == long.frames[:3].tobytes()
    assert short.masks.tobytes() == long.masks[:3].tobytes()


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_write_lays_out_train_test_masks_and_clips(tmp_path):
    write(tmp_path, train=9, test=2, clips=2, seed=5, size=32)
    scenes = {f"train/{CLASSES[i % 8]}/{i:05d}" for i in range(9)} | {"test/disc/00000", "test/triangle/00001"}
    frames = {f"{i:05d}/{t:02d}" for i in range(2) for t in range(8)}
    assert files(tmp_path) == (
        {f"{s}.jpg" for s in scenes}
        | {f"masks/{s}.png" for s in scenes}
        | {f"clips/{f}.jpg" for f in frames}
        | {f"clip_masks/{f}.png" for f in frames}
    )


def test_written_files_hold_the_scenes_and_exact_masks(tmp_path):
    write(tmp_path, train=2, test=2, clips=1, seed=5, size=64)
    film = clip(0, seed=5, size=64)
    expected = {
        "train/triangle/00001": ("masks/train/triangle/00001", scene(1, seed=5, size=64)),
        "test/triangle/00001": ("masks/test/triangle/00001", scene(TEST_START + 1, seed=5, size=64)),
    }
    pairs = [(a, b, s.image, s.mask) for a, (b, s) in expected.items()]
    pairs.append(("clips/00000/07", "clip_masks/00000/07", film.frames[7], film.masks[7]))
    for image_name, mask_name, image, mask in pairs:
        with Image.open(tmp_path / f"{image_name}.jpg") as stored:  # another decoder: channels must not be swapped
            assert np.abs(np.asarray(stored).astype(int) - image).mean() < 12
        with Image.open(tmp_path / f"{mask_name}.png") as stored:
            assert np.array_equal(np.asarray(stored), mask)


def test_test_scenes_are_not_training_scenes(tmp_path):
    write(tmp_path, train=16, test=16, size=32)
    train, test = ({p.read_bytes() for p in (tmp_path / s).rglob("*.jpg")} for s in ("train", "test"))
    assert len(train) == len(test) == 16
    assert not train & test


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda folder: scene(0, size=15), "size is 15.* at least 16"),
        (lambda folder: scene(-1), "index is -1.* at least 0"),
        (lambda folder: scene(0, seed=-2), "seed is -2.* at least 0"),
        (lambda folder: clip(0, frames=0), "frames is 0.* at least 1"),
        (lambda folder: write(folder, train=-1, test=0), "train is -1.* at least 0"),
        (lambda folder: write(folder, train=8, test=8, clips=-3), "clips is -3.* at least 0"),
        (lambda folder: write(folder, train=8, test=8, size=8), "size is 8.* at least 16"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(call, said, tmp_path):
    with pytest.raises(UserError, match=said):
        call(tmp_path)
    assert not files(tmp_path)
