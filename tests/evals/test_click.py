"""Segmentation from a click: golden numbers of the written procedure, and the procedure again as plain loops."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from painted import Annotations, MeanColour
from PIL import Image
from torch import nn

from conftest import tiny_encoder, tiny_swin
from triptych.data.annotated import open_annotated
from triptych.data.regions import Region
from triptych.errors import UserError
from triptych.evals.by_image import average_ratio, half_interval
from triptych.evals.click import PRESETS, ClickSettings, click, figures, mean_target_area
from triptych.evals.click_iou import around, clicked, of_similarity, prompt_iou
from triptych.evals.click_targets import Raster, targets_of
from triptych.evals.transform import EvalTransform
from triptych.tokens import TokenSpec

DATA = Path(__file__).parents[3] / "shared" / "data"
SMALL = ClickSettings(size=24)  # 6 x 6 patches of 4 px
COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)  # their cosines are 0


def blobs(count=4, seed=0) -> Annotations:
    """Noise of unlike sizes, each image with two or three rectangles and a crowd."""
    rng, images, regions = np.random.default_rng(seed), [], []
    for i in range(count):
        height, width = 30 + i, 44 - i
        images.append(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
        found = []
        for k in range(2 + i % 2):
            mask = np.zeros((height, width), bool)
            top, left = rng.integers(0, 12, 2)
            mask[top : top + rng.integers(12, 18), left : left + rng.integers(12, 25)] = True
            found.append(Region(mask, k % 2))
        regions.append([*found, Region(np.ones((height, width), bool), 2, crowd=True)])
    return Annotations(images, regions)


def flags() -> Annotations:
    """Three stripes of three colours, each a category: an encoder that sees colours finds them without fault."""
    classes = np.repeat([0, 1, 2], 8)[:, None].repeat(24, 1)
    regions = [Region(classes == c, c) for c in range(3)]
    return Annotations([COLOURS[classes]] * 2, [regions] * 2)


class Alike(MeanColour):
    """Every token is the same, as those of a collapsed encoder."""

    def forward(self, images):
        tokens = super().forward(images)
        return replace(tokens, patch=torch.ones_like(tokens.patch))


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return tiny_encoder(TokenSpec())


def run(encoder, source, settings=SMALL, **options):
    return click(encoder, source, settings, **{"workers": 0, "precision": torch.float32, **options})


# --- golden numbers ---


@pytest.mark.parametrize("rule", ["centroid", "max_coverage"])
def test_prompts_similarities_and_iou_are_those_of_the_golden_file(golden, rule):
    g = golden("seg_prompt_threshold")
    name = {"centroid": "nearest_centroid", "max_coverage": "max_coverage_first"}[rule]
    grid, patch, mask = (int(g["grid_h"]), int(g["grid_w"])), int(g["patch"]), g["object_mask"].numpy()
    raster = Raster.original(mask.shape, grid)
    inside, centroid = raster.count(mask)
    np.testing.assert_allclose(inside / raster.total(), g["coverage"], atol=1e-7)
    prompts = clicked(g["coverage"].numpy(), centroid, grid[1], rule, np.random.default_rng(0))
    assert prompts == [int(g[f"{name}_prompt"])]
    levels = {
        "patch_level": ((g["coverage"] >= 0.5).double(), torch.ones(42)),
        "pixel_nearest": (g["coverage"] * patch**2, torch.full((42,), patch**2)),
    }
    for level, (inside, total) in levels.items():
        both, union = prompt_iou(g["tokens"], torch.tensor(prompts), inside[None], total, g["thresholds"].tolist())
        torch.testing.assert_close(both[0] / union[0], g[f"{name}_iou_{level}"], rtol=0, atol=1e-12)


def test_the_mean_over_all_candidates_is_that_of_the_golden_file(golden):
    g = golden("seg_prompt_threshold")
    prompts = clicked(g["coverage"].numpy(), np.zeros(2), 7, "mean", np.random.default_rng(0))
    assert prompts == g["candidate_patches"].tolist()
    inside, total = g["coverage"][None] * 256, torch.full((42,), 256.0)
    both, union = prompt_iou(g["tokens"], torch.tensor(prompts), inside, total, g["thresholds"].tolist())
    wanted = g["mean_over_all_candidates_iou_pixel_nearest"]
    torch.testing.assert_close((both / union).mean(0), wanted, rtol=0, atol=1e-12)


# --- the procedure as plain loops ---


def looped(encoder, source, resolution, prompt, seed) -> dict[float, float]:
    """Percent by threshold, pixel by pixel."""
    ious = {theta: [] for theta in SMALL.thresholds}
    transform = EvalTransform(24, 24, shape="square")
    for index in range(len(source)):
        pixels = transform.pixels(source.image(index)).float() / 255
        mean, std = (torch.tensor(x)[:, None, None] for x in (transform.mean, transform.std))
        x = encoder(((pixels - mean) / std)[None]).patch[0].detach()
        x = x / x.norm(dim=1, keepdim=True)
        of_category = {}
        for region in source.regions(index):
            if not region.crowd:
                of_category[region.category] = of_category.get(region.category, False) | region.mask
        for number, category in enumerate(sorted(of_category)):
            own = of_category[category]
            height, width = own.shape
            resized = np.zeros((24, 24), bool)
            for i in range(24):
                for j in range(24):
                    resized[i, j] = own[int((i + 0.5) * height / 24), int((j + 0.5) * width / 24)]
            share = np.zeros(36)
            for i in range(24):
                for j in range(24):
                    share[i // 4 * 6 + j // 4] += resized[i, j] / 16
            candidates = [i for i in range(36) if share[i] >= 0.5]
            if prompt == "random":
                prompts = [np.random.default_rng([seed, index, number]).choice(candidates)]
            else:
                prompts = candidates
            for theta in ious:
                found = []
                for q in prompts:
                    above = [bool(x[i] @ x[q] > theta) for i in range(36)]
                    both = union = 0
                    if resolution == "patches":
                        pairs = [(above[i], share[i] >= 0.5) for i in range(36)]
                    elif resolution == "size":
                        pairs = [(above[i // 4 * 6 + j // 4], resized[i, j]) for i in range(24) for j in range(24)]
                    else:
                        pairs = [
                            (above[int((i + 0.5) * 6 / height) * 6 + int((j + 0.5) * 6 / width)], own[i, j])
                            for i in range(height)
                            for j in range(width)
                        ]
                    for predicted, true in pairs:
                        both += predicted and true
                        union += predicted or true
                    found.append(both / union)
                ious[theta].append(np.mean(found))
    return {theta: 100 * float(np.mean(values)) for theta, values in ious.items()}


@pytest.mark.parametrize(
    ("resolution", "prompt"), [("size", "random"), ("patches", "random"), ("original", "random"), ("size", "mean")]
)
def test_it_is_the_written_procedure_pixel_by_pixel(encoder, resolution, prompt):
    source = blobs(2)
    result = run(encoder, source, replace(SMALL, resolution=resolution, prompt=prompt), seed=3)
    expected = looped(encoder, source, resolution, prompt, seed=3)
    assert result.miou == pytest.approx(expected, abs=1e-9)
    assert len(set(expected.values())) > 1


@pytest.mark.parametrize("shape", [(24, 24), (7, 50), (100, 31), (3, 2)])
def test_every_pixel_is_counted_in_one_patch_at_any_size(shape):
    mask = np.random.default_rng(0).random(shape) < 0.5
    for raster, pixels in ((Raster.resized(shape, 24, (6, 3)), 24 * 24), (Raster.original(shape, (6, 3)), mask.size)):
        assert raster.total().sum() == pixels
        np.testing.assert_array_equal(raster.count(mask)[0] + raster.count(~mask)[0], raster.total())
    assert Raster.original(shape, (6, 3)).count(mask)[0].sum() == mask.sum()
    nearest = np.asarray(Image.fromarray(mask).resize((24, 24), Image.Resampling.NEAREST))
    pixels, centroid = Raster.resized(shape, 24, (24, 24)).count(mask)  # patches of one pixel
    np.testing.assert_array_equal(pixels.reshape(24, 24), nearest)
    np.testing.assert_allclose(centroid, np.argwhere(nearest).mean(0) + 0.5, rtol=1e-5)


# --- what is sought, clicked and compared ---


def test_units_are_regions_their_unions_the_largest_and_connected_parts():
    left, right, both = (np.zeros((4, 9), bool) for _ in range(3))
    left[:2, :2], right[:, 5:], both[0, 3], both[1, 4] = True, True, True, True  # `both` touches at a corner
    regions = [Region(left, 1), Region(right, 0), Region(both | left, 1), Region(np.ones((4, 9), bool), 2, crowd=True)]
    masks = {u: list(targets_of(regions, u)) for u in ("instance", "category", "largest", "component")}
    assert [(c, m.sum()) for c, m in masks["instance"]] == [(1, 4), (0, 16), (1, 6)]
    assert [(c, m.sum()) for c, m in masks["category"]] == [(0, 16), (1, 6)]
    assert [(c, m.sum()) for c, m in masks["largest"]] == [(0, 16)]
    assert [(c, m.sum()) for c, m in masks["component"]] == [(1, 4), (0, 16), (1, 4), (1, 2)]
    for unit in masks:
        assert list(targets_of(regions[3:], unit)) == []


def test_a_random_click_hits_every_candidate_and_no_other_patch():
    coverage, rng = np.array([0.0, 0.49, 0.5, 1.0, 0.2, 0.7]), np.random.default_rng(0)
    hits = [clicked(coverage, np.zeros(2), 3, "random", rng)[0] for _ in range(300)]
    assert set(hits) == {2, 3, 5}
    assert min(hits.count(i) for i in (2, 3, 5)) > 70  # of 100


def test_a_seed_fixes_the_clicks_and_no_batch_or_worker_changes_them(encoder):
    source = blobs()
    expected = run(encoder, source)
    for options in ({"batch": 1}, {"batch": 3}, {"workers": 1}):
        assert run(encoder, source, **options).miou == pytest.approx(expected.miou, abs=1e-9)
    assert run(encoder, source) == expected
    assert run(encoder, source, seed=1).miou != expected.miou


def test_the_clicks_on_an_image_do_not_depend_on_which_others_are_measured(encoder):
    whole, one = blobs(), blobs()
    one.given = [regions if i == 2 else [] for i, regions in enumerate(one.given)]
    whole.given = [regions if i != 2 else [] for i, regions in enumerate(whole.given)]
    a, b, both = (run(encoder, s) for s in (one, whole, blobs()))
    for theta, value in both.miou.items():
        assert value * both.targets == pytest.approx(a.miou[theta] * a.targets + b.miou[theta] * b.targets)
    assert (a.images, a.without_target) == (1, 3)


def test_similarities_are_mapped_as_their_formulas():
    s = torch.tensor([[1.0, -0.5, 0.25]])
    torch.testing.assert_close(of_similarity(s, "cosine"), s)
    torch.testing.assert_close(of_similarity(s, "minmax"), torch.tensor([[1.0, 0.0, 0.5]]))
    torch.testing.assert_close(of_similarity(s, "shifted"), torch.tensor([[1.0, 0.25, 0.625]]))
    assert of_similarity(torch.ones(1, 3), "minmax").tolist() == [[1, 1, 1]]  # all as similar as can be


def test_only_what_is_connected_with_the_click_is_kept():
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]]).bool().flatten()
    two = mask.expand(2, -1)
    prompts = torch.tensor([0, 15])
    assert around(two, prompts, 4, 4).nonzero().tolist() == [[0, 0], [0, 1], [1, 15]]
    assert around(two, prompts, 4, 8).nonzero().tolist() == [[0, 0], [0, 1], [0, 6], [1, 15]]


def test_a_part_elsewhere_costs_iou_only_where_parts_are_not_asked_for():
    """Two stripes of one colour, of which one is the target."""
    image = np.zeros((24, 24, 3), np.uint8)
    image[:8], image[8:16], image[16:] = COLOURS[0], COLOURS[1], COLOURS[0]
    top = np.zeros((24, 24), bool)
    top[:8] = True
    source = Annotations([image], [[Region(top, 0)]])
    plain = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    assert run(MeanColour(), source, **plain).best == pytest.approx(50)
    assert run(MeanColour(), source, replace(SMALL, connected="4"), **plain).best == pytest.approx(100)


# --- averages, floors, intervals ---


def test_an_encoder_that_sees_the_classes_has_100_and_one_that_sees_nothing_has_the_floor():
    plain = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    for resolution in ("size", "patches", "original"):
        settings = replace(SMALL, resolution=resolution)
        assert run(MeanColour(), flags(), settings, **plain).miou == pytest.approx(dict.fromkeys(SMALL.thresholds, 100))
        for similarity in ("cosine", "minmax", "shifted"):
            result = run(Alike(), blobs(), replace(settings, similarity=similarity))
            assert result.miou == pytest.approx(dict.fromkeys(SMALL.thresholds, result.floor))
            assert result.floor == pytest.approx(result.target_area, abs=2)  # of the size measured at


def test_averages_are_over_targets_classes_and_sums_of_pixels(encoder):
    """From the IoU that each target has alone, at sizes of its own choice: 1/2, 2/8 of class 0 and 3/4 of class 1."""
    both, union = np.array([[1.0], [2.0], [3.0]]), np.array([[2.0], [8.0], [4.0]])
    image, one, classes = np.array([0, 0, 1]), np.zeros(3), np.array([0, 0, 1])
    iou, ones = both / union, np.ones((3, 1))
    assert average_ratio(iou, ones, image, one)[0] == pytest.approx(0.5)
    assert average_ratio(iou, ones, image, classes)[0] == pytest.approx((0.375 + 0.75) / 2)
    assert average_ratio(both, union, image, one)[0] == pytest.approx(6 / 14)
    assert average_ratio(both, union, image, classes)[0] == pytest.approx((3 / 10 + 3 / 4) / 2)
    values = {a: run(encoder, blobs(), replace(SMALL, averaging=a)).best for a in mean_target_area(blobs()).floor}
    assert len(set(values.values())) == 4


def test_with_one_target_an_image_the_margin_is_196_standard_errors():
    x = np.random.default_rng(0).random((50, 1))
    value, half = average_ratio(x, np.ones_like(x), np.arange(50), np.zeros(50))
    assert value == pytest.approx(x.mean())
    assert half == pytest.approx(1.96 * x.std(ddof=1) / 50**0.5)


def test_targets_of_one_image_that_agree_do_not_narrow_the_margin():
    x = np.random.default_rng(0).random((50, 1))
    one = average_ratio(x, np.ones_like(x), np.arange(50), np.zeros(50))[1]
    three = average_ratio(x.repeat(3, 0), np.ones((150, 1)), np.arange(50).repeat(3), np.zeros(150))[1]
    assert three == pytest.approx(one)
    assert np.isnan(half_interval(np.zeros((1, 2)))).all()


@pytest.mark.parametrize("of_class", [False, True])
def test_the_margin_is_near_that_of_images_drawn_anew(of_class):
    rng = np.random.default_rng(0)
    image, group = rng.integers(200, size=1000), rng.integers(3, size=1000) * of_class
    union = rng.random((1000, 1)) + 0.5
    both = union * np.clip(rng.normal(0.5, 0.1, (200, 1))[image] + rng.normal(0, 0.2, (1000, 1)), 0, 1)
    half = average_ratio(both, union, image, group)[1]
    drawn = []
    for _ in range(400):
        rows = np.concatenate([np.flatnonzero(image == i) for i in rng.integers(200, size=200)])
        drawn.append(average_ratio(both[rows], union[rows], image[rows], group[rows])[0][0])
    assert float(half[0]) == pytest.approx(1.96 * np.std(drawn), rel=0.12)


@pytest.mark.parametrize("unit", ["category", "instance", "largest", "component"])
def test_the_floor_can_be_had_from_the_annotation_alone(encoder, unit):
    area = mean_target_area(blobs(), unit, size=24, patch_size=4)
    for averaging, floor in area.floor.items():
        result = run(encoder, blobs(), replace(SMALL, unit=unit, averaging=averaging))
        assert result.floor == pytest.approx(floor, abs=1e-5)
    assert (area.targets, area.skipped, area.images) == (result.targets, result.skipped, result.images)
    assert area.floor["targets"] == pytest.approx(result.target_area, abs=1e-5)


def test_the_best_threshold_says_that_it_was_chosen_on_the_measured_images(encoder):
    result = run(encoder, blobs())
    assert (result.best, result.threshold) == max((v, t) for t, v in result.miou.items())
    assert "measured images" in result.selected_on
    rows = {f.name: f for f in figures(result)}
    assert [name for name, f in rows.items() if f.main] == ["mIoU %"]
    assert result.selected_on in rows["mIoU %"].note
    assert rows["mIoU %"].margin == result.margin[result.threshold]
    alone = run(encoder, blobs(), replace(SMALL, thresholds=(0.1,)))
    assert "nothing to select" in alone.selected_on
    assert alone.best == pytest.approx(result.miou[0.1])
    assert run(encoder, blobs(1)).margin == dict.fromkeys(SMALL.thresholds)


# --- which images and targets ---


def test_targets_without_a_candidate_are_skipped_and_counted(encoder):
    source = blobs(2)
    speck = np.zeros(source.images[0].shape[:2], bool)
    speck[0, 0] = True
    source.given[0] = [*source.given[0], Region(speck, 2)]
    result = run(encoder, source, replace(SMALL, unit="instance"))
    assert (result.targets, result.skipped, result.images) == (5, 1, 2)
    assert result.targets_by_class == {"red": 3, "green": 2}
    assert replace(result, skipped=0) == run(encoder, blobs(2), replace(SMALL, unit="instance"))


def test_unreadable_images_are_left_out_and_counted(encoder):
    source = blobs()
    source.unreadable = (1, 3)
    result = run(encoder, source)
    assert (result.images, result.unreadable, result.without_target) == (2, 2, 0)
    source.unreadable = range(4)
    with pytest.raises(UserError, match="no image of memory can be read"):
        run(encoder, source)


def test_a_sample_of_the_images_is_drawn_once(encoder):
    some = run(encoder, blobs(8), images=3)
    assert some.images == 3
    assert run(encoder, blobs(8), images=3) == some
    assert run(encoder, blobs(8), images=99) == run(encoder, blobs(8))


def test_encoders_without_a_class_token_are_measured_too():
    torch.manual_seed(0)
    result = run(tiny_swin(TokenSpec(cls=0)).train(), blobs(2), replace(SMALL, size=32))
    assert result.patches == (8, 8)
    assert 0 < result.best < 100


def test_the_preset_is_the_paper_and_the_defaults():
    mmc = PRESETS["mmc"]
    assert mmc == ClickSettings()
    assert (mmc.size, mmc.thresholds, mmc.unit, mmc.prompt) == (480, (0.1, 0.2, 0.3, 0.4), "category", "random")
    assert (mmc.averaging, mmc.resolution, mmc.similarity, mmc.connected) == ("targets", "size", "cosine", "none")


# --- mistakes ---

WRONG = {
    "unit": ("instances", "did you mean instance"),
    "prompt": ("first", "random, max_coverage, centroid, mean"),
    "averaging": ("image", "targets, classes"),
    "resolution": ("full", "size, patches, original"),
    "similarity": ("l2", "cosine, minmax, shifted"),
    "connected": ("6", "none, 4, 8"),
    "thresholds": ((0.1, 1.0), "below 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_that_mean_nothing_are_refused(name):
    value, expected = WRONG[name]
    with pytest.raises(UserError, match=expected):
        ClickSettings(**{name: value})


def test_a_size_that_patches_do_not_divide_names_the_nearest_that_they_do(encoder):
    with pytest.raises(UserError, match="such as 24 or 28"):
        run(encoder, blobs(), ClickSettings(size=26))
    with pytest.raises(UserError, match="such as 24 or 28"):
        mean_target_area(blobs(), size=26, patch_size=4)


def test_no_target_at_all_and_tokens_that_are_not_finite_are_errors(encoder):
    source = blobs(1)
    source.given[0] = source.given[0][-1:]
    for measure in (lambda: run(encoder, source), lambda: mean_target_area(source)):
        with pytest.raises(UserError, match="no target of memory"):
            measure()
    broken = tiny_encoder(TokenSpec())
    nn.init.constant_(broken.vit.patch_embed.proj.weight, float("nan"))
    with pytest.raises(UserError, match="NaN"):
        run(broken, blobs(1))
    for options in ({"images": 0}, {"seed": -1}):
        with pytest.raises(UserError, match=r"images 0|seed -1"):
            run(encoder, source, **options)


# --- real images ---


@pytest.mark.parametrize("name", ["camvid", "coco_mini", "davis16_dev"])
def test_real_annotations_are_read_clicked_and_measured(name):
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is not on this machine")
    torch.manual_seed(0)
    source = open_annotated(DATA / name)
    encoder = tiny_encoder(TokenSpec(), image=32, patch=8, width=24)
    result = run(encoder, source, ClickSettings(size=64, prompt="centroid"), images=3)
    assert result.unreadable == 0
    assert result.images == 3
    assert result.floor == pytest.approx(result.target_area, abs=1e-4)
    assert 0 < result.best <= 100
    assert set(result.targets_by_class) <= set(source.classes)
