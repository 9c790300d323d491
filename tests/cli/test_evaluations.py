"""Every evaluation of frozen encoders, from the command line: one contract, and what each adds."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from triptych.cli import main
from triptych.data.scenes import write
from triptych.evals import EVALS
from triptych.evals.published import PUBLISHED

TINY = "--batch 8 --epochs 1 --encoder.width 24 --encoder.depth 2 --encoder.heads 3 --loader.workers 0 --health.every 0"
TINY += " --views.global_size 32 --views.local_size 16 --views.local_crops 2"
TINY += " --method.hidden 16 --method.embedding 8 --method.prototypes 32"

# Words of each protocol on features that its own test below does not cover.
WORDS = {
    "knn": "knn run --k 1 3 --token cls cls_plus",
    "linear": "linear run --epochs 2 --preset ibot",
    "logistic": "logistic run --share 0.5 --per-class 1 --draws 2",
    "fewshot": "fewshot run --ways 2 --queries 1 --episodes 5",
    "clustering": "clustering run --restarts 2",
    "cka": "cka run vit_tiny.pt",
    "retrieval": "retrieval run",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """40 training and 40 test scenes, a run of UDI on them, and a bare file of weights."""
    folder = tmp_path_factory.mktemp("place")
    write(folder / "data", train=40, test=40, size=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TRIPTYCH_CACHE", str(folder / "cache"))
        main(["train", "--recipe", "udi_small", "--data", "data/train", *TINY.split(), "--out", "run"])
        main(["export", "run", "--out", "encoder"])
    (folder / "vit_tiny.pt").write_bytes(b"")
    from safetensors.torch import load_file

    torch.save(load_file(folder / "encoder" / "model.safetensors"), folder / "vit_tiny.pt")
    return folder


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TRIPTYCH_CACHE", str(place / "cache"))
    for file in ("results.jsonl", "results.md"):
        Path(file).unlink(missing_ok=True)
    return place


def lines() -> list[dict]:
    return [json.loads(line) for line in Path("results.jsonl").read_text().splitlines()]


def refused(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([*words])
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("name", EVALS)
def test_every_evaluation_has_a_command_and_a_page(name, capsys):
    main(["eval", name, "--help"])
    assert "--data" in capsys.readouterr().out
    pages = {"patches": "experiments", "gradients": "experiments", "copy": "copy_detection", "prototypes": "clustering"}
    page = Path(__file__).parents[2] / "docs" / "protocols" / f"{pages.get(name, name)}.md"
    assert f"triptych eval {name}" in page.read_text()


@pytest.mark.parametrize("name", WORDS)
def test_every_result_says_which_encoder_images_and_settings(name, here, capsys):
    heads = ["--heads", "3"] if "vit_tiny.pt" in WORDS[name] else []
    main(["eval", *WORDS[name].split(), "--data", "data", *heads])
    text = capsys.readouterr().out
    for line in lines():
        assert line["protocol"] == name
        assert {"model", "encoder", "size", "precision", "token", "layers", "commit", "hardware"} <= line.keys()
        images = line["gallery"] if name == "retrieval" else line["test"]
        assert {"name", "fingerprint"} == images.keys()
        assert f"{name}, " in text
    assert len(lines()) == (2 if name in ("knn", "logistic") else 1)


def test_presets_are_the_papers_and_exclude_what_they_say(here, capsys):
    main(["eval", "knn", "run", "--data", "data", "--preset", "mte"])
    assert list(lines()[0]["top1"]) == ["10"]
    assert "give one of them" in refused(capsys, "eval", "knn", "run", "--data", "data", "--preset", "mte", "--k", "3")
    assert "cls_plus" in refused(capsys, "eval", "knn", "encoder", "--data", "data", "--token", "cls_minus")
    assert "leave out --size" in refused(
        capsys, "eval", "retrieval", "run", "--data", "data", "--preset", "dino", "--size", "32"
    )


def test_the_best_on_test_is_reported_only_where_asked_for_and_says_so(here, capsys):
    words = ["eval", "linear", "run", "--data", "data", "--preset", "ibot", "--epochs", "3"]
    said = []
    for more in ([], ["--select", "paper"]):
        main([*words, *more])
        said.append(" ".join(capsys.readouterr().out.replace("│", " ").split()))
    assert "held-out tenth" in said[0]
    assert "the paper's way" in said[1]
    honest, papers = lines()
    assert papers["top1"] == papers["best_epoch_top1"] == honest["best_epoch_top1"] >= honest["top1"]


def test_the_linear_probe_can_see_fresh_augmentations(here):
    main(["eval", "linear", "run", "--data", "data", "--preset", "dino", "--epochs", "2", "--augment"])
    assert "crop" in lines()[0]["augmentation"]
    assert lines()[0]["layers"] == 2  # of four, what this encoder has


def test_several_encoders_are_one_by_concatenation(here):
    main(["eval", "knn", "run", "--with", "encoder", "--data", "data", "--k", "1"])
    assert lines()[0]["model"] == ["run@5 (teacher)", "encoder"]


def test_copies_are_found(here, tmp_path):
    rng = np.random.default_rng(0)
    for folder in ("original", "strong"):
        (tmp_path / folder).mkdir()
    for i in range(3):
        image = Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8))
        for folder in ("original", "strong"):
            image.save(tmp_path / folder / f"{2000 + i}00.png")
    main(["eval", "copy", "run", "--data", str(tmp_path), "--size", "32"])
    assert lines()[0]["mean_ap"] == 100


def test_prototypes_are_pseudo_labels(here):
    main(["eval", "prototypes", "run", "--data", "data"])
    assert lines()[0]["prototypes"] == 32


def test_fine_tuning_takes_the_runs_encoder_and_few_labels(here, capsys):
    words = ["eval", "finetune", "run", "--data", "data", "--run", "tuned", "--per-class", "2", "--draw", "1"]
    words += ["--epochs", "1", "--batch", "4", "--loader.workers", "0", "--health.every", "0"]
    main(words)
    (line,) = lines()
    assert line["train_images"] == 2 * line["classes"]
    assert line["size"] == 32
    assert line["labels"]["per_class"] == 2
    checkpoint = str(next(Path("run/checkpoints").glob("*5.pt")))
    main(["eval", "finetune", checkpoint, *words[3:5], "--run", "again", *words[7:]])
    assert lines()[1]["encoder"] == line["encoder"]  # a checkpoint of a run is that run
    assert lines()[1]["top1"] == line["top1"]
    both = refused(capsys, *words, "--share", "0.5")
    assert "one of them" in both


def test_all_protocols_are_one_table_beside_the_untrained_encoder(here, capsys):
    words = "eval all run --data data --episodes scenes:20@1 --retrieval data --markdown results.md"
    main([*words.split(), "--protocols", "knn", "logistic", "fewshot", "clustering", "cka", "retrieval"])
    text, table = capsys.readouterr().out, Path("results.md").read_text()
    for word in ("knn", "logistic", "clustering", "cka", "retrieval", "run (untrained)"):
        assert word in table
        assert word.split()[0] in text
    found = {(line["protocol"], line["model"]) for line in lines()}
    assert ("knn", "run@5 (teacher)") in found
    assert ("knn", "run (untrained)") in found
    # 20 scenes of 8 classes are too few for episodes of 1 + 15 images: said, not silently skipped
    assert "left out: fewshot: 0 of 8 classes have 1 + 15 images" in " ".join(table.split())
    assert "Reported by the papers" not in table  # of scenes no paper reports anything


def test_a_mistake_costs_no_work(here, capsys):
    cases = {
        "eval all run --data data nowhere": "neither an existing path",
        "eval all run": "nothing to measure on",
        "eval all run --data data --protocols knm": "did you mean knn",
        "eval all run --data data --preset dina": "did you mean dino",
        "eval logistic run --data data --share 2": "share of labels is 2",
        "eval logistic run --data data --share 0.1 --draws 0": "0 draws",
        "eval cka run --data data": "compares two or more",
        "eval knn run --data data --temperature nan": "temperature is nan",
        "eval knn run --data data --k 0": "each >= 1",
        "eval knn run --data data --size 0": "size",
        "eval clustering run --data data --seed -1": "seed",
        "eval logistic run --data data --labels nowhere.txt": "no such file",
        "eval retrieval run --data data --scales nan": "at most 4",
        "eval all run --data data --protocols retrieval": "measure nothing on data",
        "eval all run --data data --markdown results.jsonl": "overwrite",
        "eval all run --data data --markdown data": "--markdown data is a folder",
        "eval finetune timm:vit_tiny_patch16_224 --data data": "starts from a run",
        "eval copy run --data data": "has no folder original",
        "embed run --data data --out f.npy --partial": "about bare files of weights",
        "eval knn vit_tiny.pt --data data --arch vit_large_patch14_224": "width 1024",
        "eval retrieval run --data data --crop-queries": "no boxes",
    }
    for words, said in cases.items():
        assert said in refused(capsys, *words.split())


def test_a_set_that_is_tested_on_itself_is_told(here, capsys):
    main(["eval", "knn", "run", "--data", "data/train", "--test", "data/train", "--k", "1"])
    assert "the same images" in " ".join(capsys.readouterr().out.split())
    assert lines()[0]["top1"]["1"] == 100


def test_every_line_says_of_which_set_of_queries_it_is(here):
    images = sorted(str(p.relative_to("data")) for p in Path("data/train").rglob("*.*"))[:6]
    truth = {"gallery": images[:4], "a_queries": [{"file": images[4], "positive": [0]}]}
    truth["b_queries"] = [{"file": images[5], "positive": [1, 2]}, {"file": images[0], "positive": [0]}]
    Path("data/truth.json").write_text(json.dumps(truth))
    main(["eval", "retrieval", "run", "--data", "data/truth.json"])
    one, two = lines()
    assert one["set"] != two["set"]
    assert one["queries"] != two["queries"]
    assert (one["query_images"], two["query_images"]) == (1, 2)


def test_revisited_sets_are_seen_as_the_preset_says_also_among_all_protocols(here, tmp_path):
    folder = tmp_path / "roxford5k"
    (folder / "jpg").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a", "b", "q"):
        Image.fromarray(rng.integers(0, 255, (60, 90, 3), dtype=np.uint8)).save(folder / "jpg" / f"{name}.jpg")
    gnd = [{"bbx": [0, 0, 50, 50], "easy": [0], "hard": [1], "junk": []}]
    about = {"imlist": ["a", "b"], "qimlist": ["q"], "gnd": gnd}
    (folder / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(about))
    main(["eval", "all", "run", "--no-untrained", "--retrieval", str(folder), "--protocols", "retrieval"])
    main(["eval", "retrieval", "run", "--data", str(folder), "--preset", "dino"])
    among, alone = lines()
    assert (among["shape"], among["size"], among["resize"]) == ("longest", 224, None)
    assert among == alone


def test_published_figures_are_percent_of_protocols_that_exist():
    assert all(row.protocol in EVALS and 0 < row.value < 100 for row in PUBLISHED)
    assert len(set(PUBLISHED)) == len(PUBLISHED)
