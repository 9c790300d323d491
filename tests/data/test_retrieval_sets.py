"""Retrieval sets: files as published, pickles that could do harm, JSON, labels."""

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from triptych.data import retrieval_sets
from triptych.data.archives import Zip
from triptych.data.pixels import Picture
from triptych.data.retrieval_sets import open_retrieval
from triptych.errors import UserError

GROCERY = Path(__file__).parents[3] / "shared" / "data" / "grocery" / "retrieval_gt.json"


def picture(path, value=0, size=(24, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    Image.fromarray(np.stack([x * 10, y * 10, 0 * x + value], -1).astype(np.uint8)).save(path)


def listed(wanted):
    return [(w.positive.tolist(), w.junk.tolist()) for w in wanted]


# --- revisited Oxford and Paris ---


@pytest.fixture
def oxford(tmp_path):
    """Four gallery images and one query; returns a function that writes a ground truth."""
    for i in range(5):
        picture(tmp_path / "roxford5k" / "jpg" / f"image_{i}.png", i)
        (tmp_path / "roxford5k" / "jpg" / f"image_{i}.png").rename(tmp_path / "roxford5k" / "jpg" / f"image_{i}.jpg")

    def write(protocol=4, **changes):
        gnd = {"bbx": [3.6, 2.0, 11.5, 9.4], "easy": np.array([2]), "hard": [0, 3], "junk": np.array([1])} | changes
        truth = {"imlist": [f"image_{i}" for i in range(4)], "qimlist": ["image_4"], "gnd": [gnd]}
        (tmp_path / "roxford5k" / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(truth, protocol))
        return tmp_path / "roxford5k"

    return write


@pytest.mark.parametrize("protocol", range(6))
def test_the_three_ways_to_judge_share_out_easy_hard_and_junk(oxford, protocol):
    folder = oxford(protocol, bbx=[np.float64(1), np.float64(2), np.float64(3), np.float64(4)])
    (found,) = open_retrieval(folder)
    assert (found.name, len(found.gallery), len(found.queries)) == ("roxford5k", 4, 1)
    assert {k: listed(w) for k, w in found.truth.items()} == {
        "easy": [([2], [1, 0, 3])],
        "medium": [([2, 0, 3], [1])],
        "hard": [([0, 3], [1, 2])],
    }
    assert found.gallery.key(3) == "jpg/image_3.jpg"
    assert np.asarray(found.queries.image(0))[0, 0].tolist() == [0, 0, 4]
    assert listed(open_retrieval(folder / "gnd_roxford5k.pkl")[0].truth["hard"]) == [([0, 3], [1, 2])]


def test_queries_are_cropped_to_their_boxes_if_asked_for(oxford):
    folder = oxford()
    (whole,), (cropped,) = open_retrieval(folder), open_retrieval(folder, crop_queries=True)
    assert whole.queries.image(0).size == (24, 20)
    part = np.asarray(cropped.queries.image(0))
    assert part.shape == (9 - 2, 12 - 4, 3), "rows 2 to 8, columns 4 to 11"
    assert part[0, 0].tolist() == [40, 20, 4]
    assert part[-1, -1].tolist() == [110, 80, 4]
    assert Picture(cropped.queries, 0).pixels().values.shape == part.shape, "also for those who decode it themselves"
    assert cropped.queries.fingerprint() != whole.queries.fingerprint()
    (other,) = open_retrieval(oxford(bbx=[3.6, 2.0, 11.5, 9.6]), crop_queries=True)
    assert other.queries.fingerprint() != cropped.queries.fingerprint()
    assert other.gallery.fingerprint() == cropped.gallery.fingerprint()


class Harmful:
    def __reduce__(self):
        return print, ("executed",)


class Sly:
    def __reduce__(self):
        return eval, ("print('executed')",)


@pytest.mark.parametrize("harm", [Harmful(), Sly(), Path("x"), np.array([Harmful()], object)])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_of_anything_but_plain_data_is_refused_before_it_runs(oxford, harm, protocol, capsys):
    with pytest.raises(UserError, match="only lists, dictionaries and numpy arrays"):
        open_retrieval(oxford(protocol, junk=harm))
    assert capsys.readouterr().out == ""


def test_wrong_ground_truths_are_told(oxford, tmp_path):
    with pytest.raises(UserError, match="positions in the gallery, 0 to 3"):
        open_retrieval(oxford(hard=[4]))
    with pytest.raises(UserError, match="positions in the gallery"):
        open_retrieval(oxford(hard=[0.5]))
    with pytest.raises(UserError, match="a box of 4 numbers"):
        open_retrieval(oxford(bbx=[1, 2, 3]))
    folder = oxford()
    with pytest.raises(UserError, match="names its queries itself"):
        open_retrieval(folder, folder)
    (folder / "jpg" / "image_2.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 4 images are not there: jpg/image_2\.jpg"):
        open_retrieval(folder)
    (folder / "gnd_roxford5k.pkl").write_bytes(pickle.dumps({"imlist": ["image_0"]}))
    with pytest.raises(UserError, match="no ground truth of a revisited set"):
        open_retrieval(folder)
    (folder / "gnd_roxford5k.pkl").write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot read"):
        open_retrieval(folder)


# --- JSON ---


def write_json(folder, about):
    (folder / "truth.json").write_text(json.dumps(about))
    return folder / "truth.json"


def test_json_names_files_and_members_of_zip_files(tmp_path, monkeypatch):
    picture(tmp_path / "loose" / "a.png", 1)
    for i in range(3):
        picture(tmp_path / f"{i}.png", 10 + i)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for i in range(3):
            archive.write(tmp_path / f"{i}.png", f"in/{i}.png")
    queries = [
        {"zip": "all.zip", "file": "in/2.png", "positive": [1]},
        {"file": "loose/a.png", "positive": [0], "junk": [1], "class": "not looked at"},
    ]
    about = {"gallery_zip": "all.zip", "gallery": ["in/1.png", "in/0.png"], "queries": queries}
    opened = []
    monkeypatch.setattr(retrieval_sets, "Zip", lambda path: opened.append(path) or Zip(path))
    (found,) = open_retrieval(write_json(tmp_path, about))
    assert len(opened) == 2, "once for the gallery, once for the queries, whatever the number of images"
    blue = [[np.asarray(s.image(i))[0, 0, 2] for i in range(2)] for s in (found.gallery, found.queries)]
    assert blue == [[11, 10], [12, 1]]
    assert [Picture(found.queries, i).pixels().values[0, 0, 2] for i in range(2)] == [12, 1]
    assert listed(found.truth["all"]) == [([1], []), ([0], [1])]
    assert found.queries.key(1) == "loose/a.png"
    named = {"gallery": ["0.png"], "near_queries": [{"file": "1.png", "positive": []}], "far_queries": queries[:0]}
    with pytest.raises(UserError, match=r"far.* names no images"):
        open_retrieval(write_json(tmp_path, named))
    named["far_queries"] = named["near_queries"] * 2
    assert [len(s.queries) for s in open_retrieval(write_json(tmp_path, named))] == [1, 2]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"gallery": None}, "no ground truth"),
        ({"gallery": ["nowhere.png"]}, "1 of 1 images are not there: nowhere.png"),
        ({"gallery_zip": "no.zip"}, "no.zip does not exist"),
        ({"queries": [{"file": "0.png", "positive": [1]}]}, "0 to 0"),
        ({"queries": [{"file": "0.png", "positive": [-1]}]}, "0 to 0"),
        ({"queries": [{"file": "0.png"}]}, "no ground truth.*positive"),
        ({"queries": 5}, "no ground truth"),
    ],
)
def test_wrong_json_is_told(tmp_path, change, text):
    picture(tmp_path / "0.png")
    about = {"gallery": ["0.png"], "queries": [{"file": "0.png", "positive": [0]}]}
    assert open_retrieval(write_json(tmp_path, about))
    with pytest.raises(UserError, match=text):
        open_retrieval(write_json(tmp_path, about | change))
    with pytest.raises(UserError, match="has no queries"):
        open_retrieval(write_json(tmp_path, {"gallery": ["0.png"]}))
    with pytest.raises(UserError, match="no boxes"):
        open_retrieval(write_json(tmp_path, about), crop_queries=True)


@pytest.mark.skipif(not GROCERY.exists(), reason=f"{GROCERY} is not on this machine")
def test_the_grocery_set_s_truth_is_that_of_its_class_folders():
    natural, iconic = open_retrieval(GROCERY)
    assert [len(s.queries) for s in (natural, iconic)] == [243, 81]
    assert natural.gallery is iconic.gallery
    folder = np.array([natural.gallery.key(i).partition("/")[0] for i in range(len(natural.gallery))])
    for asked, class_of in ((natural, lambda key: key.partition("/")[0]), (iconic, lambda key: Path(key).stem)):
        for q in range(len(asked.queries)):
            same = np.flatnonzero(folder == class_of(asked.queries.key(q)))
            assert asked.truth["all"][q].positive.tolist() == same.tolist()
    assert not {natural.queries.key(i) for i in range(243)} & {natural.gallery.key(i) for i in range(2242)}


# --- labels ---


def test_labels_make_a_truth(tmp_path):
    for split, counts in (("train", (3, 2)), ("test", (1, 2))):
        for name, count in zip(("cat", "dog"), counts, strict=True):
            for i in range(count):
                picture(tmp_path / "pets" / split / name / f"{i}.png")
    (found,) = open_retrieval(tmp_path / "pets")
    assert listed(found.truth["all"]) == [([0, 1, 2], []), ([3, 4], []), ([3, 4], [])]
    assert (len(found.gallery), len(found.queries)) == (5, 3)
    (given,) = open_retrieval(tmp_path / "pets" / "test", tmp_path / "pets" / "train")
    assert listed(given.truth["all"])[0] == ([0], [])
    (left_out,) = open_retrieval(tmp_path / "pets" / "train")
    assert listed(left_out.truth["all"])[1] == ([0, 1, 2], [1]), "the query itself is junk"
    with pytest.raises(UserError, match="no labels"):
        open_retrieval(tmp_path / "pets" / "train" / "cat")
    picture(tmp_path / "others" / "cat" / "0.png")
    picture(tmp_path / "others" / "owl" / "0.png")
    with pytest.raises(UserError, match="do not have the same classes"):
        open_retrieval(tmp_path / "others", tmp_path / "pets" / "train")
