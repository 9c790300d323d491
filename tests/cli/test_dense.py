"""Protocols on patch tokens from the command line: masks, videos, boxes; what is refused, and what is written down."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from drawn_coco import draw_coco
from triptych.cli import main
from triptych.data.scenes import CLASSES, clip, scene, write
from triptych.evals import EVALS
from triptych.evals.published_dense import DENSE

TINY = "--batch 8 --epochs 1 --encoder.width 24 --encoder.depth 2 --encoder.heads 3 --loader.workers 0 --health.every 0"
TINY += " --views.global_size 32 --views.local_size 16 --views.local_crops 2"
TINY += " --method.hidden 16 --method.embedding 8 --method.prototypes 32"


def write_masks(folder: Path) -> None:
    """images/ and masks/ with splits: background, or the scene's class; the two scenes' halves side by side."""
    for split, first, count in (("train", 0, 8), ("val", 100, 4)):
        for i in range(count):
            pair = [scene(first + 2 * i + j, size=48) for j in (0, 1)]
            image = np.concatenate([one.image for one in pair], 1)
            mask = np.concatenate([np.where(one.mask > 0, one.label + 1, 0) for one in pair], 1).astype(np.uint8)
            for kind, pixels in (("images", image), ("masks", mask)):
                path = folder / kind / split / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    (folder / "classes.json").write_text(json.dumps(["nothing", *CLASSES]))


def write_videos(folder: Path, count: int = 2) -> None:
    """DAVIS-2017's layout."""
    for i in range(count):
        film = clip(i, size=48)
        for t, (frame, mask) in enumerate(zip(film.frames, film.masks, strict=True)):
            for kind, pixels, end in (("JPEGImages", frame, "jpg"), ("Annotations", (mask > 0) * np.uint8(1), "png")):
                path = folder / kind / "480p" / f"film{i}" / f"{t:05d}.{end}"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture = Image.fromarray(pixels)
                if end == "png":
                    picture = picture.convert("P")
                    picture.putpalette([0, 0, 0, 255, 0, 0])
                picture.save(path)
    sets = folder / "ImageSets" / "2017"
    sets.mkdir(parents=True)
    (sets / "val.txt").write_text("".join(f"film{i}\n" for i in range(count)))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    write(folder / "data", train=16, test=0, size=32)
    write_masks(folder / "scenes_masks")
    write_videos(folder / "films")
    for split in ("train", "val"):
        draw_coco(folder / "boxes", split, 6, seed=int(split == "val"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TRIPTYCH_CACHE", str(folder / "cache"))
        main(["train", "--recipe", "udi_small", "--data", "data/train", *TINY.split(), "--out", "run"])
    return folder


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TRIPTYCH_CACHE", str(place / "cache"))
    Path("results.jsonl").unlink(missing_ok=True)
    return place


def rows() -> list[dict]:
    return [json.loads(line) for line in Path("results.jsonl").read_text().splitlines()]


def refused(capsys, words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(words.split())
    assert stopped.value.code == 2
    return capsys.readouterr().err


FROZEN = {
    "click": "--data scenes_masks --size 64 --thresholds 0 0.5 --prompt centroid",
    "similarity": "--data scenes_masks --size 64 --per-image 50",
    "video": "--data films --size 48 --radius 4",
    "probe": "--data scenes_masks --size 48",
}


@pytest.mark.parametrize("name", FROZEN)
def test_every_result_says_which_encoder_images_and_settings(name, here, capsys):
    main(["eval", name, "run", *FROZEN[name].split()])
    main(["eval", name, "run", *FROZEN[name].split(), "--weights", "untrained"])
    trained, untrained = rows()
    assert trained["protocol"] == name
    assert trained["encoder"] != untrained["encoder"]
    assert len(trained["test"]["fingerprint"]) == 16
    assert trained["test"] == untrained["test"]
    assert {"commit", "hardware", "torch", "precision"} <= trained.keys()
    assert "mIoU" in (shown := capsys.readouterr().out) or "cosine" in shown or "J&F" in shown


def test_masks_of_videos_are_kept_where_asked_for_and_not_made_twice(here, capsys):
    words = ["eval", "video", "run", *FROZEN["video"].split(), "--masks", "out"]
    main(words)
    assert len(list(Path("out/film0").glob("*.png"))) == 8
    before = {p: p.stat().st_mtime_ns for p in Path("out").rglob("*.png")}
    main(words)
    assert before == {p: p.stat().st_mtime_ns for p in Path("out").rglob("*.png")}
    first, second = rows()
    assert first["scores"] == second["scores"]


def test_target_areas_need_no_encoder(here, capsys):
    main(["eval", "target-area", "--data", "scenes_masks", "--size", "64"])
    table = capsys.readouterr().out
    assert all(unit in table for unit in ("category", "instance", "largest", "component"))


def test_a_linear_segmenter_is_trained_measured_and_gone_on_with(here, capsys):
    words = "eval segmentation run --data scenes_masks --preset linear_small --steps 4 --warmup 1 --batch 2 --run seg"
    main(words.split())
    main(words.split())
    first, second = rows()
    assert first["miou"] == second["miou"]
    assert first["steps"] == 4
    assert first["preset"] == "linear_small (changed)"
    assert len((here / "seg" / "metrics.jsonl").read_text().splitlines()) == 4
    assert "holds another training" in refused(capsys, words.replace("--warmup 1", "--warmup 2"))


def test_a_detector_is_trained_and_measured_with_masks(here, capsys):
    words = "eval detection run --data boxes --preset mask_rcnn_small --steps 2 --warmup 1 --batch 2 --run det"
    words += " --short 48 --longest 96 --test-size 48 --before_crop 48 --crop 32 48 --hidden 16 --channels 8 --rois 8"
    main(words.split())
    (row,) = rows()
    assert row["mask"] is not None
    assert row["test_images"] == 6
    assert "box AP50 %" in capsys.readouterr().out


def test_patches_stand_beside_the_other_protocols_in_one_table(here, capsys):
    words = "eval all run --masks scenes_masks boxes --videos films --dense-size 48 --markdown all.md"
    main(words.split())
    table = Path("all.md").read_text()
    for protocol in ("click", "similarity", "probe", "video"):
        assert f"| {protocol} |" in table
    assert {row["protocol"] for row in rows()} == {"click", "similarity", "probe", "video"}
    assert "run (untrained)" in table


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("click run --data nowhere", "nowhere"),
        ("click run --data scenes_masks --size 33", "33"),
        ("click run --data scenes_masks --thresholds 2", "thresholds"),
        ("video run --data scenes_masks", "davis"),
        ("video run --data films --topk 5 --temperature 0", "temperature"),
        ("probe run --data boxes", "boxes"),
        ("segmentation run --data scenes_masks --preset liner_small", "did you mean linear_small"),
        ("segmentation run --data scenes_masks --stepz 3", "did you mean steps"),
        ("segmentation run --data scenes_masks --steps many", "--steps 'many'"),
        ("segmentation run --data scenes_masks --crop 33", "--crop 33"),
        ("detection run --data scenes_masks", "coco"),
        ("detection run --data boxes --preset mask_rcnn_tiny", "mask_rcnn_small"),
        ("detection run --data boxes --lr fast", "--lr 'fast'"),
        ("all run --masks nowhere", "nowhere"),
    ],
)
def test_a_mistake_is_told_before_any_work(words, said, here, capsys):
    assert said in refused(capsys, f"eval {words}")
    assert not Path("results.jsonl").exists() or not Path("results.jsonl").read_text()
    assert not Path("runs").exists()


def test_a_mistake_that_a_worker_meets_ends_the_command_at_once(here):
    """In a process of its own: workers that nobody ends would be waited for at its exit, for ever."""
    broken = here / "broken"
    write_masks(broken)
    Image.fromarray(np.zeros((5, 7), np.uint8)).save(broken / "masks" / "val" / "2.png")
    words = ["eval", "click", "run", "--data", "broken", "--size", "64"]
    done = subprocess.run([sys.executable, "-m", "triptych", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "they must agree" in done.stderr
    assert "Traceback" not in done.stderr


def test_videos_without_annotations_need_a_folder_for_their_masks(here, capsys):
    write_videos(here / "first_only", 1)
    for path in (here / "first_only" / "Annotations" / "480p" / "film0").glob("*.png"):
        if path.stem != "00000":
            path.unlink()
    assert "--masks FOLDER" in refused(capsys, "eval video run --data first_only --size 48")
    main("eval video run --data first_only --size 48 --masks written".split())
    assert len(list(Path("written/film0").glob("*.png"))) == 8
    assert not Path("results.jsonl").read_text()


def test_what_is_measured_on_other_images_is_their_held_out_part(here):
    main(["eval", "probe", "run", "--data", "scenes_masks", "--test", "scenes_masks", "--size", "48"])
    (row,) = rows()
    assert (row["train_images"], row["val_images"]) == (8, 4)


def test_published_figures_belong_to_protocols_that_exist():
    assert all(row.protocol in EVALS for row in DENSE)
