"""Real command-line runs: train, stop, kill, resume, evaluate, export; and what users' mistakes print."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from triptych.data.scenes import write

# Eight steps of four to an epoch, saved after every second one.
SMALL = [
    "--recipe",
    "udi_quickstart",
    "--batch",
    "8",
    "--epochs",
    "2",
    "--encoder.width",
    "24",
    "--encoder.depth",
    "2",
    "--encoder.heads",
    "3",
]
SMALL += ["--method.hidden", "16", "--method.embedding", "8", "--method.prototypes", "32", "--checkpoint.every", "0.5"]
SMALL += ["--encoder.drop_path", "0.2", "--loader.workers", "1", "--health.every", "1"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}


def triptych(*words, cwd: Path, check: int | None = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "triptych", *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    if check is not None:
        assert done.returncode == check, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with 32 training and 16 test scenes, and one finished run on them."""
    folder = tmp_path_factory.mktemp("place")
    write(folder / "data", train=32, test=16, size=48)
    triptych("train", "--data", "data/train", *SMALL, "--out", "straight", cwd=folder)
    return folder


def last(run: Path) -> dict:
    newest = max((run / "checkpoints").glob("step_*.pt"))
    return torch.load(newest, weights_only=True)


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def rows(run: Path) -> list[dict]:
    timing = {"images_per_second", "data_wait"}
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in timing} for line in lines]


def start_and_wait(place: Path, out: str, steps: int) -> subprocess.Popen:
    """A run in the background that has a checkpoint of at least so many steps."""
    command = [sys.executable, "-m", "triptych", "train", "--data", "data/train", *SMALL, "--out", out]
    run = subprocess.Popen(command, cwd=place, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    end = time.monotonic() + 120
    while time.monotonic() < end and run.poll() is None:
        names = [p.stem for p in (place / out / "checkpoints").glob("step_*.pt")]
        if names and int(max(names).removeprefix("step_")) >= steps:
            return run
        time.sleep(0.005)
    raise AssertionError(run.communicate()[0].decode())


def test_a_run_killed_with_kill_9_ends_bit_identical(place):
    run = start_and_wait(place, "killed", 2)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert last(place / "killed")["step"] < 8, "it was to be killed before its end"
    resumed = triptych("train", "--data", "data/train", *SMALL, "--out", "killed", cwd=place)
    assert "going on from step" in resumed.stdout
    a, b = last(place / "straight"), last(place / "killed")
    assert a["step"] == b["step"] == 8
    assert equal(a, b)  # student, teacher, centres, optimiser, step, unreadable files
    assert rows(place / "straight") == rows(place / "killed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(place, number):
    out = f"stopped{int(number)}"
    run = start_and_wait(place, out, 2)
    run.send_signal(number)
    text = run.communicate(timeout=60)[0].decode()
    assert run.returncode == 128 + number
    assert "saved" in text
    assert "Traceback" not in text
    stopped = last(place / out)["step"]
    assert f"after step {stopped}" in text
    triptych("train", "--data", "data/train", *SMALL, "--out", out, cwd=place)
    assert equal(last(place / "straight"), last(place / out))


def test_an_interrupted_run_ends_even_where_nobody_catches_its_exception(place):
    """Workers ignore SIGTERM; the run must end them itself (Python's clean-up would wait for ever)."""
    script = """
import sys
from pathlib import Path
from triptych.data.sources import open_source
from triptych.settings import parse_overrides, resolve
from triptych.train import train
recipe, _ = resolve("udi_quickstart", None, parse_overrides(sys.argv[1:]))
train(recipe, open_source("data/train"), Path("uncaught"))
"""
    command = [sys.executable, "-c", script, *SMALL[2:], "--epochs", "500"]
    run = subprocess.Popen(command, cwd=place, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    end = time.monotonic() + 120
    while time.monotonic() < end and not list((place / "uncaught" / "checkpoints").glob("step_*[1-9].pt")):
        time.sleep(0.05)
    run.terminate()
    text = run.communicate(timeout=60)[0].decode()
    assert "Interrupted: stopped by SIGTERM" in text


def test_a_finished_run_leaves_metrics_recipe_and_checkpoints(place):
    run = place / "straight"
    metrics = rows(run)
    steps = [row for row in metrics if "loss" in row]
    assert [row["step"] for row in steps] == list(range(8))
    assert {"loss", "class", "class+", "patch", "lr", "weight_decay", "epoch"} <= steps[0].keys()
    health = [row for row in metrics if "health/rankme" in row]
    assert len(health) == 2
    expected = {"knn", "feature_std", "teacher_entropy", "teacher_entropy_share", "batch_entropy_share", "agreement"}
    assert {f"health/{name}" for name in expected} <= health[0].keys()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_000000006.pt", "step_000000008.pt"]
    assert list((run / "tensorboard").iterdir())
    about = json.loads((run / "run.json").read_text())
    assert about["data"]["images"] == 32
    again = triptych("train", "--data", "data/train", *SMALL, "--out", "straight", cwd=place)
    assert "is finished" in again.stdout


def test_a_saved_recipe_runs_again(place):
    shown = triptych("train", "--config", "straight/recipe.yaml", "--show", cwd=place).stdout
    assert "method.prototypes                32" in shown.replace("\n", " \n")
    assert "straight/recipe.yaml" in shown


def test_another_recipe_or_other_images_do_not_take_over_a_run(place):
    words = ["train", "--data", "data/train", *SMALL, "--out", "straight"]
    other = triptych(*words, "--method.alpha", "0.3", cwd=place, check=2)
    assert "method.alpha: 0.5 there, 0.3 now" in other.stderr
    words[2] = "data/test"
    assert "data:" in triptych(*words, cwd=place, check=2).stderr
    workers = triptych("train", "--data", "data/train", *SMALL, "--loader.workers", "0", "--out", "straight", cwd=place)
    assert "is finished" in workers.stdout


def test_knn_linear_and_export_of_a_run(place):
    common = ["straight", "--data", "data/train", "--test", "data/test"]
    table = triptych("eval", "knn", *common, "--token", "cls_plus", "--k", "1", "5", "--no-cache", cwd=place).stdout
    assert "top-1" in table
    triptych(
        "eval", "linear", *common, "--epochs", "3", "--layers", "2", "--weights", "untrained", "--no-cache", cwd=place
    )
    first, second = (json.loads(line) for line in (place / "results.jsonl").read_text().splitlines())
    assert first["protocol"] == "knn"
    assert set(first["top1"]) == {"1", "5"}
    assert second["layers"] == 2
    assert first["encoder"] != second["encoder"]
    identifying = {"model", "encoder", "train", "test", "token", "size", "commit", "torch", "hardware", "triptych"}
    assert identifying <= first.keys()
    exported = triptych("export", "straight", "--out", "encoder", cwd=place).stdout
    assert "maximum difference" in exported
    assert float(exported.split("maximum difference ")[1].split()[0]) < 1e-4
    same = triptych(
        "eval", "knn", "encoder", *common[1:], "--k", "1", "5", "--token", "cls_plus", "--no-cache", cwd=place
    )
    assert same.returncode == 0
    third = json.loads((place / "results.jsonl").read_text().splitlines()[2])
    assert third["top1"] == first["top1"]


def test_unreadable_files_are_skipped_counted_and_named_up_to_the_limit(place):
    folder = place / "damaged"
    write(folder, train=32, test=0, size=48)
    victim = sorted((folder / "train").rglob("*.jpg"))[3]
    victim.write_bytes(victim.read_bytes()[:300])
    words = ["train", "--data", "damaged/train", *SMALL, "--out", "damaged_run"]
    stopped = triptych(*words, cwd=place, check=2)
    assert "more than the 1.0%" in stopped.stderr
    assert victim.name in stopped.stderr
    done = triptych(*words, "--loader.max_unreadable", "0.05", cwd=place)
    assert "1 images could not be read" in done.stdout
    assert victim.name in done.stdout


def test_a_list_that_labels_some_images_trains_and_probes_on_those(place):
    images = sorted((place / "data" / "train").rglob("*.jpg"))
    lines = [f"{p}\t{p.parent.name}" if i % 2 else str(p) for i, p in enumerate(images)]
    (place / "some.txt").write_text("\n".join(lines))
    triptych("train", "--data", "some.txt", *SMALL, "--epochs", "1", "--out", "some", cwd=place)
    assert "health/knn" in rows(place / "some")[-1]


def test_a_broken_link_is_one_more_unreadable_image(place):
    folder = place / "linked"
    write(folder, train=32, test=0, size=48)
    (folder / "train" / "disc" / "gone.jpg").symlink_to("nowhere.jpg")
    words = ["--epochs", "4", "--loader.max_unreadable", "0.05", "--health.every", "0", "--out", "linked_run"]
    done = triptych("train", "--data", "linked/train", *SMALL, *words, cwd=place)
    assert "gone.jpg" in done.stdout


def test_a_run_killed_while_its_folder_was_made_starts_again(place):
    (place / "torn").mkdir()
    (place / "torn" / "run.json").write_text("{}")
    (place / "torn" / "recipe.part").write_text("name: ud")
    triptych("train", "--data", "data/train", *SMALL, "--epochs", "1", "--out", "torn", cwd=place)
    (place / "torn" / "recipe.yaml").write_text("")
    damaged = triptych("train", "--data", "data/train", *SMALL, "--epochs", "1", "--out", "torn", cwd=place, check=2)
    assert "recipe.yaml is damaged" in damaged.stderr


def test_weights_that_are_not_finite_are_never_saved(place, monkeypatch):
    from triptych import step
    from triptych import train as module
    from triptych.data.sources import open_source
    from triptych.settings import parse_overrides, resolve

    def poison(parameters, limit, how):
        for p in parameters:
            if p.grad is not None:
                p.grad.fill_(float("inf"))

    recipe, _ = resolve("udi_quickstart", None, parse_overrides(SMALL[2:]))
    monkeypatch.setattr(step, "clip_gradients", poison)
    with pytest.raises(module.NonFinite, match="checkpoint of step 0 is kept"):
        module.train(recipe, open_source(place / "data" / "train"), place / "infinite")


MISTAKES = {
    "out is a file": (["train", "--data", "data/train", "--batch", "8", "--out", "data/train/disc/00000.jpg"], "data"),
    "results is a folder": (["eval", "knn", "straight", "--data", "data", "--out", "data"], "data"),
    "config is binary": (["train", "--data", "data", "--config", "data/train/disc/00000.jpg"], "is not YAML"),
    "betas": (["train", "--data", "data/train", "--optim.betas", "2", "3"], "less than 1"),
    "scale": (["train", "--data", "data/train", "--views.global_scale", "2", "3"], "smallest <= largest"),
    "srs heads": (["train", "--data", "data/train", "--batch", "8", "--method.srs_heads", "5"], "does not divide"),
    "window": (["train", "--data", "data/train", "--batch", "8", "--method.window_global", "9"], "larger than"),
    "untrained file": (
        ["eval", "knn", "data/train/disc/00000.jpg", "--weights", "untrained", "--data", "data"],
        "trained",
    ),
    "arch": (["eval", "knn", "straight", "--arch", "resnet50", "--data", "data"], "--arch"),
    "no such folder": (["train", "--data", "nothing"], "neither an existing path"),
    "no data": (["train"], "--data is required"),
    "unknown field": (["train", "--data", "data/train", "--method.alpa", "1"], "did you mean method.alpha"),
    "unknown leaf": (["train", "--data", "data/train", "--alpha", "1"], "did you mean method.alpha"),
    "wrong type": (["train", "--data", "data/train", "--epochs", "many"], "epochs = 'many'"),
    "out of range": (["train", "--data", "data/train", "--method.alpha", "3"], "less than or equal to 1"),
    "unknown recipe": (["train", "--data", "data/train", "--recipe", "udi_smal"], "did you mean udi_small"),
    "unknown method": (["train", "--data", "data/train", "--method.name", "dini"], "did you mean dino"),
    "crop and patch": (
        ["train", "--data", "data/train", "--views.local_size", "20", "--batch", "8"],
        "patches of 8 px",
    ),
    "batch": (["train", "--data", "data/train", "--batch", "999"], "set --batch lower"),
    "unknown colour": (["train", "--data", "data/train", "--views.colour", "udo", "--batch", "8"], "did you mean udi"),
    "unlabelled": (["eval", "knn", "vit_tiny_patch16_224", "--data", "flat"], "no labels"),
    "no model": (["eval", "knn", "vit_tiny_patch16_225", "--data", "data"], "did you mean"),
    "no class+": (
        ["eval", "knn", "timm:vit_tiny_patch16_224", "--weights", "untrained", "--data", "data", "--token", "cls_plus"],
        "no class+ token",
    ),
    "export twice": (["export", "straight", "--out", "data"], "is not empty"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_with_its_remedy_and_exit_code_2(place, name, capsys, monkeypatch):
    """In this process: the command line's own main, without the seconds that an import takes."""
    from triptych.cli import main

    (place / "flat").mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(place / "flat" / "a.png")
    monkeypatch.chdir(place)
    words, expected = MISTAKES[name]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--out", "new"] if words[0] == "train" and "--out" not in words else words)
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert expected in said.err + said.out


def test_a_non_finite_loss_stops_with_its_term_and_keeps_the_last_checkpoint(place, monkeypatch):
    from triptych.data.sources import open_source
    from triptych.methods.udi import UDI
    from triptych.settings import parse_overrides, resolve
    from triptych.train import NonFinite, train

    recipe, _ = resolve("udi_quickstart", None, parse_overrides(SMALL[2:]))
    whole = UDI.patch_loss

    def poisoned(self, u_s, u, inside, t):
        return whole(self, u_s, u, inside, t) * (float("nan") if t.step == 5 else 1)

    monkeypatch.setattr(UDI, "patch_loss", poisoned)
    with pytest.raises(NonFinite, match=r"'patch' is nan at step 5; the checkpoint of step 4"):
        train(recipe, open_source(place / "data" / "train"), place / "poisoned")
    kept = last(place / "poisoned")
    assert kept["step"] == 4
    assert all(v.isfinite().all() for v in kept["method"].values())


def test_torchrun_on_two_processes_equals_one(place):
    """The same command under torchrun: the same images, in the same steps; sums differ in their order only."""
    words = [*SMALL, "--encoder.drop_path", "0", "--health.every", "0"]
    triptych("train", "--data", "data/train", *words, "--out", "one", cwd=place)
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "triptych",
    ]
    command = [*launcher, "train", "--data", "data/train", *words, "--out", "two"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = last(place / "one"), last(place / "two")
    assert one["step"] == two["step"] == 8
    for name, value in one["method"].items():
        torch.testing.assert_close(two["method"][name], value, rtol=0, atol=2e-3, msg=name)
    assert [r["step"] for r in rows(place / "two")] == list(range(8))
