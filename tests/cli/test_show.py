"""`triptych show`, from the command line to the file, on drawn scenes and a run of two steps."""

import itertools
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from conftest import tiny_swin
from triptych.cli import main
from triptych.data.scenes import write
from triptych.show.colours import heat
from triptych.show.sheet import MARGIN
from triptych.tokens import TokenSpec

TINY = "--data data/train --batch 8 --epochs 1 --encoder.width 24 --encoder.depth 2 --encoder.heads 3"
TINY += " --loader.workers 0 --health.every 0 --views.global_size 32 --views.local_size 16 --views.local_crops 0"
HEAD = " --method.hidden 16 --method.embedding 8"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Scenes of 32 px, two as files, a run of UDI and its encoder, a run of SiT, a video of 5 frames and its frames."""
    folder = tmp_path_factory.mktemp("show")
    write(folder / "data", train=16, test=16, size=32)
    files = sorted((folder / "data" / "test").rglob("*.jpg"))
    Image.open(files[0]).save(folder / "a.png")
    Image.open(files[1]).convert("RGB").resize((48, 32)).save(folder / "b.jpg")
    (folder / "frames").mkdir()
    writer = cv2.VideoWriter(str(folder / "v.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 8, (48, 32))
    for i in range(5):
        pixels = np.full((32, 48, 3), 90, np.uint8)
        pixels[8:24, 4 + 6 * i : 20 + 6 * i] = (250, 60, 20)
        Image.fromarray(pixels).save(folder / "frames" / f"{i:05}.png")
        writer.write(pixels[..., ::-1].copy())
    writer.release()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["train", "--recipe", "udi_small", *(TINY + HEAD).split(), "--method.prototypes", "32", "--out", "udi"])
        main(["train", "--recipe", "sit_small", *(TINY + HEAD).split(), "--out", "sit"])
        main(["export", "udi", "--out", "encoder"])
    return folder


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("TRIPTYCH_CACHE", str(place / "cache"))
    for file in [*place.glob("*.png"), *place.glob("*.mp4")]:
        if file.name != "a.png":
            file.unlink()
    return place


def refused(capsys, words: str) -> str:
    before = set(Path().rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        main(["show", *words.split()])
    assert stopped.value.code == 2
    assert set(Path().rglob("*")) == before  # nothing is left behind
    return " ".join(capsys.readouterr().err.split())


KINDS = {
    "attention": ("encoder a.png b.jpg", 5),
    "mass": ("encoder a.png b.jpg --share 0.5", 5),
    "srs": ("udi a.png b.jpg --at 0.2,0.7", 5),
    "pca": ("encoder a.png b.jpg", 2),
    "clusters": ("encoder a.png b.jpg --k 2 --restarts 2 --no-normalise", 2),
    "click": ("encoder a.png b.jpg --at 20,20 --threshold 0.9", 3),
}
"""Words, and the columns that they give."""


@pytest.mark.parametrize("kind", KINDS)
def test_files_become_a_sheet_with_a_row_each(kind, here, capsys):
    words, columns = KINDS[kind]
    main(["show", kind, *words.split(), "--size", "64"])
    assert f"picture: {kind}.png" in capsys.readouterr().out
    sheet = Image.open(f"{kind}.png")
    assert sheet.width >= columns * (96 + MARGIN)
    page = (Path(__file__).parents[2] / "docs" / "show.md").read_text()
    assert f"triptych show {kind}" in page


def test_a_folder_becomes_a_contact_sheet_drawn_by_the_seed(here, capsys):
    sheets = []
    for words in ("--images 3", "--images 3 --seed 1", "--images 3"):
        main(["show", "pca", "encoder", "data/test", "--size", "32", "--out", "new/x.png", *words.split()])
        sheets.append(Path("new/x.png").read_bytes())
    assert "3 of 16 images of data/test, drawn by seed 0" in capsys.readouterr().out
    assert sheets[0] != sheets[1]
    assert sheets[0] == sheets[2]  # the same every time


@pytest.mark.parametrize(
    ("kind", "data"), [("pca", "v.avi"), ("attention", "frames"), ("clusters", "frames"), ("click", "v.avi")]
)
def test_a_video_becomes_a_video_of_as_many_frames(kind, data, here, capsys):
    out, rate = Path("x.mp4"), 8 if data == "v.avi" else 24
    main(["show", kind, "encoder", data, "--size", "48", "--out", str(out)])
    assert f"{rate} frames a second" in capsys.readouterr().out
    capture = cv2.VideoCapture(str(out))
    frames = [frame for ok, frame in (capture.read() for _ in range(6)) if ok]
    assert len(frames) == 5
    assert capture.get(cv2.CAP_PROP_FPS) == rate
    assert any((a != b).any() for a, b in itertools.pairwise(frames))


def test_a_folder_is_a_video_at_the_rate_that_is_given(here, capsys):
    main("show click encoder frames --size 48 --fps 5".split())
    assert "click.mp4" in (said := capsys.readouterr().out)
    assert "5 frames a second" in said


def test_neighbours_of_an_image_begin_with_itself_where_the_gallery_has_it(here, capsys):
    main("show neighbours encoder a.png b.jpg --gallery data/test --k 3 --token patch_mean".split())
    sheet = np.asarray(Image.open("neighbours.png")).astype(int)
    query, first = (sheet[100:200, x : x + 100] for x in (60, 60 + 224 + MARGIN))
    assert np.abs(query - first).mean() < 1
    main("show neighbours encoder data/test --images 2 --gallery data/train --k 1 --out x.png".split())
    assert Image.open("x.png").width < 600 * 2


def test_correspondence_takes_two_images_of_any_shape(here, capsys):
    main("show correspondence encoder a.png b.jpg --top 5 --size 64".split())
    assert Image.open("correspondence.png").width == 64 + 12 + 64 + 2 * MARGIN
    assert "give image files" in refused(capsys, "correspondence encoder data/test data/train")


def test_reconstruction_is_that_of_the_evaluation(here, capsys):
    main("show reconstruction sit a.png b.jpg".split())
    assert "2 images" in capsys.readouterr().out
    main("show reconstruction sit data/test --images 3 --out x.png".split())
    main("eval reconstruction sit --data data/test --images 3 --out y.png".split())
    assert Path("x.png").read_bytes() == Path("y.png").read_bytes()


def test_a_swin_has_other_pictures(here, capsys):
    torch.save(tiny_swin(TokenSpec(cls=0)).swin.state_dict(), "swin.pt")
    for kind in ("attention", "mass"):
        said = refused(capsys, f"{kind} swin.pt a.png")
        assert "a Swin" in said
        assert "pca, clusters, click" in said
    main("show click swin.pt a.png --size 32 --out x.png".split())
    colours = {tuple(c) for c in np.asarray(Image.open("x.png")).reshape(-1, 3)}
    assert tuple(heat(np.ones((1, 1)))[0, 0]) in colours  # the clicked patch itself: cosine 1


MISTAKES = {
    "no input": ("pca encoder", "give image files"),
    "no such file": ("pca encoder nowhere.png", "neither an existing path nor a data set"),
    "no image": ("pca encoder udi/recipe.yaml", "cannot read"),
    "no video": ("pca encoder broken.mp4", "cannot be read as a video"),
    "suffix": ("pca encoder a.png --out x.tif", ".png, .jpg, .jpeg, .webp"),
    "video of a still": ("pca encoder a.png --out x.mp4", "folders of frames"),
    "rate": ("pca encoder frames --fps 0", "--fps"),
    "place": ("click encoder a.png --at 1", "0.5,0.25"),
    "outside": ("click encoder a.png --at 32,0", "32 pixels wide and 32 high"),
    "srs outside": ("srs udi b.jpg --at 0,40", "48 pixels wide"),
    "srs of another method": ("srs sit a.png", "only UDI samples patches"),
    "share": ("mass encoder a.png --share 0", "0.6"),
    "clusters": ("clusters encoder a.png --k 9", "1 to 8"),
    "clusters of few patches": ("clusters encoder a.png --k 8 --size 16", "at most 4"),
    "neighbours": ("neighbours encoder a.png --gallery data/test --k 17", "16 images"),
    "neighbours of a video": ("neighbours encoder v.avi --gallery data/test", "not a video"),
    "token": ("neighbours sit a.png --gallery data/test --token cls_plus", "no class+ token"),
    "no image among neighbours": ("neighbours encoder a.png broken.mp4.png --gallery data/test", "cannot read"),
    "pixel head": ("reconstruction udi a.png", "no pixel head"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_with_its_remedy_and_exit_code_2(name, here, capsys):
    for file in ("broken.mp4", "broken.mp4.png"):
        Path(file).write_text("neither video nor image")
    words, remedy = MISTAKES[name]
    said = refused(capsys, words)
    assert remedy in said
    assert "Traceback" not in said


def test_help_names_every_kind(capsys):
    main(["show", "--help"])
    said = capsys.readouterr().out
    for kind in (*KINDS, "neighbours", "correspondence", "reconstruction"):
        assert kind in said
