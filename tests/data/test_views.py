"""Geometry: the authors' crops and maps, and what a projection must do."""

import numpy as np
import pytest
import torch

from triptych.data.crops import Box, Crop, local_reference, random_crop, steer, stratified_sample
from triptych.data.views import View, between, ends_box, project, token_positions


def pixels(box, height: int, width: int) -> Box:
    """A released box (first and last pixel over height - 1, width - 1) in pixels."""
    y0, x0, y1, x1 = (float(v) for v in box)
    return Box(round(y0 * (height - 1)), round(x0 * (width - 1)), round(y1 * (height - 1)), round(x1 * (width - 1)))


def test_steered_crops_equal_the_authors(golden):
    g = golden("udi_crop_geometry")
    for n in range(400):
        height, width, h, w = (int(g[k][n]) for k in ("H", "W", "h", "w"))
        i, j = int(g["prop_i"][n]), int(g["prop_j"][n])
        if g["fallback"][n]:  # no try fitted: the proposal is the centred crop
            i, j = (height - h) // 2, (width - w) // 2
        moved = steer(Crop(i, j, h, w), pixels(g["ref"][n], height, width), height, width, "official")
        assert (moved.i, moved.j) == (int(g["i"][n]), int(g["j"][n]))


def test_crop_sizes_follow_the_drawn_area_and_aspect(golden):
    g = golden("udi_crop_geometry")

    class Draws:
        def __init__(self, *values):
            self.values = iter(values)

        def uniform(self, low, high):
            return next(self.values)

        def integers(self, low, high):
            return 0

    for n in np.flatnonzero(~g["fallback"].numpy()):
        draws = Draws(float(g["area_frac"][n]), float(g["log_ratio"][n]))
        crop = random_crop(int(g["H"][n]), int(g["W"][n]), (0, 1), draws)
        assert (crop.h, crop.w) == (int(g["h"][n]), int(g["w"][n]))


@pytest.mark.parametrize("grid", ["g14w3", "l6w2", "f9w3", "f7w2"])
def test_stratified_samples_equal_the_authors(golden, grid):
    g = golden("udi_sampling_mask")
    side, window = int(g[f"{grid}.feature_size"]), int(g[f"{grid}.window"])
    cells = side // window

    class Draws:
        def __init__(self, offsets, corner):
            self.offsets, self.corner = offsets, corner

        def integers(self, low, high, shape=None):
            return self.offsets if shape else self.corner

    for offsets, corner, mask in zip(
        g[f"{grid}.offset_in_cell"], g[f"{grid}.corner_draw"], g[f"{grid}.mask"], strict=True
    ):
        draws = Draws(offsets.view(cells, cells).numpy(), max(0, int(np.floor(float(corner) * 4))))
        assert stratified_sample((side, side), window, draws).tolist() == mask.nonzero()[:, 0].tolist()


def test_one_patch_is_drawn_from_every_window():
    rng = np.random.default_rng(0)
    for _ in range(50):
        y, x = np.divmod(stratified_sample((6, 6), 2, rng), 6)
        assert sorted(zip(y // 2, x // 2, strict=True)) == [(a, b) for a in range(3) for b in range(3)]


def test_projection_maps_equal_the_authors(golden):
    g = golden("udi_projection_maps")

    def check(source, target, mask, indices, maps, grid):
        positions = token_positions(source[None].double(), (grid, grid), "ends")
        drawn = mask.nonzero()[:, 0]
        weights, inside = project(positions[:, drawn], target[None].double(), (14, 14), "ends")
        valid = drawn[inside[0]]
        assert indices.tolist() == valid.tolist() + [-1] * (len(indices) - len(valid))
        torch.testing.assert_close(weights[0][inside[0]].float(), maps[: len(valid)], rtol=0, atol=5e-6)  # float32 file

    for n in range(24):
        boxes = g["box0"][n], g["box1"][n]
        check(*boxes, g["mask_global"][n], g["src01"][n], g["tgt01"][n], 14)
        check(*boxes[::-1], g["mask_global"][n], g["src10"][n], g["tgt10"][n], 14)
        for l in range(2):
            local, mask = g["local_box"][n, l], g["mask_local"][n]
            check(local, boxes[1], mask, g["srcL1"][n, l], g["tgtL1"][n, l], 6)
            check(local, boxes[0], mask, g["srcL0"][n, l], g["tgtL0"][n, l], 6)


def test_the_released_local_reference_is_reproduced(golden):
    g = golden("udi_projection_maps")
    for n in range(24):
        ours = local_reference(Box(*g["box0"][n].tolist()), Box(*g["box1"][n].tolist()), "official")
        y0, x0, y1, x1 = g["local_ref_box"][n].tolist()
        np.testing.assert_allclose(ours, (y0, min(x0, x1), y1, max(x0, x1)), atol=1e-7)


def overlaps(variant: str, n: int = 400) -> np.ndarray:
    """Overlap of the two global crops, as a share of the smaller one."""
    out = []
    for k in range(n):
        rng = np.random.default_rng(k)
        first, second = (random_crop(375, 500, (0.25, 1.0), rng) for _ in range(2))
        second = steer(second, Box.of(first, False), 375, 500, variant)
        h = min(first.i + first.h, second.i + second.h) - max(first.i, second.i)
        w = min(first.j + first.w, second.j + second.w) - max(first.j, second.j)
        out.append(max(h, 0) * max(w, 0) / min(first.h * first.w, second.h * second.w))
    return np.array(out)


def test_steering_guarantees_a_quarter_of_the_smaller_crop_and_the_slip_hardly_matters():
    fixed, official, independent = (overlaps(v) for v in ("fixed", "official", "independent"))
    assert fixed.min() >= 0.24  # half of the smaller extent per axis, up to a rounded pixel
    assert independent.min() < 0.24
    assert fixed.mean() > independent.mean()
    assert abs(official.mean() - fixed.mean()) < 0.02


def test_steered_crops_stay_inside_the_image():
    for k in range(300):
        rng = np.random.default_rng(k)
        height, width = (int(v) for v in rng.integers(20, 300, 2))
        first, second = (random_crop(height, width, (0.05, 1.0), rng) for _ in range(2))
        for crop in (first, steer(second, Box.of(first, bool(k % 2)), height, width, "fixed")):
            assert 0 <= crop.i <= crop.i + crop.h <= height
            assert 0 <= crop.j <= crop.j + crop.w <= width


def view(box, samples=None, side=8) -> View:
    tensor = torch.tensor([box], dtype=torch.float64)
    return View(torch.zeros(1, 3, side, side), tensor, torch.full((1, 2), 0.01, dtype=torch.float64), samples)


@pytest.mark.parametrize("coords", ["centres", "ends"])
def test_the_same_crop_maps_each_patch_to_itself(coords):
    a = view([0.1, 0.2, 0.7, 0.9], torch.arange(16)[None])
    weights, inside = between(a, (4, 4), a, (4, 4), coords)
    expected = torch.eye(16, dtype=torch.float64) * inside[0][:, None]
    torch.testing.assert_close(weights[0], expected)
    assert int(inside.sum()) == (16 if coords == "centres" else 4)  # "ends": border tokens lie on the border


def test_a_flipped_crop_maps_left_to_right():
    a = view([0.1, 0.2, 0.7, 0.9], torch.arange(16)[None])
    weights, inside = between(a, (4, 4), view([0.1, 0.9, 0.7, 0.2]), (4, 4), "centres")
    assert inside.all()
    assert weights[0].argmax(-1).view(4, 4).tolist() == torch.arange(16).view(4, 4).flip(1).tolist()


def test_weights_read_a_linear_image_exactly():
    """Bilinear interpolation of coordinates gives the coordinates, wherever no border clamps."""
    box = torch.tensor([[0.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
    points = torch.rand(1, 50, 2, dtype=torch.float64) * 0.7 + 0.15
    weights, inside = project(points, box, (5, 7))
    positions = token_positions(box, (5, 7))
    assert inside.all()
    torch.testing.assert_close(weights @ positions, points)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 50, dtype=torch.float64))


def test_points_outside_have_no_weight():
    points = torch.tensor([[[0.05, 0.5], [0.5, 0.95], [0.5, 0.5]]])
    weights, inside = project(points, torch.tensor([[0.1, 0.9, 0.8, 0.2]]), (4, 4))
    assert inside.tolist() == [[False, False, True]]
    assert (weights[0, :2] == 0).all()


def test_ends_boxes_go_through_pixel_centres():
    box = torch.tensor([[0.0, 1.0, 0.5, 0.0]], dtype=torch.float64)  # flipped: columns 9..0 of ten
    pixel = torch.tensor([[0.1, 0.1]], dtype=torch.float64)
    torch.testing.assert_close(ends_box(box, pixel), torch.tensor([[0.05, 0.95, 0.45, 0.05]], dtype=torch.float64))
