"""Long curves get short without losing what matters; axes have round numbers; charts hold real points."""

import json
import math
import re
from html import unescape

import pytest

from triptych.report.charts import Line, chart
from triptych.report.run import Series
from triptych.report.series import log_ticks, thinned, ticks, trend


def spiky(count: int) -> list[float]:
    """A smooth curve with one value that stands out."""
    values = [math.sin(i / 500) for i in range(count)]
    values[count // 3] = 50.0
    return values


@pytest.mark.parametrize("count", [999, 1001, 12345])
def test_a_single_spike_survives_thinning(count):
    values = spiky(count)
    points = thinned(range(count), values, 1000)
    assert len(points) <= 1000
    assert (count // 3, 50.0) in points
    assert min(y for _, y in points) == min(values)
    assert [x for x, _ in points] == sorted(x for x, _ in points)


def test_what_is_not_finite_is_a_gap():
    values = [1.0, math.nan, 3.0, math.inf]
    assert thinned(range(4), values) == [(0, 1.0), (1, None), (2, 3.0), (3, None)]
    many = [1.0] * 3000
    many[1500] = math.nan
    assert any(y is None for _, y in thinned(range(3000), many))
    assert all(y == 1.0 for _, y in trend(range(3000), many))


def test_the_trend_is_the_mean_of_equal_parts():
    values = [float(i % 7) for i in range(600)]
    found = trend(range(600), values, parts=60)
    assert len(found) == 60
    assert found[3] == (pytest.approx(34.5), pytest.approx(sum(values[30:40]) / 10))
    assert trend(range(10), values[:10]) == []


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 17), (1e-6, 3e-5), (28, 35.1), (0, 12345)])
def test_ticks_are_few_round_and_inside(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 6
    assert all(low - 1e-9 <= t <= high * (1 + 1e-9) for t in found)
    step = found[1] - found[0]
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 5)


def test_logarithmic_ticks_are_powers_or_their_fellows():
    assert log_ticks(0.5, 2000) == [1, 10, 100, 1000]
    assert log_ticks(1.5, 60) == [2, 5, 10, 20, 50]
    assert len(log_ticks(1e-9, 1e9)) <= 5


def drawn(values, steps=None, each=10):
    steps = list(range(len(values))) if steps is None else steps
    return str(chart("<b>loss</b>", "nats", [Line("a & b", 0, Series(steps, values), each)]))


def test_a_chart_holds_the_logged_values_for_the_reader_and_for_the_script():
    text = drawn([4.0, 2.0, 3.0])
    (lines,) = re.findall(r'data-lines="([^"]*)"', text)
    assert json.loads(unescape(lines)) == [{"label": "a & b", "each": 10, "x": [0, 0.1, 0.2], "y": [4, 2, 3]}]
    assert "4 to 3" in text
    assert "<b>" not in text
    (path,) = re.findall(r'<path d="([^"]*)"', text)
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path)]
    assert heights[1] > heights[2] > heights[0], "larger values are higher up"


def test_a_curve_over_many_magnitudes_has_a_logarithmic_axis_and_others_have_not():
    assert "log scale" in drawn([1e-4, 1e-2, 1.0])
    assert "log scale" not in drawn([0.0, 1e-2, 1.0])
    assert "log scale" not in drawn([1.0, 2.0, 3.0])


@pytest.mark.parametrize("values", [[math.nan], [math.nan, 1.0], [5.0], [5.0, 5.0], [0.0, 0.0], [-1.0, math.inf]])
def test_a_chart_of_odd_values_is_still_a_chart(values):
    text = drawn(values)
    lost = sum(not math.isfinite(v) for v in values)
    assert (f"{lost} values are not finite" in text) == bool(lost)
    assert "nan" not in "".join(re.findall(r'(?:d|cy|y1)="([^"]*)"', text))
