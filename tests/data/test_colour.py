"""What the policies draw: probabilities, orders, ranges; and that what was drawn is carried out."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from triptych.data import operations
from triptych.data.colour import COLOURS, COLUMNS, JITTERS, Colour, Drawn, batchable, draw
from triptych.errors import UserError

ROLES = ("global_1", "global_2", "local")
DRAWS = 4000
IMAGE = np.random.default_rng(4).integers(0, 256, (24, 20, 3), dtype=np.uint8)


def names(drawn: Drawn) -> tuple[str, ...]:
    """The operations, in the order in which they are carried out."""
    rest = {"grey": drawn.grey, "blur": drawn.sigma > 0, "solarise": drawn.threshold < 256}
    return tuple(JITTERS[i] for i, _ in drawn.jitters) + tuple(name for name, done in rest.items() if done)


def factors(draws: list[Drawn], name: str) -> np.ndarray:
    if name == "blur":
        return np.array([one.sigma for one in draws if one.sigma])
    return np.array([factor for one in draws for i, factor in one.jitters if JITTERS[i] == name])


NET = [  # policy, role, P(blur), P(solarise)
    ("dino", "global_1", 1.0, 0.0),
    ("dino", "global_2", 0.1, 0.2),
    ("dino", "local", 0.5, 0.0),
    *(("udi", role, 0.425, 0.1) for role in ROLES),
    *(("simclr", role, 0.5, 0.0) for role in ROLES),
    *(("none", role, 0.0, 0.0) for role in ROLES),
]


@pytest.mark.parametrize(("policy", "role", "p_blur", "p_solarise"), NET)
def test_operations_are_as_frequent_as_the_policy_says(policy, role, p_blur, p_solarise):
    rng = np.random.default_rng(0)
    counts = Counter(name for _ in range(DRAWS) for name in names(draw(policy, role, rng)))
    on = policy != "none"
    expected = {"blur": p_blur, "solarise": p_solarise, "grey": 0.2 * on, **dict.fromkeys(JITTERS, 0.8 * on)}
    for name, p in expected.items():
        assert counts[name] / DRAWS == pytest.approx(p, abs=4 * (p * (1 - p) / DRAWS) ** 0.5), name


def test_udi_solarises_only_under_the_recipe_that_seldom_blurs():
    rng = np.random.default_rng(1)
    drawn = [names(draw("udi", "local", rng)) for _ in range(DRAWS)]
    solarised = [n for n in drawn if "solarise" in n]
    blurred = sum("blur" in n for n in solarised)
    assert blurred / len(solarised) == pytest.approx(0.1, abs=4 * (0.1 * 0.9 / len(solarised)) ** 0.5)


def test_the_four_jitters_come_in_all_24_orders_equally_often():
    rng = np.random.default_rng(2)
    recipe = Colour(p_jitter=1.0)
    orders = Counter(tuple(JITTERS[i] for i, _ in recipe.draw(rng).jitters) for _ in range(DRAWS))
    assert set(orders) == set(permutations(JITTERS))
    p = 1 / 24
    assert np.array(list(orders.values())) / DRAWS == pytest.approx(p, abs=4.5 * (p * (1 - p) / DRAWS) ** 0.5)


def test_factors_are_uniform_over_their_ranges():
    rng = np.random.default_rng(3)
    recipe = Colour(contrast=1.5, p_jitter=1.0, p_blur=1.0)
    draws = [recipe.draw(rng) for _ in range(DRAWS)]
    ranges = {
        "brightness": (0.6, 1.4),
        "contrast": (0.0, 2.5),  # a factor is never negative
        "saturation": (0.8, 1.2),
        "hue": (-0.1, 0.1),
        "blur": (0.1, 2.0),
    }
    for name, (low, high) in ranges.items():
        unit = (factors(draws, name) - low) / (high - low)
        assert unit.min() >= 0
        assert unit.max() <= 1
        # Kolmogorov-Smirnov distance; 1.95 / sqrt(n) is its 0.1 % point.
        assert np.abs(np.sort(unit) - (np.arange(DRAWS) + 0.5) / DRAWS).max() < 1.95 / DRAWS**0.5, name


def test_a_jitter_of_strength_zero_is_left_out_and_changes_no_other_draw():
    some, every = (
        [Colour(hue=hue, contrast=contrast, p_jitter=1.0).draw(rng) for _ in range(20)]
        for rng, hue, contrast in ((np.random.default_rng(0), 0.0, 0.0), (np.random.default_rng(0), 0.1, 0.4))
    )
    for a, b in zip(some, every, strict=True):
        assert a.jitters == tuple((i, factor) for i, factor in b.jitters if JITTERS[i] in ("brightness", "saturation"))
        assert (a.grey, a.sigma, a.threshold) == (b.grey, b.sigma, b.threshold)


def test_simclr_jitters_with_strengths_of_its_own():
    rng = np.random.default_rng(4)
    draws = [draw("simclr", "global_1", rng) for _ in range(DRAWS)]
    for name in JITTERS:
        drawn, strength = factors(draws, name), 0.2 if name == "hue" else 0.8
        centre = 0.0 if name == "hue" else 1.0
        assert centre - strength <= min(drawn) < centre - 0.99 * strength, name
        assert centre + 0.99 * strength < max(drawn) <= centre + strength, name


def test_blur_radii_scale():
    plain, half = (
        [Colour(p_blur=1.0).draw(np.random.default_rng(seed), scale).sigma for seed in range(9)] for scale in (1.0, 0.5)
    )
    np.testing.assert_allclose(half, np.array(plain) / 2)


def test_what_was_drawn_is_carried_out_in_its_order():
    drawn = Drawn(((2, 0.7), (3, 0.05), (0, 1.3), (1, 0.8)), grey=True, sigma=0.8, threshold=128)
    expected = operations.hue(operations.saturation(IMAGE, 0.7), 0.05)
    expected = operations.contrast(operations.brightness(expected, 1.3), 0.8)
    expected = operations.solarise(operations.blur(operations.grey(expected), 0.8))
    assert np.array_equal(drawn(IMAGE), expected)


def test_a_row_holds_what_was_drawn():
    row = Drawn(((2, 0.7), (3, 0.05)), grey=True, sigma=0.8, threshold=130).row()
    assert row == [2, 3, -1, -1, 0.7, 0.05, -1, -1, 1, 0.8, 130]
    assert len(Drawn().row()) == COLUMNS


@pytest.mark.parametrize("policy", COLOURS)
@pytest.mark.parametrize("role", ROLES)
def test_the_same_generator_state_gives_the_same_bytes(policy, role):
    first, second, other = (
        [draw(policy, role, rng)(IMAGE).tobytes() for _ in range(3)] for rng in map(np.random.default_rng, (5, 5, 6))
    )
    assert first == second
    assert (first == other) == (policy == "none")


@pytest.mark.parametrize("policy", COLOURS)
@pytest.mark.parametrize("role", ROLES)
def test_no_policy_changes_the_image_it_is_given(policy, role):
    given, rng = IMAGE.copy(), np.random.default_rng(0)
    for _ in range(20):
        out = draw(policy, role, rng)(given)
        assert (out.shape, out.dtype) == (IMAGE.shape, np.uint8)
    assert np.array_equal(given, IMAGE)


@pytest.mark.parametrize("role", ROLES)
def test_the_policy_none_draws_nothing(role):
    assert draw("none", role, np.random.default_rng(0)) == Drawn()


@pytest.mark.parametrize("policy", COLOURS)
def test_a_policy_has_every_role_and_weights_that_sum_to_one(policy):
    assert set(COLOURS[policy]) == set(ROLES)
    for mixture in COLOURS[policy].values():
        assert sum(weight for weight, _ in mixture) == pytest.approx(1)


def test_only_randaugment_needs_the_workers():
    assert [policy for policy in COLOURS if not batchable(policy)] == ["randaug"]


def test_an_unknown_policy_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match="did you mean dino"):
        draw("dinno", "local", np.random.default_rng(0))
