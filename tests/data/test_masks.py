"""iBOT's masks: invariants, and their statistics against 400 masks of the authors' data set class."""

import numpy as np
import pytest
from scipy.ndimage import label
from scipy.stats import ks_2samp

from triptych.data.masks import block_mask, draw_mask, draw_ratio, random_mask
from triptych.data.views import MaskSpec
from triptych.errors import UserError

BLOCKS = ["block14_default", "block14_fixed", "block7_swin", "block6_local"]
EACH = 4  # masks of ours for each of the authors', of the same ratio


def equal_neighbours(mask: np.ndarray) -> float:
    """Share of the pairs of adjacent patches of which both are hidden or both are not."""
    return float(np.concatenate([(mask[1:] == mask[:-1]).ravel(), (mask[:, 1:] == mask[:, :-1]).ravel()]).mean())


def pieces(mask: np.ndarray) -> int:
    return label(mask)[1]


def on_the_border(mask: np.ndarray) -> float:
    """Share of the hidden patches that lie on the grid's border."""
    return float((mask.sum() - mask[1:-1, 1:-1].sum()) / max(1, mask.sum()))


STATISTICS = {"neighbours": equal_neighbours, "pieces": pieces, "border": on_the_border}


@pytest.fixture(scope="module")
def pairs(golden):
    """pairs(case) -> the authors' ratios (n,) and masks (n, H, W), those with a mask at all, and ours (n, EACH, H, W)."""
    made = {}

    def load(case: str):
        if case not in made:
            g, rng = golden("ibot_block_masks"), np.random.default_rng(0)
            ratios, theirs = g[f"{case}.ratio"].numpy(), g[f"{case}.mask"].numpy()
            theirs, ratios = theirs[ratios > 0], ratios[ratios > 0]
            draw = random_mask if case.startswith("rand") else block_mask
            ours = np.array([[draw(theirs.shape[1:], r, rng) for _ in range(EACH)] for r in ratios])
            made[case] = ratios, theirs, ours
        return made[case]

    return load


def alike(ours, theirs) -> bool:
    """Two samples of one distribution?  A right implementation is refused with one seed of ten thousand at most."""
    return ks_2samp(np.asarray(ours, float).ravel(), np.asarray(theirs, float).ravel()).pvalue > 1e-4


@pytest.mark.parametrize("case", BLOCKS)
def test_blocks_never_hide_more_than_the_ratio_and_fall_short_as_the_authors_do(case, pairs):
    ratios, theirs, ours = pairs(case)
    wanted = ratios * theirs[0].size
    short = wanted[:, None] - ours.sum((2, 3))
    short_theirs = wanted - theirs.sum((1, 2))
    assert short.min() >= 0
    assert short_theirs.min() >= 0
    assert alike(short, short_theirs)
    assert short.mean() == pytest.approx(short_theirs.mean(), rel=0.15)


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("case", [*BLOCKS, "rand14"])
def test_masks_have_the_shape_of_the_authors(case, name, pairs):
    _, theirs, ours = pairs(case)
    statistic = STATISTICS[name]
    a, b = [statistic(m) for row in ours for m in row], [statistic(m) for m in theirs]
    assert alike(a, b)
    error = (np.var(a) / len(theirs) + np.var(b) / len(theirs)) ** 0.5  # ours share the authors' ratios: no more than n
    assert abs(np.mean(a) - np.mean(b)) <= 4 * error


def test_every_patch_is_hidden_as_often_as_by_the_authors(pairs):
    """The grid's corners seldom, its middle often."""
    _, theirs, ours = pairs("block14_default")
    a, b = ours.mean((0, 1)), theirs.mean(0)
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.8
    assert np.abs(a - b).max() < 0.14  # about 4 standard errors of a share of 200 masks
    assert a[0, 0] < 0.5 * a[7, 7]


def test_the_ratios_drawn_are_distributed_as_the_authors(golden):
    theirs = golden("ibot_block_masks")["block14_default.ratio"].numpy()
    rng = np.random.default_rng(0)
    ours = np.array([draw_ratio((0.0, 0.3), (0.0, 0.2), rng) for _ in range(2000)])
    assert alike(ours, theirs)
    assert (ours == 0).mean() == pytest.approx(0.5, abs=0.05)
    assert 0.1 <= ours[ours > 0].min() < 0.11
    assert 0.49 < ours.max() <= 0.5


def test_a_random_mask_hides_exactly_the_ratio_rounded_down(golden):
    g, rng = golden("ibot_block_masks"), np.random.default_rng(0)
    for ratio, count in zip(g["rand14.ratio"].tolist(), g["rand14.count"].tolist(), strict=True):
        assert random_mask((14, 14), ratio, rng).sum() == count
    share = np.mean([random_mask((5, 3), 0.4, rng) for _ in range(2000)], 0)
    assert share == pytest.approx(np.full((5, 3), 0.4), abs=0.05)


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (3, 7), (7, 3), (14, 14)])
@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.5, 1.0])
def test_any_grid_and_ratio_ends_with_a_mask_of_that_shape(grid, ratio):
    for seed in range(20):
        mask = block_mask(grid, ratio, np.random.default_rng(seed))
        assert (mask.shape, mask.dtype) == (grid, bool)
        assert mask.sum() <= ratio * mask.size


@pytest.mark.parametrize("shape", ["block", "random"])
def test_half_of_the_masks_hide_nothing_by_default(shape):
    rng = np.random.default_rng(0)
    masks = np.array([draw_mask(MaskSpec(shape=shape), (6, 6), rng) for _ in range(600)])
    assert masks.shape == (600, 36)
    assert (~masks.any(1)).mean() == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize(
    ("ratios", "variations", "message"),
    [
        ((0.0, 0.3), (0.2,), "2 mask ratios and 1 variations"),
        ((), (), "one variation per ratio"),
        ((0.1,), (0.2,), "0.1 ± 0.2 leaves the range"),
        ((0.9,), (0.2,), "lower its variation"),
    ],
)
def test_ratios_that_are_no_shares_are_refused(ratios, variations, message):
    with pytest.raises(UserError, match=message):
        MaskSpec(ratios, variations)
