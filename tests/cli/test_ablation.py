"""`triptych ablate`, and fine-tuning from a run, on real command lines."""

import json
from pathlib import Path

import pytest
import torch

from triptych.cli import main
from triptych.data.scenes import write
from triptych.encoders.load import load_encoder, load_method

ENCODER = "--encoder.width 24 --encoder.depth 2 --encoder.heads 3 --views.global_size 32"
SMALL = f"--batch 8 --epochs 1 {ENCODER} --loader.workers 0 --health.every 0 --method.hidden 16 --method.embedding 8"
TUNING = "--tuning.batch 8 --tuning.epochs 1 --tuning.loader.workers 0 --tuning.health.every 0"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    write(folder / "data", train=16, test=8, size=32)
    return folder


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "200")


def ablate(*words: str) -> None:
    given = " ".join(words).split()
    k = [] if "--k" in given else ["--k", "3"]
    main(["ablate", "--data", "data/train", "--test", "data/test", *k, *given])


def test_rows_of_the_table_are_trained_measured_and_fine_tuned(here, capsys):
    rows = "pixels patch+class"
    ablate(SMALL, TUNING, "--rows", rows, "--out runs")
    shown = capsys.readouterr().out
    assert "3-NN, class token" in shown
    assert "fine-tuned, top-1" in shown
    lines = [json.loads(line) for line in Path("runs/results.jsonl").read_text().splitlines()]
    assert [line["protocol"] for line in lines] == ["knn", "knn", "classify"] * 2
    for row, weights in (("pixels", (1, 0, 0)), ("patch+class", (0, 1, 1))):
        recipe, trained, _ = load_method(f"runs/{row}")
        assert recipe.method.weights == weights
        tuned, classifier, _ = load_method(f"runs/{row}-finetuned")
        assert tuned.encoder.weights == f"runs/{row}"
        assert tuned.method.token == "cls+patch_mean"
        assert classifier.model.head.in_features == 2 * 24
        # Two small steps away from the teacher that it started from.
        start, end = trained.encoder.vit.blocks[0].mlp.fc1.weight, classifier.encoder.vit.blocks[0].mlp.fc1.weight
        assert 0 < (start - end).norm() < 0.1 * start.norm()
    shown = [line.split()[1] for line in shown.splitlines() if line.startswith("│")]
    assert shown[-2:] == rows.split()
    capsys.readouterr()
    ablate(SMALL, TUNING, "--rows", rows, "--out runs")  # the same command goes on: nothing is left to train
    assert capsys.readouterr().out.count("is finished") == 4


def test_without_fine_tuning(here, capsys):
    ablate(SMALL, "--rows class --out other --finetune none")
    assert not Path("other/class-finetuned").exists()
    row = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│ class")][-1]
    assert row.split("│")[-2].strip() == "-"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--rows classes", "no row 'classes' in the table; there are pixels, class"),
        ("--recipe dino_small", "trains dino: the table is about the losses of mmc"),
        ("--method.weights 1 1 1", "are what the table varies"),
        ("--finetune dino_small", "trains dino: give a recipe of supervised training, or none"),
        ("--tuning.epoch 3", "fine-tuning, whose options begin with --tuning.: command line: no setting 'epoch'"),
        (f"{SMALL} --tuning.batch 7", "begin with --tuning.: mixup pairs images"),
        (SMALL, "begin with --tuning.: the data set has 16 images, fewer than one step's batch of 64"),
        ("--k 0", "neighbours from 1"),
        (f"{SMALL} {TUNING} --k 17", "17 neighbours of 16 training images"),
        ("--rows", "--rows without a name: give some of pixels"),
        ("--tuning.views.global_size 64", "fine-tuning takes it from the pre-trained run"),
        ("--tuning.encoder.depth 9", "fine-tuning takes it from the pre-trained run"),
    ],
)
def test_mistakes_are_said_before_anything_is_trained(here, capsys, words, said):
    with pytest.raises(SystemExit) as stopped:
        ablate(words, "--out wrong")
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
    assert not list(Path("wrong").glob("*/recipe.yaml"))


def test_training_starts_from_a_runs_teacher_a_checkpoint_or_an_export(here, capsys):
    main(["train", "--recipe", "mmc_small", "--data", "data/train", *SMALL.split(), "--out", "pretrained"])
    main(["export", "pretrained", "--out", "exported"])
    expected = load_encoder("pretrained").encoder.vit.state_dict()
    checkpoint = str(max(Path("pretrained/checkpoints").glob("*.pt")))
    for i, weights in enumerate(("pretrained", checkpoint, "exported")):
        words = ["--encoder.weights", weights, *ENCODER.split(), "--batch", "16", "--epochs", "1", "--optim.lr", "0"]
        words += ["--health.every", "0", "--loader.workers", "0", "--method.mixup", "0", "--method.cutmix", "0"]
        main(["train", "--recipe", "finetune_small", "--data", "data/train", *words, "--out", f"tuned{i}"])
        found = load_encoder(f"tuned{i}").encoder.vit.state_dict()
        assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)
    for wrong, said in (
        ("--encoder.weights nowhere", "nowhere: no such file; give a run's folder"),
        ("--encoder.weights pretrained --encoder.heads 4", "it has heads 3, the encoder 4"),
        ("--encoder.weights pretrained --encoder.depth 3", "it has depth 2, the encoder 3"),
    ):
        more = [*words[2:], *wrong.split(), "--out", "unfit"]
        with pytest.raises(SystemExit) as stopped:
            main(["train", "--recipe", "finetune_small", "--data", "data/train", *more])
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err
        assert not Path("unfit").exists()
