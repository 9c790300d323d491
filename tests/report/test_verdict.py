"""The verdict says what the log says, and warns by the rules that it states."""

import math
import re
from pathlib import Path

import pytest
from made_runs import health_row, make_run, step_rows

from triptych.recipes import RECIPES
from triptych.report.run import read_run
from triptych.report.terms import OF_METHOD, meaning
from triptych.report.verdict import stepping, verdict


@pytest.fixture
def said(tmp_path):
    """said(rows, saved) -> {level: texts} of the verdict on a run that logged these rows."""

    def say(rows, saved=(16,), unreadable=(), broken=""):
        folder = make_run(tmp_path / f"run{len(list(tmp_path.iterdir()))}", rows, broken=broken)
        for step in saved:
            (folder / "checkpoints" / f"step_{step:09d}.pt").touch()
        found = {"good": [], "note": [], "warning": []}
        for finding in verdict(read_run(folder), list(unreadable)):
            found[finding.level].append(finding.text)
        return {level: " | ".join(texts) for level, texts in found.items()}

    return say


def test_a_good_run_has_no_warning(said):
    found = said([*step_rows(), health_row(7, 30.0), health_row(15, 40.0)])
    assert not found["warning"]
    assert "finished: 16 steps, 2 epochs" in found["good"]
    assert "30.0 % at epoch 1, 40.0 %" in found["good"]
    assert "no unreadable image" in found["good"]


def test_each_trouble_is_named(said):
    rows = [*step_rows(), health_row(7, 40.0), health_row(15, 30.0, rankme=1.1)]
    rows[3]["loss"] = math.nan
    rows = [row | {"data_wait": 0.4} if "loss" in row else row for row in rows]
    found = said(rows, saved=(8,), unreadable=["a.jpg: broken"], broken='{"step": 16, "lo')
    for trouble in (
        "not finished: step 16 of 16",
        "not finite at 1 of 16 steps",
        "did not rise",
        "RankMe 1.1 is below 5 % of the encoder's width of 24",
        "40 % of the median step is spent waiting",
        "1 images could not be read",
    ):
        assert trouble in found["warning"]
    assert "1 line of metrics.jsonl cannot be read" in found["note"]


@pytest.mark.parametrize(
    ("values", "warned"),
    [
        ({"health/feature_std": 0.05}, "nearly all the same"),
        ({"health/teacher_entropy_share": 0.99}, "uniform"),
        ({"health/batch_entropy_share": 0.01}, "few prototypes"),
    ],
)
def test_each_kind_of_collapse_is_told_from_the_others(said, values, warned):
    healthy = {"health/feature_std": 0.9, "health/teacher_entropy_share": 0.5, "health/batch_entropy_share": 0.9}
    assert not said([*step_rows(), health_row(15, 40.0) | healthy])["warning"]
    assert warned in said([*step_rows(), health_row(15, 40.0) | healthy | values])["warning"]


def test_time_is_that_of_the_logged_steps(tmp_path):
    rows = [row | {"images_per_second": 2.0 if row["step"] else 4.0} for row in step_rows()]
    told = dict(stepping(read_run(make_run(tmp_path / "run", rows))))
    assert told["images/s, median step"].startswith("2 ")
    assert told["time in training steps"].startswith("0:31 ")  # 4 images at 4/s, 15 times 4 at 2/s


def test_health_is_measured_after_its_step_and_a_loss_before(tmp_path):
    run = read_run(make_run(tmp_path / "run"))
    assert run.columns["loss"].steps == list(range(16))
    assert run.columns["health/knn"].steps == [8, 16]
    assert (run.steps_per_epoch, run.total, run.done) == (8, 16, 16)


@pytest.mark.parametrize("method", OF_METHOD)
def test_the_report_explains_the_terms_that_the_methods_page_lists(method):
    """Neither fewer nor more: what is said of a term is not invented."""
    page = (Path(__file__).parents[2] / "docs" / "methods" / f"{method}.md").read_text()
    listed = page.split("## Logged terms")[1].split("\n## ")[0].replace("; `loss` is", "")
    first = [line.split("|")[1] for line in listed.splitlines() if line.startswith("| `")]
    terms = re.findall(r"`([^`]+)`", " ".join(first) or listed.split(":")[0])
    assert set(OF_METHOD[method]) == {t for t in terms if t != "loss" and not t.startswith("health/")}


def test_every_method_has_its_terms():
    assert {make().method.name for make in RECIPES.values()} == set(OF_METHOD)


def test_what_a_wrapped_method_logs_is_explained_by_its_own_page():
    mte = RECIPES["mte_udi_small"]()
    assert meaning("class+", mte) == OF_METHOD["udi"]["class+"]
    assert meaning("distill", mte) == OF_METHOD["mte"]["distill"]
    assert meaning("unheard of", mte) == ""
