"""`triptych bench` measures the code of a run, and its figures fit together."""

import json

import pytest
import torch

from triptych import bench_parts
from triptych.bench_parts import Bench
from triptych.cli import main
from triptych.cost import cost
from triptych.data.sources import open_source
from triptych.feed import view_batches
from triptych.flops import Flops
from triptych.schedules import Progress
from triptych.settings import parse_overrides, resolve
from triptych.spans import recorded
from triptych.step import PARTS
from triptych.syncs import Sync
from triptych.train import train

TINY = "--recipe dino_small --encoder.width 24 --encoder.depth 2 --encoder.heads 3 --views.global_size 32".split()
TINY += "--encoder.image_size 32 --views.local_size 16 --views.local_crops 2 --method.hidden 16".split()
TINY += "--method.embedding 8 --method.prototypes 32 --loader.workers 0".split()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(bench_parts, "BANK", 300)
    monkeypatch.setattr(bench_parts, "QUERIES", 10)
    monkeypatch.setattr(bench_parts, "SIDES", {"cpu": (512,), "cuda": (512,)})


def recipe_of(*words):
    return resolve("dino_small", None, parse_overrides([*TINY[2:], *words]))[0]


def bench_of(recipe):
    return Bench(recipe, open_source("scenes:16"), torch.device("cpu"), steps=1)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The lines of one command, by part."""
    out = tmp_path_factory.mktemp("bench") / "results.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_parts, "BANK", 300)
        patch.setattr(bench_parts, "QUERIES", 10)
        parts = "step data knn inference syncs".split()
        main(
            [
                "bench",
                *TINY,
                "--batch",
                "4",
                "--data",
                "scenes:16",
                "--steps",
                "2",
                "--out",
                str(out),
                "--parts",
                *parts,
            ]
        )
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["part"] for row in found] == parts
    return {row["part"]: row for row in found}


def test_every_row_says_what_it_was_measured_on(rows):
    for row in rows.values():
        assert row["protocol"] == "bench"
        assert row["batch"] == 4
        assert row["seed"] == 0
        assert row["data"] == {"name": "scenes:16", "images": 16}
        assert row["settings"]["encoder"]["width"] == 24
        assert {"hardware", "commit", "torch", "triptych", "dtype", "device", "threads"} <= row.keys()


def test_the_parts_of_a_step_make_up_the_step(rows):
    step = rows["step"]
    assert set(step["split"]) == set(PARTS)
    assert all(seconds > 0 for seconds in step["split"].values())
    assert 0.8 * step["split_seconds"] <= sum(step["split"].values()) <= 1.001 * step["split_seconds"]
    assert step["images_per_second"] == pytest.approx(4 / step["seconds_per_step"])


def test_utilisation_is_model_flops_over_those_of_a_matrix_product(rows):
    for row in (rows["step"], rows["inference"]):
        assert 0 < row["mfu"] < 1
        rate = row["flops_per_image"] * row["images_per_second"]
        assert row["mfu"] == pytest.approx(rate / row["matmul_flops_per_second"])
    # `cost` counts all tokens; for the class token the last block leaves the patches' queries and MLP out.
    assert 0.6 < rows["inference"]["flops_per_image"] / (2 * cost(recipe_of()).inference_macs) < 0.8


def test_a_step_costs_up_to_three_forward_passes(rows):
    """Gradients cost twice their forward pass; the teacher has none, and the first layer none of its pixels."""
    stepper = bench_of(recipe_of("--batch", "4")).stepper
    views = next(view_batches(recipe_of("--batch", "4"), open_source("scenes:16"), 8, stepper.device))[0]
    with Flops() as flops:
        stepper.method(views.on_device(stepper.device, stepper.mean, stepper.std), Progress(1, 2))
    assert 1.5 < 4 * rows["step"]["flops_per_image"] / flops.total < 3


def test_memory_holds_weights_averages_and_moments(rows):
    step, larger = rows["step"], bench_of(recipe_of("--batch", "8"))
    trained = sum(p.nbytes for p in larger.stepper.method.parameters() if p.requires_grad)
    assert 4 * trained < step["peak_memory"] < larger.step()["peak_memory"]
    assert step["peak_memory"] < step["max_rss"]


def test_the_loader_knn_and_inference_have_rates(rows):
    assert rows["data"]["images_per_second"] > 0
    assert rows["data"]["images_per_second_of_one_worker"] > 0
    assert rows["data"]["workers"] == 0
    assert rows["knn"]["images_per_second"] > 0
    assert rows["inference"]["images_per_second_from_images"] > 0


def test_a_run_has_the_same_parts(tmp_path):
    with recorded() as seconds:
        train(recipe_of("--batch", "8", "--epochs", "1"), open_source("scenes:16"), tmp_path / "run")
    assert set(PARTS) <= set(seconds)


def test_waits_for_the_device_are_listed(rows, monkeypatch, tmp_path, capsys):
    assert rows["syncs"]["syncs"] == []
    waits = [Sync("nonzero", "losses.py:1 f", True)] * 2
    monkeypatch.setattr(bench_parts, "host_syncs", lambda run: waits)
    main(["bench", *TINY, "--batch", "4", "--parts", "syncs", "--out", str(tmp_path / "out.jsonl")])
    said = capsys.readouterr().out
    assert "losses.py:1 f" in said
    assert "2 x nonzero (gradient)" in said
    assert json.loads((tmp_path / "out.jsonl").read_text())["syncs"] == [vars(w) for w in waits]


def test_without_a_batch_it_is_one_that_a_device_holds(tmp_path, capsys):
    words = ["--recipe", "dino_vits16_in1k_100ep", "--encoder.arch", "vit_tiny_patch16_224", "--method.prototypes", "8"]
    main(["bench", *words, "--parts", "knn", "--steps", "1", "--out", str(tmp_path / "out.jsonl")])
    row = json.loads((tmp_path / "out.jsonl").read_text())
    assert row["batch"] == 64
    assert row["data"]["images"] == 64
    assert "--batch 512" in capsys.readouterr().out


MISTAKES = {
    "no steps": (["--steps", "0"], "at least 1"),
    "steps are no number": (["--steps", "many"], "--steps"),
    "unknown part": (["--parts", "stp"], "did you mean step"),
    "unknown recipe": (["--recipe", "dino_smal"], "did you mean dino_small"),
    "unknown setting": (["--encoder.dept", "2"], "did you mean encoder.depth"),
    "what does not fit": (["--recipe", "udi_small", "--method.srs_heads", "5"], "does not divide"),
    "too few images": (["--data", "scenes:4", "--batch", "8"], "set --batch lower"),
    "no such data": (["--data", "nothing"], "neither an existing path"),
    "labels": (["--recipe", "finetune_small", "--data", "{flat}", "--batch", "1"], "no labels"),
    "results is a folder": (["--out", "{folder}"], "is a folder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_with_its_remedy_and_exit_code_2(name, tmp_path, capsys):
    from PIL import Image

    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flat" / "a.png")
    words, expected = MISTAKES[name]
    given = [w.format(flat=tmp_path / "flat", folder=tmp_path) for w in words]
    given += [] if "--out" in given else ["--out", str(tmp_path / "out.jsonl")]
    with pytest.raises(SystemExit) as stop:
        main(["bench", *given])
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert expected in said.err + said.out
    assert not (tmp_path / "out.jsonl").exists()
