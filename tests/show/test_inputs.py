"""What is shown: files, folders, videos, places in them."""

import cv2
import numpy as np
import pytest
from PIL import Image

from triptych.data.sources import open_source
from triptych.errors import UserError
from triptych.show.inputs import Fit, Picture, Place, open_film, open_images, pictures, spread


def write_video(path, values=(0, 60, 120, 180, 240), size=(32, 24), rate=10):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), rate, size)
    for value in values:
        writer.write(np.full((size[1], size[0], 3), value, np.uint8))
    writer.release()


@pytest.mark.parametrize(
    ("shape", "square", "expected"),
    [
        ((480, 854), False, (272, 480)),  # 269.8 is 16.9 patches
        ((854, 480), False, (480, 272)),
        ((30, 40), False, (352, 480)),  # small ones are enlarged; 360 = 22.5 patches, the even number
        ((3, 400), False, (16, 480)),  # at least one patch
        ((480, 854), True, (480, 480)),
    ],
)
def test_the_longer_side_is_the_size_and_both_are_whole_patches(shape, square, expected):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    picture = Fit(480, 16, square)("x", pixels)
    assert picture.pixels.shape == (*expected, 3)
    assert picture.original == shape


@pytest.mark.parametrize(("n", "count"), [(1, 4), (4, 4), (5, 4), (100, 8), (1000, 7)])
def test_a_spread_is_even_whatever_the_length(n, count):
    kept = spread(iter(range(n)), count)
    assert len(kept) == min(n, count)
    assert kept[0] == 0
    gaps = np.diff(kept)
    assert len(gaps) == 0 or gaps.max() <= 2 * gaps.min()
    assert n - kept[-1] <= 2 * max([1, *gaps])  # and reaches the end


def test_a_spread_never_holds_more_than_twice_its_count():
    alive, most = set(), 0

    class Frame:
        def __init__(self, i):
            nonlocal most
            self.i = i
            alive.add(i)
            most = max(most, len(alive))

        def __del__(self):
            alive.discard(self.i)

    spread((Frame(i) for i in range(500)), 5)
    assert most <= 2 * 5 + 1


def test_pixels_and_shares_name_the_same_patch():
    picture = Picture("x", np.zeros((32, 64, 3), np.uint8), (100, 200))
    assert Place.read("199,0").patch(picture, (4, 8)) == (0, 7)
    assert Place.read("1.0,0.0").patch(picture, (4, 8)) == (0, 7)
    assert Place.read(" 0.5, .5").patch(picture, (4, 8)) == (2, 4)
    assert Place.read("100,50").patch(picture, (4, 8)) == (2, 4)
    assert Place.read("24,24").patch(picture, (4, 8)) == (0, 0)
    assert Place.read("25,25").patch(picture, (4, 8)) == (1, 1)


@pytest.mark.parametrize("text", ["", "3", "a,b", "-1,2", "1.5,0.2", "0.5,7", "1,2,3"])
def test_a_place_is_two_numbers_of_one_kind(text):
    with pytest.raises(UserError, match=r"0\.5,0\.25"):
        Place.read(text)


def test_a_place_outside_the_image_is_refused_with_its_size():
    picture = Picture("cat.jpg", np.zeros((32, 64, 3), np.uint8), (100, 200))
    with pytest.raises(UserError, match=r"cat.jpg, which is 200 pixels wide and 100 high"):
        Place.read("200,5").patch(picture, (4, 8))


def test_a_video_file_gives_its_frames_and_rate(tmp_path):
    write_video(tmp_path / "v.mp4")
    film = open_film([str(tmp_path / "v.mp4")], None)
    assert (film.rate, len(film)) == (10, 5)
    assert [round(float(f.mean()), -1) for f in film] == [0, 60, 120, 180, 240]
    assert open_film([str(tmp_path / "v.mp4")], 3).rate == 3


def test_a_gif_is_a_video_where_it_moves(tmp_path):
    frames = [Image.new("RGB", (20, 10), (v, v, v)) for v in (0, 100, 200)]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:], duration=100)
    frames[0].save(tmp_path / "still.gif")
    assert [round(float(f.mean()), -1) for f in open_film([str(tmp_path / "moves.gif")], None)] == [0, 100, 200]
    assert open_film([str(tmp_path / "still.gif")], None) is None


def test_a_folder_of_frames_is_a_video_in_the_order_of_its_names(tmp_path):
    for i, value in enumerate((0, 80, 160)):
        Image.new("RGB", (16, 16), (value,) * 3).save(tmp_path / f"{i:05}.png")
    assert open_film([str(tmp_path)], None) is None
    film = open_film([str(tmp_path)], 24)
    assert (film.rate, [int(f.mean()) for f in film]) == (24, [0, 80, 160])


def test_what_is_no_video_or_not_alone_is_refused(tmp_path):
    (tmp_path / "v.mp4").write_text("no video")
    with pytest.raises(UserError, match="cannot be read as a video"):
        open_film([str(tmp_path / "v.mp4")], None)
    with pytest.raises(UserError, match="no other input"):
        open_film([str(tmp_path / "v.mp4"), "x.png"], None)


def test_named_files_are_all_shown_and_must_be_readable(tmp_path):
    for name in "ab":
        Image.new("RGB", (9, 9)).save(tmp_path / f"{name}.png")
    source, named = open_images([str(tmp_path / f"{name}.png") for name in "ba"])
    fit = Fit(16, 4)
    shown = [p.name for p in pictures(source, fit, named=named, count=1, seed=0)]
    assert [n[-5:] for n in shown] == ["b.png", "a.png"]
    (tmp_path / "a.png").write_text("x")
    with pytest.raises(UserError, match=r"a\.png: not an image"):
        list(pictures(source, fit, named=named, count=1, seed=0))
    with pytest.raises(UserError, match=r"c\.png does not exist"):
        open_images([str(tmp_path / "c.png"), str(tmp_path / "b.png")])


def test_a_folders_images_are_drawn_by_the_seed_and_unreadable_ones_replaced(tmp_path):
    for i in range(12):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i:02}.png")

    def names(count, seed):
        source, named = open_images([str(tmp_path)])
        return [p.name for p in pictures(source, Fit(8, 4), named=named, count=count, seed=seed)]

    assert names(99, 0) == [f"{i:02}.png" for i in range(12)]
    first = names(5, 0)
    assert first == names(5, 0) != names(5, 1)
    (tmp_path / first[2]).write_text("x")
    replaced = names(5, 0)
    assert len(replaced) == 5
    assert replaced[:4] == [n for n in first if n != first[2]]
    for file in tmp_path.iterdir():
        file.write_text("x")
    with pytest.raises(UserError, match="no image of"):
        names(5, 0)
    assert len(open_source(tmp_path)) == 12
