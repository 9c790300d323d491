"""The page holds everything there is, says what is missing, and lets nobody's names become markup."""

import json
import re
from html.parser import HTMLParser

import pytest
from made_runs import health_row, make_run, step_rows
from PIL import Image

from triptych import snapshots
from triptych.errors import UserError
from triptych.report.frames import frames, spread
from triptych.report.html import Html, el, join, number
from triptych.report.page import report

HOSTILE = "<script>alert(1)</script>\"' onload=x &lt;"
SECTIONS = "verdict curves terms evaluations pictures data cost environment commands recipe".split()


class Parsed(HTMLParser):
    """Tags with their attributes, and whether they nest."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def page(folder, **options) -> str:
    return report([folder], **{"results": [], **options}).read_text()


def test_every_section_is_there_and_what_is_missing_is_said(tmp_path):
    text = page(make_run(tmp_path / "run"))
    tags = Parsed(text).tags
    assert [a["id"] for tag, a in tags if tag == "section"] == SECTIONS
    assert [a["href"] for tag, a in tags if tag == "a"] == [f"#{name}" for name in SECTIONS]
    assert "No evaluation found: run <code>triptych eval knn" in text
    assert "No pictures found" in text
    assert "No audit: nowhere is not here" in text
    assert "triptych train --recipe udi_quickstart --config" in text
    assert sum(tag == "svg" for tag, _ in tags) == 9  # loss, class, 3 of health, 2 rates, 2 of speed
    assert not list(tmp_path.glob("run/*.part"))


def test_it_needs_nothing_from_outside(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "pictures").mkdir()
    Image.new("RGB", (40, 30)).save(snapshots.path_of(folder, 0))
    tags = Parsed(page(folder)).tags
    sources = [value for _, a in tags for name, value in a.items() if name in ("src", "srcset", "data", "action")]
    assert sources
    assert all(value.startswith("data:image/webp;base64,") for value in sources)
    assert not [tag for tag, _ in tags if tag in ("link", "iframe", "object", "base", "form")]
    assert sum(tag == "script" for tag, _ in tags) == 1
    (policy,) = [a["content"] for tag, a in tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert all(a.get("alt") for tag, a in tags if tag == "img")


def test_hostile_names_stay_text(tmp_path):
    data = tmp_path / "images"
    for name in (HOSTILE.replace("/", "_"), "plain"):
        (data / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (9, 9), (80 * i, 0, 0)).save(data / name / f"<img src=x onerror=y>{i}.png")
    rows = [row | {f"{HOSTILE}": 1.0} for row in step_rows()]
    folder = make_run(tmp_path / "run<script>", rows, data=str(data), broken=f'{{"step": 1, "{HOSTILE}')
    line = {"protocol": HOSTILE, "model": str(folder), "encoder": "x", "test": {"name": HOSTILE}, HOSTILE: 1.0}
    results = tmp_path / "results.jsonl"
    results.write_text(json.dumps(line | {"commit": HOSTILE, "token": HOSTILE}) + "\n")
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("name: udi_quickstart", f"name: {json.dumps(HOSTILE)}"))
    tags = Parsed(page(folder, results=[results])).tags
    assert sum(tag == "script" for tag, _ in tags) == 1
    assert not [a for _, a in tags if any(name.startswith("on") for name in a)]
    assert not [a for tag, a in tags if tag == "img"]


def test_a_killed_runs_torn_lines_and_nan_are_tolerated(tmp_path):
    rows = [row | {"class": float("nan")} if row["step"] == 5 else row for row in step_rows(11)]
    text = page(make_run(tmp_path / "run", rows, broken='{"step": 11, "epo'))
    assert "1 line of metrics.jsonl cannot be read" in text
    assert "1 values are not finite" in text
    assert "not finished: step 11 of 16" in text
    assert "Nothing was measured yet" in text


@pytest.mark.parametrize("recipe", ["", "name: [", "name: udi_small\nunknown: 1\n", "\udcff"])
def test_a_recipe_of_another_version_still_has_its_curves(tmp_path, recipe):
    folder = make_run(tmp_path / "run")
    (folder / "recipe.yaml").write_bytes(recipe.encode(errors="surrogateescape"))
    (folder / "run.json").write_text("{")
    text = page(folder)
    assert "recipe.yaml is no" in text
    assert text.count("<svg") == 9


def test_runs_are_compared_in_one_colour_each(tmp_path):
    one = make_run(tmp_path / "one")
    two = make_run(tmp_path / "two", [*step_rows(), health_row(15, 20.0)])
    recipe = (two / "recipe.yaml").read_text()
    (two / "recipe.yaml").write_text(recipe.replace("  alpha: 0.5", "  alpha: 0.25"))
    out = report([one, two], out=tmp_path / "both.html", results=[])
    text = out.read_text()
    assert text.count('class="of-run line-0"') == text.count('class="of-run line-1"') == 9
    differ = text.split('id="differences"')[1].split("</section>")[0]
    assert re.findall(r"<td>([^<]*)</td>", differ) == ["method.alpha", "0.5", "0.25"]


MISTAKES = {
    "no run": (lambda place: [place], {}, "is no run"),
    "nothing there": (lambda place: [place / "no"], {}, "is no run"),
    "twice": (lambda place: [make_run(place / "a"), place / "a"], {}, "given twice"),
    "too many": (lambda place: [place / str(i) for i in range(9)], {}, "at most 8"),
    "no metrics": (lambda place: [make_run(place / "a", [])], {}, "has no readable line"),
    "no results": (lambda place: [make_run(place / "a")], {"results": ["none.jsonl"]}, "no such file"),
    "no html": (lambda place: [make_run(place / "a")], {"out": "a/report.txt"}, "ending .html"),
    "no data": (lambda place: [make_run(place / "a")], {"data": "nothing"}, "neither an existing path"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_before_anything_is_written(tmp_path, name):
    folders, options, expected = MISTAKES[name]
    paths = {
        k: [tmp_path / x for x in v] if k == "results" else tmp_path / v if k == "out" else v
        for k, v in options.items()
    }
    with pytest.raises(UserError, match=expected):
        report(folders(tmp_path), **paths)
    assert not list(tmp_path.rglob("*.html"))


def test_pictures_are_few_and_always_the_first_and_the_last(tmp_path):
    (tmp_path / "pictures").mkdir()
    for step in range(0, 90, 3):
        Image.effect_noise((60, 60), 90).save(snapshots.path_of(tmp_path, step))
    snapshots.path_of(tmp_path, 12).write_bytes(b"torn")
    shown = frames(tmp_path, most=8)
    steps = [frame.step for frame in shown.shown]
    assert (shown.there, steps[0], steps[-1]) == (30, 0, 87)
    assert 6 <= len(steps) <= 8
    limited = frames(tmp_path, most=30, limit=sum(len(f.data) for f in frames(tmp_path, most=30).shown) // 4)
    assert 1 < len(limited.shown) < 15
    assert limited.damaged == ["step_000000012.png (UnidentifiedImageError)"]
    assert (limited.shown[0].step, limited.shown[-1].step) == (0, 87)
    assert spread([1, 2, 3], 1) == [3]


def test_what_is_added_to_markup_is_escaped_too():
    assert el("b", "<i>", title='"') == '<b title="&quot;">&lt;i&gt;</b>'
    assert isinstance(el("b") + "<i>", Html)
    assert el("b") + "<i>" == "<b></b>&lt;i&gt;"
    assert join(["&", el("p")]) == "&amp;<p></p>"
    assert [number(v) for v in (0.00001, 1234567.0, 0.5, float("nan"))] == ["1e-5", "1 234 567", "0.5", "nan"]
