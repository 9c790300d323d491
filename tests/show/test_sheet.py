"""The look: nothing is cut off, colours stay apart for colour-blind people, files are whole or absent."""

from itertools import combinations

import cv2
import numpy as np
import pytest
from PIL import Image

from triptych.errors import UserError
from triptych.show.colours import ORDER, PALETTE, heat, three
from triptych.show.saving import check_out, save_film, save_picture
from triptych.show.sheet import INK, Panel, Scale, Tile, resized, sheet, shortened, side_for, wide
from triptych.show.tiles import classes_tile, heat_tile, marked, mask_tile, matches_tile

# Machado, Oliveira and Fernandes 2009, severity 1: linear RGB -> what is seen.
BLIND = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def seen(colours: np.ndarray, eye: str | None) -> np.ndarray:
    """(..., 3) uint8 -> CIE Lab (..., 3) of what an eye sees."""
    x = colours.astype(np.float64) / 255
    linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    if eye:
        linear = (linear @ np.array(BLIND[eye]).T).clip(0, 1)
    x = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return cv2.cvtColor(x.astype(np.float32).reshape(1, -1, 3), cv2.COLOR_RGB2Lab).reshape(colours.shape)


EYES = [None, *BLIND]


@pytest.mark.parametrize("eye", EYES)
def test_all_categories_stay_apart_in_every_eye(eye):
    """A difference of 2.3 in Lab is just noticed."""
    lab = seen(np.array(ORDER, np.uint8), eye)
    for (a, b), (x, y) in zip(combinations(PALETTE, 2), combinations(lab, 2), strict=True):
        assert np.linalg.norm(x - y) > 15, (a, b)


@pytest.mark.parametrize("eye", EYES)
def test_clusters_stay_apart_whatever_lies_below_them(eye):
    """Also one over black from another over white: dark and light blue, say."""
    grounds = [np.full((8, 64, 3), below, np.uint8) for below in (0, 128, 255)]
    lab = [seen(classes_tile(pixels, np.arange(8)[None])[4, 4::8], eye) for pixels in grounds]
    for a, b in combinations(range(8), 2):
        least = 15 if b < 3 else 7
        assert min(np.linalg.norm(x[a] - y[b]) for x in lab for y in lab) > least, (a, b)


@pytest.mark.parametrize("eye", EYES)
def test_a_larger_value_is_lighter_in_every_eye(eye):
    lightness = seen(heat(np.linspace(0, 1, 64)[None])[0], eye)[:, 0]
    assert (np.diff(lightness) > 0).all()
    assert lightness[-1] - lightness[0] > 60


@pytest.mark.parametrize("eye", EYES[:3])
def test_who_cannot_tell_red_from_green_still_sees_two_components(eye):
    centre = np.full(3, 0.5)
    for axis in (0, 1):
        ends = np.array([[np.where(np.arange(3) == axis, end, centre) for end in (0, 1)]])
        x, y = seen(three(ends)[0], eye)
        assert np.linalg.norm(x - y) > 40


def test_overlays_follow_the_patches_and_leave_the_rest_grey():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    mask = np.array([[True, False, False], [False, False, True]])
    tile = mask_tile(pixels, mask)
    grey = np.ptp(tile.astype(int), axis=2) == 0
    for r in range(8):
        for c in range(12):
            assert grey[r, c] != mask[r // 4, c // 4]
    values = np.array([[0.0, 0.5, 1.0]])
    tile = heat_tile(values, (4, 9))
    for c in range(9):
        assert (tile[:, c] == heat(values)[0, c // 3]).all()


def test_a_ring_marks_the_patch_and_lines_join_patches():
    pixels = np.full((64, 96, 3), 128, np.uint8)
    changed = (marked(pixels, (1, 4), (4, 6)) != pixels).any(-1)
    rows, columns = changed.nonzero()
    assert abs(rows.mean() - 24) < 1  # the middle of row 1 of 16 px
    assert abs(columns.mean() - 72) < 1
    assert not changed[24, 72]  # a ring: the patch itself stays visible
    both = matches_tile(pixels, pixels[:32], ((4, 6), (2, 6)), (np.array([[0, 0]]), np.array([[1, 5]])))
    assert both.shape == (64, 96 + 12 + 96, 3)
    assert tuple(both[8, 8]) == tuple(both[24, 108 + 88]) == ORDER[0]
    assert (both[40:, 108:] == 255).all()  # below the smaller image: the white ground


def tile(title="image", height=30, width=50, note="") -> Tile:
    return Tile(title, np.zeros((height, width, 3), np.uint8), note)


def ink(image: Image.Image) -> np.ndarray:
    """Where something is drawn: (H, W) bool."""
    return (np.asarray(image) < 200).any(-1)


def test_nothing_touches_the_edge_however_long_the_texts():
    long = "a title that is wider than its tile"
    panels = [Panel("folder/" * 30 + "name.jpg", [tile(long, note="0.98 " + "x" * 99), tile()]) for _ in range(5)]
    for width in (1, 300, 900):
        drawn = ink(sheet(panels, about="What the colours mean, at length. " * 8, scale=Scale("0", "1"), width=width))
        edges = [drawn[0], drawn[-1], drawn[:, 0], drawn[:, -1]]
        assert not any(edge.any() for edge in edges)


def test_every_title_is_whole_even_where_it_is_wider_than_its_tile():
    """The same dark pixels as the text drawn alone."""
    from PIL import ImageDraw

    from triptych.show.sheet import _font

    title = "attention of class+ in the last block"
    out = np.asarray(sheet([Panel("", [tile(), tile(title)])]))
    alone = Image.new("RGB", (wide(title), 18), "white")
    ImageDraw.Draw(alone).text((0, 0), title, fill=INK, font=_font(13))
    count = (np.asarray(alone) < 255).any(-1).sum()
    assert (out[6:24, 62:] < 255).any(-1).sum() == count > 100


def test_long_names_lose_their_middle():
    name = "a/very/long/path/to/some/folder/n01440764_10026.JPEG"
    short = shortened(name, 150)
    assert wide(short) <= 150
    head, tail = short.split("…")
    assert name.startswith(head)
    assert name.endswith(tail)
    assert tail.endswith("10026.JPEG")
    assert shortened(name, 5000) == name
    assert shortened("two\nlines", 500) == "two lines"
    assert shortened(name, 1) == ""


def test_panels_stand_side_by_side_as_far_as_the_width_goes():
    panels = [Panel(f"{i}", [tile(), tile()]) for i in range(7)]
    one, three_across = sheet(panels, width=1), sheet(panels, width=400)
    assert one.width < 200 < three_across.width <= 400
    assert one.height > 2 * three_across.height


def test_tiles_are_resized_to_one_longer_side_and_maps_keep_sharp_edges():
    sharp = Tile("", np.repeat(np.array([[[0] * 3, [255] * 3]], np.uint8), 2, 0), smooth=False)
    a, b = resized(Panel("", [sharp, tile(height=80, width=40)]), 60).tiles
    assert (a.pixels.shape[:2], b.pixels.shape[:2]) == ((60, 60), (60, 30))
    assert set(np.unique(a.pixels)) == {0, 255}
    assert side_for(Panel("", [tile()] * 10), 480, width=2400) == 233
    assert side_for(Panel("", [tile()] * 2), 480, width=2400) == 480


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_pictures_are_written_under_their_own_name_only(tmp_path, suffix):
    out = tmp_path / f"x{suffix}"
    save_picture(sheet([Panel("", [tile()])]), out)
    assert Image.open(out).width == 62
    assert list(tmp_path.iterdir()) == [out]


def test_a_video_that_fails_half_way_leaves_the_old_file(tmp_path):
    out = tmp_path / "x.mp4"
    out.write_text("old")

    def frames():
        yield np.zeros((20, 30, 3), np.uint8)
        raise UserError("a frame cannot be read")

    with pytest.raises(UserError, match="a frame"):
        save_film(frames(), 10, out)
    with pytest.raises(UserError, match="no frames"):
        save_film([], 10, out)
    assert out.read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_a_video_has_its_frames_its_rate_and_even_sides(tmp_path):
    values = (40, 90, 140, 190)
    codec = save_film([np.full((21, 33, 3), v, np.uint8) for v in values], 12.5, tmp_path / "x.mp4")
    capture = cv2.VideoCapture(str(tmp_path / "x.mp4"))
    assert capture.get(cv2.CAP_PROP_FPS) == 12.5
    read = [frame for ok, frame in (capture.read() for _ in range(5)) if ok]
    assert [frame.shape for frame in read] == [(22, 34, 3)] * 4
    assert [round(float(frame.mean())) for frame in read] == pytest.approx(values, abs=4)
    assert codec


@pytest.mark.parametrize(("name", "film"), [("x.mp4", False), ("x.tiff", True), ("x", False), ("", True)])
def test_what_cannot_be_written_is_refused(tmp_path, name, film):
    with pytest.raises(UserError, match=r"\.png"):
        check_out(tmp_path / name, film=film)
