"""Cosines within and between objects, against every pair written out."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from painted import Annotations, MeanColour
from torch import nn

from conftest import tiny_encoder, tiny_swin
from triptych.data.annotated import open_annotated
from triptych.data.regions import Region
from triptych.errors import UserError
from triptych.evals.object_pairs import BACKGROUND, MIXED, draw_across, draw_pairs, patch_labels
from triptych.evals.object_similarity import Drawn, _Rows, figures, object_similarity, overlap
from triptych.tokens import TokenSpec

DATA = Path(__file__).parents[3] / "shared" / "data"


def stripes(count=3, seed=0, classes=3) -> Annotations:
    """Noise with rows of objects: patches 0-1, 2-3 and 4-5 of six rows."""
    rng = np.random.default_rng(seed)
    of = np.repeat(np.arange(3), 8)[:, None].repeat(24, 1)
    regions = [Region(of == c, c % classes) for c in range(3)]
    return Annotations([rng.integers(0, 255, (24, 24, 3), dtype=np.uint8) for _ in range(count)], [regions] * count)


def squares(count=3) -> Annotations:
    """A red square on a plain green ground, with one region: the square."""
    image, mask = np.zeros((24, 24, 3), np.uint8), np.zeros((24, 24), bool)
    image[:], mask[4:12, 8:20] = (0, 255, 0), True
    image[mask] = (255, 0, 0)
    return Annotations([image] * count, [[Region(mask, 0)]] * count)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return tiny_encoder(TokenSpec())


def run(encoder, source, **options):
    return object_similarity(encoder, source, **{"size": 24, "workers": 0, "precision": torch.float32, **options})


def every_pair(labels, images=None) -> Drawn:
    """All unordered pairs of one label, and of two, but for two of the background; images: of two images only."""
    pairs = [(i, j) for i, j in combinations(range(len(labels)), 2) if images is None or images[i] != images[j]]
    same = [(i, j) for i, j in pairs if labels[i] == labels[j] != BACKGROUND]
    other = [(i, j) for i, j in pairs if labels[i] != labels[j]]
    return Drawn(*(tuple(np.array(kind, np.int64).reshape(-1, 2).T) for kind in (same, other)))


def test_densities_means_and_overlap_of_all_pairs_are_those_of_the_golden_file(golden):
    g = golden("seg_similarity_overlap")
    rows = _Rows(100)
    rows.add(nn.functional.normalize(g["features"], dim=1), every_pair(g["labels"].tolist()))
    found = rows.summary()
    np.testing.assert_allclose(found["density_in"], g["intra_hist"], atol=1e-12)
    np.testing.assert_allclose(found["density_out"], g["inter_hist"], atol=1e-12)
    assert found["mean_in"] == pytest.approx(float(g["intra_mean"]), abs=1e-12)
    assert found["mean_out"] == pytest.approx(float(g["inter_mean"]), abs=1e-12)
    assert found["overlap"] == pytest.approx(float(g["overlap"]), abs=1e-12)


def test_overlap_is_1_of_equal_densities_and_0_of_densities_apart():
    p, q = np.zeros(100), np.zeros(100)
    p[:50], q[50:] = 1.0, 1.0  # area 1 each
    assert overlap(p, p) == pytest.approx(1)
    assert overlap(p, q) == 0
    assert overlap(p, (p + q) / 2) == pytest.approx(0.5)


def test_a_patch_is_of_the_one_object_that_half_of_it_lies_in():
    coverage = np.array([[1.0, 0.5, 0.4, 0.7, 0.0, 0.2], [0.0, 0.5, 0.5, 0.2, 0.1, 0.2]])
    unmarked = np.array([0.0, 0.0, 0.3, 0.3, 0.9, 0.4])
    assert patch_labels(coverage, [7, 3], None).tolist() == [7, MIXED, 3, 7, MIXED, MIXED]
    assert patch_labels(coverage, [7, 3], unmarked).tolist() == [7, MIXED, 3, 7, BACKGROUND, MIXED]


def test_pairs_are_uniform_over_all_that_there_are():
    labels = np.array([4, 1, 4, BACKGROUND, 1, 4, BACKGROUND, 9])
    drawn = draw_pairs(labels, 40_000, np.random.default_rng(0))
    for kind, wanted in zip(drawn, every_pair(labels), strict=True):
        pairs, counts = np.unique(np.sort(np.stack(kind), 0), axis=1, return_counts=True)
        assert pairs.T.tolist() == sorted(np.stack(wanted).T.tolist())
        expected = 40_000 / len(counts)
        assert abs(counts - expected).max() < 5 * expected**0.5  # five standard deviations


def test_pairs_across_images_are_uniform_and_never_of_one_image():
    labels = np.array([0, 1, BACKGROUND, 0, 0, 1, BACKGROUND, 0, 2])
    images = np.array([5, 5, 5, 5, 8, 8, 8, 9, 9])
    drawn = draw_across(labels, images, 5, 40_000, np.random.default_rng(0))
    for kind, wanted in zip(drawn, every_pair(labels, images), strict=True):
        of_image = [[i, j] for i, j in np.stack(wanted).T.tolist() if images[i] == 5]
        pairs, counts = np.unique(np.stack(kind), axis=1, return_counts=True)
        assert pairs.T.tolist() == sorted(of_image)
        expected = 40_000 / len(counts)
        assert abs(counts - expected).max() < 5 * expected**0.5


def test_where_there_is_no_pair_of_a_kind_none_is_drawn():
    rng = np.random.default_rng(0)
    for labels, counts in (([1, 1, 1], (9, 0)), ([0, 1, 2], (0, 9)), ([1], (0, 0)), ([], (0, 0)), ([-1, -1], (0, 0))):
        drawn = draw_pairs(np.array(labels, np.int64), 9, rng)
        assert tuple(len(first) for first, _ in drawn) == counts


@pytest.mark.parametrize(("pairs", "objects"), [("image", "category"), ("image", "instance"), ("dataset", "category")])
def test_drawn_pairs_come_near_all_pairs(encoder, pairs, objects):
    """Categories: the first and the third stripe are of one."""
    source = stripes(classes=2)
    found = run(encoder, source, pairs=pairs, objects=objects, per_image=20_000)
    x, labels, images = [], [], []
    for index in range(3):
        pixels = torch.from_numpy(source.images[index]).permute(2, 0, 1)[None] / 255
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        x.append(encoder((pixels - mean[:, None, None]) / std[:, None, None]).patch[0].detach())
        labels += [{"category": (0, 1, 0), "instance": (0, 1, 2)}[objects][i // 12] for i in range(36)]
        images += [index] * 36
    if pairs == "image":
        drawn = [every_pair(labels[:36])] * 3
        drawn = [Drawn(*((a + 36 * k, b + 36 * k) for a, b in one)) for k, one in enumerate(drawn)]
        drawn = Drawn(*(tuple(map(np.concatenate, zip(*kind, strict=True))) for kind in zip(*drawn, strict=True)))
    else:
        drawn = every_pair(labels, images)
    rows = _Rows(100)
    rows.add(nn.functional.normalize(torch.cat(x).double(), dim=1), drawn)
    expected = rows.summary()
    assert found.mean_in == pytest.approx(expected["mean_in"], abs=0.01)
    assert found.mean_out == pytest.approx(expected["mean_out"], abs=0.01)
    assert found.overlap == pytest.approx(expected["overlap"], abs=0.03)
    assert found.pairs_in == found.pairs_out == 60_000
    assert sum(found.density_in) * 0.02 == pytest.approx(1)
    assert sum(found.density_out) * 0.02 == pytest.approx(1)


def test_what_is_an_object_and_where_pairs_are_sought_changes_the_numbers(encoder):
    source = stripes(classes=2)
    values = {
        run(encoder, source, **options).mean_in
        for options in ({}, {"objects": "instance"}, {"pairs": "dataset"}, {"seed": 1})
    }
    assert len(values) == 4


def test_a_seed_fixes_the_pairs_and_no_batch_or_worker_changes_them(encoder):
    for pairs in ("image", "dataset"):
        expected = run(encoder, stripes(), pairs=pairs)
        assert run(encoder, stripes(), pairs=pairs) == expected
        for options in ({"batch": 1}, {"workers": 1}):
            assert run(encoder, stripes(), pairs=pairs, **options).mean_in == pytest.approx(expected.mean_in, abs=1e-6)


@pytest.mark.parametrize("pairs", ["image", "dataset"])
def test_with_one_object_an_image_the_background_is_what_differs(pairs):
    """Each colour is its own direction: 1 within the square, 0 between square and ground; no pair of ground alone."""
    plain = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "pairs": pairs}
    with pytest.raises(UserError, match=r"two different objects.*background"):
        run(MeanColour(), squares(), **plain)
    found = run(MeanColour(), squares(), background=True, **plain)
    assert (found.mean_in, found.mean_out, found.overlap) == pytest.approx((1, 0, 0), abs=1e-6)
    assert (found.margin_in, found.margin_out, found.margin_overlap) == pytest.approx((0, 0, 0), abs=1e-6)


def test_margins_are_near_those_of_images_drawn_anew():
    rng, rows = np.random.default_rng(0), _Rows(20)
    for shift in rng.normal(0, 0.15, 100):
        a, b = (rng.normal(m + shift, 0.2, n).clip(-1, 1) for m, n in ((0.3, 30), (0.1, 20)))
        rows.histograms.append(np.stack([np.histogram(s, 20, (-1, 1))[0] for s in (a, b)]))
        rows.sums.append([a.sum(), b.sum()])
    whole, drawn = rows.summary(), []
    for _ in range(500):
        chosen, again = rng.integers(100, size=100), _Rows(20)
        again.histograms, again.sums = ([x[i] for i in chosen] for x in (rows.histograms, rows.sums))
        drawn.append(again.summary())
    for name, margin in (("mean_in", "margin_in"), ("mean_out", "margin_out"), ("overlap", "margin_overlap")):
        assert whole[margin] == pytest.approx(1.96 * np.std([d[name] for d in drawn]), rel=0.15)


def test_images_without_pairs_and_unreadable_ones_are_counted(encoder):
    source = stripes(5)
    source.given = [source.given[0], [], source.given[0], source.given[0], source.given[0]]
    source.unreadable = (4,)
    found = run(encoder, source)
    assert (found.images, found.without_pair, found.unreadable) == (3, 1, 1)
    assert run(encoder, stripes(1)).margin_in is run(encoder, stripes(1)).margin_overlap is None
    source.unreadable = range(5)
    source.given = stripes(5).given
    with pytest.raises(UserError, match="no image of memory can be read"):
        run(encoder, source)


def test_encoders_without_a_class_token_are_measured_too():
    torch.manual_seed(0)
    found = run(tiny_swin(TokenSpec(cls=0)), stripes(), size=32, bins=200)
    assert found.patches == (8, 8)
    centres = np.linspace(-0.995, 0.995, 200)
    for density, mean in ((found.density_in, found.mean_in), (found.density_out, found.mean_out)):
        assert centres @ np.array(density) * 0.01 == pytest.approx(mean, abs=0.005)  # half a bin


def test_figures_have_the_numbers_of_the_result(encoder):
    found = run(encoder, stripes())
    assert {f.name: (f.value, f.margin) for f in figures(found)} == {
        "overlap": (found.overlap, found.margin_overlap),
        "mean cosine within objects": (found.mean_in, found.margin_in),
        "mean cosine between objects": (found.mean_out, found.margin_out),
    }


WRONG = {
    "objects": ({"objects": "class"}, "category or instance"),
    "pairs": ({"pairs": "all"}, "image or dataset"),
    "both": ({"pairs": "dataset", "objects": "instance"}, "one image"),
    "per_image": ({"per_image": 0}, "at least 1"),
    "bins": ({"bins": 1}, "at least 1 and 2"),
    "size": ({"size": 25}, "such as 24 or 28"),
    "seed": ({"seed": -1}, "0 or more"),
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_that_mean_nothing_are_refused(encoder, name):
    options, expected = WRONG[name]
    with pytest.raises(UserError, match=expected):
        run(encoder, stripes(), **options)


@pytest.mark.parametrize("name", ["camvid", "coco_mini", "davis16_dev"])
def test_real_annotations_give_both_kinds_of_pairs(name):
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is not on this machine")
    torch.manual_seed(0)
    encoder = tiny_encoder(TokenSpec(), image=32, patch=8, width=24)
    found = run(encoder, open_annotated(DATA / name), size=96, images=4, background=name == "davis16_dev")
    assert found.pairs_in > 0
    assert found.pairs_out > 0
    assert found.mean_in > found.mean_out  # even untrained: colours differ more between objects
