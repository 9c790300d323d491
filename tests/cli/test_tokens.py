"""The command line on runs with auxiliary tokens: cost, eval tokens, eval classify, several models side by side."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from triptych.cli import main
from triptych.data.scenes import write
from triptych.encoders.load import load_encoder, load_method
from triptych.errors import UserError

# One epoch of four steps on a ViT of two blocks; nothing is learned that matters here.
TINY = "--batch 8 --epochs 1 --encoder.width 24 --encoder.depth 2 --encoder.heads 3 --loader.workers 0 --health.every 0"
TINY += " --views.global_size 32"
ENSEMBLE = "--method.aux 2 --method.pooled 1 --method.pool_kernel 3"
HEAD = "--method.base.hidden 16 --method.base.embedding 8 --method.base.prototypes 32"
RUNS = {
    "mte": f"--recipe mte_ibot_small {TINY} {HEAD} {ENSEMBLE} --views.local_crops 0",
    "base": f"--recipe ibot_small {TINY} {HEAD.replace('.base', '')} --views.local_crops 0",
    "classes": f"--recipe mte_supervised_small {TINY} {ENSEMBLE}",
    "plain": f"--recipe supervised_small {TINY} --method.average 0",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with 32 training and 16 test scenes, and a finished run of each kind on them."""
    folder = tmp_path_factory.mktemp("place")
    write(folder / "data", train=32, test=16, size=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, words in RUNS.items():
            main(["train", "--data", "data/train", *words.split(), "--out", name])
    return folder


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "200")
    return place


def result(*words: str) -> dict:
    """The JSON line that the command appends."""
    out = Path("results.jsonl")
    main([*words, "--out", str(out)])
    return json.loads(out.read_text().splitlines()[-1])


def test_tokens_of_a_run_in_a_process_of_its_own(place):
    words = ["eval", "tokens", "mte", "--data", "data/train", "--test", "data/test", "--k", "5", "--linear"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "COLUMNS": "200"}
    command = [sys.executable, "-m", "triptych", *words, "--out", "own.jsonl"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "the global token of every image is the same to the last bit" in done.stdout
    for expected in ("pooled 0", "fused embedding", "linear CKA", "linear probe, auxiliary tokens concatenated"):
        assert expected in done.stdout
    row = json.loads((place / "own.jsonl").read_text())
    assert row["protocol"] == "tokens"
    assert row["model"] == "mte@4 (teacher)"
    assert row["removal_is_exact"] is True
    assert row["knn"]["global before removal"] == row["knn"]["global after removal"]
    assert row["analysis"]["names"] == ["global", "aux 0", "aux 1", "pooled 0"]
    assert row["analysis"]["nmi"] is not None
    assert set(row["linear"]) == {"global after removal", "fused embedding", "auxiliary tokens concatenated"}


def test_the_global_token_of_eval_tokens_is_what_eval_knn_measures(here):
    images = ["--data", "data/train", "--test", "data/test", "--k", "5"]
    for weights in ("teacher", "student", "untrained"):
        tokens = result("eval", "tokens", "mte", *images, "--weights", weights)
        knn = result("eval", "knn", "mte", *images, "--weights", weights, "--no-cache")
        assert tokens["knn"]["global after removal"] == knn["top1"]["5"]
        assert f"({weights})" in tokens["model"]
        assert tokens["encoder"] == knn["encoder"]


def test_tokens_of_a_supervised_run_are_of_the_weights_as_trained(here, capsys):
    row = result("eval", "tokens", "classes", "--data", "data/train", "--test", "data/test", "--k", "5")
    assert "of the weights as trained" in capsys.readouterr().out
    assert row["model"] == "classes@4 (student)"
    assert row["removal_is_exact"] is True
    assert row["analysis"]["nmi"] is None


def test_the_classifiers_of_a_supervised_run(here, capsys):
    row = result("eval", "classify", "classes", "--data", "data/train", "--test", "data/test")
    assert list(row["top1"]) == ["global", "ensemble", "aux 0", "aux 1", "pooled 0"]
    assert row["averaged"] is True
    assert row["images"] == 16
    assert "what inference uses" in capsys.readouterr().out
    trained = result("eval", "classify", "classes", "--data", "data/test", "--weights", "student")
    assert trained["averaged"] is False
    assert trained["images"] == 16  # a folder without a held-out part is measured whole
    plain = result("eval", "classify", "plain", "--data", "data")
    assert list(plain["top1"]) == ["global"]
    assert plain["averaged"] is False


def test_a_run_is_evaluated_and_exported_without_what_only_training_needs(here):
    _, method, _ = load_method("mte")
    assert (method.encoder.spec.aux, method.encoder.spec.mask) == (2, True)
    loaded = load_encoder("mte").encoder
    assert (loaded.spec.aux, loaded.spec.mask) == (0, False)
    assert loaded.aux_tokens is None
    assert loaded.mask_token is None
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        whole, kept = method.encoder.eval()(images), loaded(images)
    assert torch.equal(whole.global_token, kept.global_token)
    assert torch.equal(whole.patch, kept.patch)


def test_the_student_of_a_supervised_run_is_what_the_optimiser_trained(here):
    _, method, _ = load_method("classes")
    for weights, model in (("student", method.model), ("teacher", method.average)):
        ours = load_encoder("classes", weights=weights).encoder.trunk.state_dict()
        assert all(torch.equal(v, ours[k]) for k, v in model.encoder.trunk.state_dict().items())


def test_models_side_by_side(here, capsys):
    images = ["--data", "data/train", "--test", "data/test", "--no-cache"]
    row = result("eval", "knn", "mte", "--with", "base", "classes", *images, "--k", "1", "5")
    assert row["model"] == ["mte@4 (teacher)", "base@4 (teacher)", "classes@4 (teacher)"]
    assert len(set(row["encoder"])) == 3
    assert "mte@4 (teacher) + base@4 (teacher)" in " ".join(capsys.readouterr().out.split())
    # Twice the same model: the same cosines, so the same neighbours.
    alone, twice = (result("eval", "knn", "mte", *more, *images, "--k", "5") for more in ([], ["--with", "mte"]))
    assert alone["top1"] == twice["top1"]
    assert alone["model"] == "mte@4 (teacher)"
    probe = result("eval", "linear", "mte", "--with", "base", *images, "--epochs", "2")
    assert probe["encoder"] == row["encoder"][:2]


def test_cost_prints_the_table_of_a_recipe_and_its_overrides(here, capsys):
    main(["cost", "--recipe", "mte_ibot_small", "--method.aux", "3", "--size", "128"])
    said = capsys.readouterr().out
    for expected in ("one 128 x 128 crop", "3 auxiliary class tokens", "TEN", "tokens only", "trained parameters"):
        assert expected in said
    main(["cost", "--config", "mte/recipe.yaml"])
    assert "one 32 x 32 crop" in capsys.readouterr().out


MISTAKES = {
    "tokens of a base": ("eval tokens base --data data", "has no auxiliary tokens"),
    "tokens of a plain supervised run": ("eval tokens plain --data data", "has no auxiliary tokens"),
    "tokens of a timm model": ("eval tokens vit_tiny_patch16_224 --data data", "is not a Triptych run"),
    "classifier of a method without labels": ("eval classify mte --data data", "has no classifier"),
    "size": ("eval tokens mte --data data --size 33", "33x33"),
    "k": ("eval tokens mte --data data --k 99", "use k <="),
    "no such model beside": ("eval knn mte --data data --with nowhere", "'nowhere' is neither"),
    "arch without a bare file": ("eval knn mte --data data --with base --arch vit_tiny_patch16_224", "--arch"),
    "cost of a recipe that is not there": ("cost --recipe mte_ibot_smal", "did you mean mte_ibot_small"),
    "cost at a size": ("cost --recipe mte_ibot_small --size 65", "65x65"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_with_its_remedy_and_exit_code_2(here, name, capsys):
    words, expected = MISTAKES[name]
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert expected in said.err + said.out


def test_other_classes_than_the_runs_are_refused(here):
    write(Path("more"), train=4, test=0, size=32)
    Path("more/train/another").mkdir()
    next(Path("more/train").rglob("*.jpg")).rename("more/train/another/0.jpg")
    with pytest.raises(SystemExit) as stop:
        main(["eval", "classify", "classes", "--data", "more/train"])
    assert stop.value.code == 2


def test_a_folder_without_a_run_or_checkpoint_is_refused(here):
    with pytest.raises(UserError, match="is not a Triptych run"):
        load_method("data")
    Path("empty").mkdir(exist_ok=True)
    Path("empty/recipe.yaml").write_text(Path("mte/recipe.yaml").read_text())
    with pytest.raises(UserError, match="no checkpoint yet"):
        load_method("empty")
