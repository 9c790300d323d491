"""The page in a real browser: no error, charts with points, no sideways scrolling on a phone, values under a finger."""

import html
import json
import re
import shutil
import subprocess

import pytest
from made_runs import health_row, make_run, step_rows
from PIL import Image

from triptych import snapshots
from triptych.report.page import report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome is installed")

# A browser's window is 500 px wide at least, so the page is looked at through a frame of a phone's width.
PHONE = """<!DOCTYPE html><iframe id="phone" style="width:390px;height:800px" srcdoc="%s"></iframe><script>
document.getElementById("phone").addEventListener("load", (event) => {
  const inner = event.target.contentWindow, page = inner.document, svg = page.querySelector("svg[data-lines]");
  const readout = svg.parentElement.querySelector(".readout"), still = readout.textContent;
  const box = svg.getBoundingClientRect(), at = { clientX: box.left + box.width * 0.6, clientY: box.top + 20 };
  svg.dispatchEvent(new inner.PointerEvent("pointerdown", { ...at, bubbles: true, pointerType: "touch" }));
  const touched = readout.textContent;
  svg.dispatchEvent(new inner.KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
  const shown = () => [...page.querySelectorAll(".frames figure")].map((figure) => !figure.hidden);
  const slider = page.querySelector(".slider input"), last = shown();
  slider.value = 1;
  slider.dispatchEvent(new inner.Event("input"));
  const small = [...page.querySelectorAll("body *")].filter((element) =>
    !element.closest("svg") && element.innerText && parseFloat(inner.getComputedStyle(element).fontSize) < 14);
  document.title = JSON.stringify({
    width: inner.innerWidth, content: page.scrollingElement.scrollWidth, error: page.documentElement.dataset.error,
    ready: Number(page.documentElement.dataset.ready), still, touched, next: readout.textContent, last, second: shown(),
    small: small.map((element) => element.outerHTML.slice(0, 80)),
    overflowing: [...page.querySelectorAll(".scroll table")].filter((t) => t.scrollWidth > 390).length,
    points: [...page.querySelectorAll(".of-run path")].map((path) => path.getTotalLength()),
    colours: page.querySelector("svg").getBoundingClientRect().width,
  });
});
</script>"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The report of two runs with long names, wide tables and pictures."""
    place = tmp_path_factory.mktemp("browser")
    rows = [*step_rows(2000, 1000), health_row(999, 30.0), health_row(1999, 40.0)]
    first = make_run(place / ("a-run-with-a-rather-long-name-" * 3), rows)
    second = make_run(place / "second", [*step_rows(1500), health_row(15, 20.0)])
    (first / "pictures").mkdir()
    for step in (0, 1000, 2000):
        Image.effect_noise((530, 550), 50).save(snapshots.path_of(first, step))
    line = {"model": str(first), "encoder": "x", "token": "cls", "test": {"name": "/a/long/path" * 9}}
    wide = [line | {"protocol": "knn", "top1": {"10": 1.0}, "model": f"{first}@{step}"} for step in range(0, 9000, 999)]
    (place / "results.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in wide))
    return report([first, second], out=place / "report.html", results=[place / "results.jsonl"])


def browse(page, profile) -> tuple[str, list[str]]:
    """-> the document after its scripts ran; what was written to the console"""
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command += [f"--user-data-dir={profile}", "--window-size=1280,900", "--virtual-time-budget=3000", "--dump-dom"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_it_opens_without_an_error_and_draws_every_chart(written, tmp_path):
    dom, console = browse(written, tmp_path / "profile")
    assert not console
    assert "data-error" not in dom.split(">")[1]
    charts = dom.count("<svg")
    assert charts == 9
    assert f'data-ready="{charts}"' in dom
    assert 'class="slider"' in dom


def test_it_reads_well_on_a_phone(written, tmp_path):
    wrapper = tmp_path / "phone.html"
    wrapper.write_text(PHONE.replace("%s", html.escape(written.read_text(), quote=True)))
    dom, console = browse(wrapper, tmp_path / "profile")
    seen = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom, re.DOTALL)[1]))
    assert not console
    assert "error" not in seen
    assert seen["width"] == 390
    assert seen["content"] <= 390, "the page scrolls sideways"
    assert seen["overflowing"], "the wide table was to scroll in its own box"
    assert not seen["small"]
    assert seen["ready"] == 9
    assert len(seen["points"]) > 18
    assert sum(length > 100 for length in seen["points"]) > 18
    assert re.search(r"epoch [\d.]+, step \d+ · a-run-.* [\d.]+ · second [\d.]+", seen["touched"])
    assert len({seen["still"], seen["touched"], seen["next"]}) == 3
    assert (seen["last"], seen["second"]) == ([True, False, True], [True, True, False])
