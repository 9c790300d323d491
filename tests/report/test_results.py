"""Lines of results files find their run, and their numbers find their cell."""

import json

import pytest

from triptych.report.tables import figures, of_runs, read_results, side_by_side


def knn(model, encoder, top1, **more):
    about = {"protocol": "knn", "model": model, "encoder": encoder, "token": "cls", "test": {"name": "photos [val]"}}
    return about | {"top1": {"10": top1}, "train_images": 9, "preset": None} | more


def test_a_line_is_a_runs_by_its_encoder_or_by_its_path_and_not_otherwise(tmp_path):
    run = tmp_path / "run"
    lines = [
        knn(f"{run}@8 (teacher)", "of an older step", 1.0),
        knn("exported", "abc", 2.0),
        knn(f"{run} (untrained)", "x", 3.0),
        knn(f"{run}2@8 (teacher)", "y", 4.0),
        knn("timm:vit_tiny_patch16_224", "z", 5.0),
        {"protocol": "finetune", "model": "elsewhere", "encoder": "z", "run": str(run), "top1": 6.0},
        {"protocol": "bench", "part": "step"},
    ]
    found = of_runs(lines, [run], [{"abc": "teacher, step 16"}])
    assert [(r.order, r.which) for r in found] == [
        (5, "fine-tuned"),
        (2, "untrained"),
        (1, "teacher, step 16"),
        (0, "teacher, step 8"),
    ]


def test_encoders_side_by_side_with_the_newest_of_equal_measurements(tmp_path):
    run = tmp_path / "run"
    lines = [
        knn(f"{run}@8 (teacher)", "a", 30.0),
        knn(f"{run} (untrained)", "b", 20.0),
        knn(f"{run}@8 (teacher)", "a", 31.0),
    ]
    columns, rows = side_by_side(of_runs(lines, [run], [{}]))
    assert columns == [(0, "teacher, step 8"), (0, "untrained")]
    (row,) = rows.values()
    assert [row[c].text() for c in columns] == ["31.00", "20.00"]
    assert list(rows) == [("knn", "cls", "top-1 %, k = 10")]


def test_settings_that_differ_tell_rows_apart(tmp_path):
    run = tmp_path / "run"
    lines = [knn(str(run), "a", 30.0, size=48, seed=0), knn(str(run), "a", 33.0, size=96, seed=0)]
    _, rows = side_by_side(of_runs(lines, [run], [{}]))
    assert {key[1] for key in rows} == {"cls; size 48", "cls; size 96"}


def test_settings_that_stand_in_a_mapping_of_their_own_count_too(tmp_path):
    run = tmp_path / "run"
    same = {"protocol": "click", "model": str(run), "test": {"name": "objects"}}
    lines = [
        same | {"settings": {"size": 480, "unit": unit}, "best": 9.0, "floor": 1.0} for unit in ("object", "class")
    ]
    _, rows = side_by_side(of_runs(lines, [run], [{}]))
    assert {key[1] for key in rows} == {"unit object", "unit class"}
    assert len(rows) == 4


def test_margins_percentages_and_unknown_protocols():
    few = {"protocol": "fewshot", "accuracy": 40.0, "accuracy_ci95": 0.5, "best_f1": 33.0, "ways": 5}
    assert {k: c.text() for k, c in figures(few).items()} == {"accuracy, %": "40.00 ± 0.50", "F1, %": "33.00"}
    clusters = {"protocol": "clustering", "metrics": {"nmi": 0.25, "accuracy": 50.0, "images": 9}}
    assert figures(clusters)["NMI, %"].value == 25
    new = {"protocol": "new", "j_mean": 0.5, "seed": 3, "per": {"car": 1, "name": "x"}, "list": [1], "ok": True}
    assert {k: c.value for k, c in figures(new).items()} == {"j mean": 0.5, "per, car": 1}
    alike = {"protocol": "cka", "names": ["a", "b"], "cka": [[1, 0.5], [0.5, 1]]}
    assert figures(alike)["a and b"].value == 0.5


@pytest.mark.parametrize("model", ["a\nb", "x" * 9000, "\0", None, 3, ["a", {}], "(untrained)", "@@ (("])
def test_hostile_names_of_models_are_nobodys(tmp_path, model):
    assert of_runs([{"protocol": "knn", "model": model, "encoder": 5}], [tmp_path / "run"], [{}]) == []


def test_broken_lines_are_counted(tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text(json.dumps({"protocol": "knn"}) + '\n{"protocol": "kn\n\n[1]\n')
    lines, broken = read_results([file])
    assert (len(lines), broken) == (1, 2)
