"""The quickstart: a small form of it in this process, and the real one as a user runs it (slow)."""

import subprocess
import sys

import pytest
from PIL import Image
from rich.console import Console

import triptych.quickstart as module
from triptych.data import scenes
from triptych.encoders.load import load_encoder


@pytest.fixture
def small(monkeypatch):
    """64 scenes and one epoch of a very small encoder: the path, not the learning."""
    recipe = module.udi_quickstart()
    encoder = recipe.encoder.model_copy(update={"width": 24, "depth": 2, "heads": 3})
    toy = recipe.model_copy(update={"encoder": encoder, "epochs": 1, "batch": 16})
    monkeypatch.setattr(module, "udi_quickstart", lambda: toy)
    for name, value in {"TRAIN": 64, "TEST": 24, "CLIPS": 1}.items():
        monkeypatch.setattr(module, name, value)


@pytest.mark.parametrize("learned", [True, False])
def test_it_draws_trains_shows_exports_and_says_whether_it_learned(small, tmp_path, monkeypatch, learned):
    accuracies = iter([30.0, 30.0, 60.0, 60.0] if learned else [30.0, 30.0, 20.0, 20.0])
    monkeypatch.setattr(module, "_measure", lambda *a, **k: (next(accuracies), 5.0))
    console = Console(record=True, width=120)
    if learned:
        module.quickstart(tmp_path / "q", console)
    else:
        with pytest.raises(SystemExit) as stop:
            module.quickstart(tmp_path / "q", console)
        assert stop.value.code == 1
    text = console.export_text()
    assert ("did NOT beat" in text) != learned
    assert "images/s" in text
    assert "finished: 4 steps" in (tmp_path / "q" / "report.html").read_text()
    sheet = Image.open(tmp_path / "q" / "tokens.png")
    assert sheet.width > 4 * 128  # image, class, class+, PCA
    assert load_encoder(str(tmp_path / "q" / "encoder")).encoder.spec.cls_plus == 1
    assert {p.name for p in (tmp_path / "q" / "data").iterdir()} == {"train", "test", "masks", "clips", "clip_masks"}
    assert len(list((tmp_path / "q" / "data" / "train").iterdir())) == len(scenes.CLASSES)


@pytest.mark.slow
def test_the_real_quickstart_beats_the_untrained_encoder(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "triptych", "quickstart", "--out", "q"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
