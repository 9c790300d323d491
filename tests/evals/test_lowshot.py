"""Few labels: which images are chosen, by share, by number and by SimCLR's files, and what is said about the draws."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from triptych.data.sources import open_source
from triptych.errors import UserError
from triptych.evals.logistic import SETTINGS, logistic
from triptych.evals.lowshot import chosen, from_file, low_shot, student_t_95

IMAGENETTE = Path(__file__).parents[3] / "shared" / "data" / "imagenette128"


def labels_of(counts, *, seed=0):
    """Shuffled labels with counts[c] images of class c."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]


def blobs(images: int, *, classes=5, width=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % classes
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    return centres[labels] + 1.5 * torch.randn(images, width, generator=g), labels


def test_a_share_is_taken_of_every_class_and_leaves_none_without_an_image():
    labels = labels_of([1000, 250, 149, 20, 1])
    rows = chosen(labels, share=0.01)
    assert torch.bincount(labels[rows]).tolist() == [10, 2, 1, 1, 1]
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert len(chosen(labels, share=1.0)) == len(labels)


def test_the_same_number_of_every_class():
    labels = labels_of([9, 40, 5]) * 3  # class ids with gaps
    rows = chosen(labels, per_class=5)
    assert Counter(labels[rows].tolist()) == {0: 5, 3: 5, 6: 5}
    assert len(set(rows.tolist())) == 15


def test_a_seed_fixes_the_choice_and_another_one_changes_it():
    labels = labels_of([100] * 4)
    assert chosen(labels, per_class=5, seed=3).equal(chosen(labels, per_class=5, seed=3))
    assert not chosen(labels, per_class=5, seed=3).equal(chosen(labels, per_class=5, seed=4))


def test_every_image_is_equally_likely():
    labels = labels_of([10, 30])
    times = torch.zeros(40)
    for seed in range(600):
        times[chosen(labels, share=0.1, seed=seed)] += 1
    assert (times[labels == 0] - 60).abs().max() < 5 * 60**0.5  # 600 draws of 1 in 10
    assert (times[labels == 1] - 60).abs().max() < 5 * 60**0.5


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "either a share or a number"),
        ({"share": 0.1, "per_class": 1}, "either a share or a number"),
        ({"share": 0.0}, "0.01 is 1 %"),
        ({"share": 10.0}, "at most 1"),
        ({"per_class": 0}, "at least 1"),
        ({"per_class": 6}, "1 of 2 classes have fewer, the smallest has 5"),
    ],
)
def test_bad_amounts_are_named(given, words):
    with pytest.raises(UserError, match=words):
        chosen(labels_of([9, 5]), **given)


KEYS = ("a/1.JPEG", "b/1.JPEG", "b/2.JPEG", "b/c/3.JPEG")


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n"])
def test_file_names_and_ends_of_paths_find_their_images_in_the_file_s_order(tmp_path, end):
    """The last line counts with and without a newline: UDI's reader cuts a letter off every line."""
    file = tmp_path / "few.txt"
    file.write_text(f"2.JPEG\nb/1.JPEG\nc/3.JPEG\ntrain/a/1.JPEG{end}", newline="")
    assert from_file(file, KEYS).tolist() == [2, 1, 3, 0]


def test_part_of_a_name_is_not_the_name(tmp_path):
    file = tmp_path / "few.txt"
    file.write_text("n01_10.JPEG")
    assert from_file(file, ["x/nn01_10.JPEG", "x/n01_10.JPEG"]).tolist() == [1]
    with pytest.raises(UserError, match="no image"):
        from_file(file, ["x/nn01_10.JPEG", "n01_10.JPEG/y"])


def test_the_exact_path_wins(tmp_path):
    file = tmp_path / "few.txt"
    file.write_text("1.JPEG\n")
    assert from_file(file, ["a/1.JPEG", "1.JPEG"]).tolist() == [1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("9.JPEG\n2.JPEG\nd/2.JPEG", "2 of 3 names are no image of the data: 9.JPEG, d/2.JPEG"),
        ("1.JPEG", "1 of 1 names fit several images"),
        ("2.JPEG\nb/2.JPEG", "1 of 2 names mean an image that another line means too: b/2.JPEG"),
        ("x\n" * 9, r"9 of 9 names are no image of the data: x, x, x \.\.\."),
        ("\n \n", "lists no image"),
    ],
)
def test_names_that_do_not_mean_one_image_are_counted_and_shown(tmp_path, text, words):
    file = tmp_path / "few.txt"
    file.write_text(text)
    with pytest.raises(UserError, match=words):
        from_file(file, KEYS)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.txt cannot be read"):
        from_file(tmp_path / "none.txt", KEYS)


@pytest.mark.skipif(not IMAGENETTE.exists(), reason=f"{IMAGENETTE} is not on this machine")
@pytest.mark.parametrize(("name", "images"), [("train_1percent.txt", 97), ("train_10percent.txt", 947)])
def test_imagenette_s_lists_name_images_of_every_class(name, images):
    source = open_source(IMAGENETTE / "train.zip")
    rows = from_file(IMAGENETTE / name, [source.key(i) for i in range(len(source))])
    assert len(rows) == images
    assert {source.label(i) for i in rows.tolist()} == set(range(10))
    lines = (IMAGENETTE / name).read_text().splitlines()
    assert [source.key(i) for i in rows.tolist()] == lines


def test_each_draw_is_logistic_regression_on_its_rows_and_the_mean_is_theirs():
    train, labels = blobs(200)
    test = blobs(300, seed=1)
    subsets = [chosen(labels, per_class=2, seed=seed) for seed in range(3)]
    result = low_shot(train, labels, *test, subsets, SETTINGS["msn_few"])
    alone = [logistic(train[rows], labels[rows], *test, SETTINGS["msn_few"]) for rows in subsets]
    assert result.draws == tuple(alone)
    assert result.top1 == pytest.approx(sum(draw.top1 for draw in alone) / 3)
    assert len({draw.top1 for draw in alone}) > 1
    assert result.top1_ci95 == pytest.approx(student_t_95([draw.top1 for draw in alone]))
    assert result.converged


def test_the_interval_is_student_s_t():
    """4.303 is the 97.5 % point for two degrees of freedom, in any table."""
    assert student_t_95([60.0, 62.0, 64.0]) == pytest.approx(4.3027 * 2 / 3**0.5, rel=1e-4)
    assert student_t_95([60.0]) is None
    assert student_t_95([60.0, 60.0]) == 0


def test_one_subset_has_no_interval_and_none_is_an_error():
    train, labels = blobs(60)
    assert low_shot(train, labels, *blobs(50, seed=1), [torch.arange(30)]).top1_ci95 is None
    with pytest.raises(UserError, match="no subset"):
        low_shot(train, labels, *blobs(50, seed=1), [])
