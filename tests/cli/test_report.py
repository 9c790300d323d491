"""`triptych report` as a user runs it, on a real small run."""

import pytest
from rich.console import Console

from triptych.cli import main
from triptych.data.scenes import write
from triptych.data.sources import open_source
from triptych.settings import parse_overrides, resolve
from triptych.train import train

SMALL = "--batch 8 --epochs 2 --encoder.width 24 --encoder.depth 2 --encoder.heads 3 --method.hidden 16"
SMALL += " --method.embedding 8 --method.prototypes 32 --loader.workers 0 --health.every 1 --health.pictures 2"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images and a run on them."""
    folder = tmp_path_factory.mktemp("place")
    write(folder / "data", train=16, test=8, size=48)
    recipe, _ = resolve("udi_quickstart", None, parse_overrides(SMALL.split()))
    train(recipe, open_source(folder / "data" / "train"), folder / "run", Console(quiet=True))
    return folder


def test_a_real_run_and_its_evaluation_are_on_one_page(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    main("eval knn run --data data/train --test data/test --k 1 5 --no-cache".split())
    main("eval knn run --data data/train --test data/test --k 1 5 --no-cache --weights untrained".split())
    capsys.readouterr()
    main(["report", "run"])
    assert capsys.readouterr().out.strip() == "run/report.html"
    text = (place / "run" / "report.html").read_text()
    assert "finished: 4 steps, 2 epochs" in text
    assert "teacher, step 4</th>" in text
    assert "untrained</th>" in text
    assert "top-1 %, k = 5" in text
    assert text.count("data:image/webp") == 3
    assert "exact duplicates</dt><dd>0 of 16 compared" in text
    assert "MACs of its forward pass" in text


def test_an_export_of_the_run_is_known_by_its_weights(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    line = '{"protocol": "knn", "model": "encoder", "encoder": "%s", "top1": {"10": 12.5}, "token": "cls"}\n'
    from triptych.encoders.load import load_encoder
    from triptych.evals.features import encoder_hash

    (place / "other.jsonl").write_text(line % encoder_hash(load_encoder("run").encoder) + line % "another")
    main("report run --results other.jsonl --out page.html --sample 0".split())
    text = (place / "page.html").read_text()
    assert "All 1 lines" in text
    assert "12.50" in text
    assert "it was switched off (--sample 0)" in text


def test_other_images_than_the_runs_are_said_to_be(place, monkeypatch):
    monkeypatch.chdir(place)
    (place / "none.jsonl").touch()
    main("report run --data data/test --out other.html --results none.jsonl".split())
    assert "are not those that run was trained on" in (place / "other.html").read_text()


@pytest.mark.parametrize(
    ("words", "expected"),
    [("report data", "is no run"), ("report", "no run is given"), ("report run --results no.jsonl", "no such file")],
)
def test_mistakes_end_with_exit_code_2(place, monkeypatch, capsys, words, expected):
    monkeypatch.chdir(place)
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err
