"""Features in files: the numbers of `extract_all`, row for row, whatever stops the process in between."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import tiny_encoder
from triptych import embed as module
from triptych import embed_files
from triptych.data.sources import open_source
from triptych.embed import embed
from triptych.errors import Interrupted, UserError
from triptych.evals.features import extract_all
from triptych.evals.transform import EvalTransform
from triptych.run_embed import run
from triptych.tokens import TokenSpec

TRANSFORM = EvalTransform(16, 18)
TOKENS = ("cls", "patch_mean")
COUNT, BATCH = 22, 4
DAMAGED = (2, 9, 10, 11, 21)  # one, some behind one another, the last


def encoder_of(seed=0, **options):
    torch.manual_seed(seed)
    return tiny_encoder(TokenSpec(), depth=2, **options)


def images(root: Path, count=COUNT, damaged=()) -> Path:
    rng = np.random.default_rng(0)
    for i in range(count):
        file = root / ("cat" if i < count // 2 else "dog, large") / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(file)
        if i in damaged:
            file.write_bytes(b"no image")
    return root


def work(data: Path, out: Path, **options):
    """The call that all tests make; also in a process of its own."""
    about = {"tokens": TOKENS, "batch": BATCH, "workers": 0, **options}
    return embed(encoder_of(), open_source(data), TRANSFORM, out, **about)


def written(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def data(tmp_path) -> Path:
    return images(tmp_path / "data", damaged=DAMAGED)


def extracted(data: Path, tokens=TOKENS):
    source = open_source(data)
    features, indices = extract_all(encoder_of(), source, TRANSFORM, tokens, batch=BATCH, workers=0)
    return source, {token: x.numpy() for token, x in features.items()}, indices.tolist()


@pytest.fixture
def expected(data):
    return extracted(data)


def rows_fit(rows: list[dict[str, str]], source, indices: list[int]) -> None:
    """The rows are those of the images that can be read, in the order of the source."""
    assert indices == [i for i in range(COUNT) if i not in DAMAGED]
    assert [int(row["index"]) for row in rows] == indices
    assert [row["file"] for row in rows] == [source.key(i) for i in indices]
    assert [int(row["label"]) for row in rows] == [source.label(i) for i in indices]
    assert [row["class"] for row in rows] == [("cat", "dog, large")[source.label(i)] for i in indices]


def test_npy_files_hold_the_features_of_extract_all_and_a_csv_file_names_their_rows(data, expected, tmp_path):
    source, features, indices = expected
    out = tmp_path / "out" / "f.npy"
    out.parent.mkdir()
    result = work(data, out)
    for token in TOKENS:
        x = np.load(out.with_name(f"f.{token}.npy"))
        assert (x.dtype, x.flags.c_contiguous) == (np.float32, True)
        np.testing.assert_array_equal(x, features[token])
    rows_fit(table(out.with_name("f.rows.csv")), source, indices)
    assert result.images == len(indices)
    assert result.unreadable == tuple(source.key(i) for i in DAMAGED)
    assert sorted(written(out.parent)) == ["f.cls.npy", "f.npy.json", "f.patch_mean.npy", "f.rows.csv"]
    assert {file.name for file in result.files} == set(written(out.parent)) - {"f.npy.json"}
    note = json.loads((out.parent / "f.npy.json").read_text())
    assert note["complete"]
    assert note["left_out"] == list(result.unreadable)
    assert note["progress"]["width"] == result.width == {"cls": 12, "patch_mean": 12}


def test_one_token_is_one_npy_file_of_the_name_given(data, tmp_path):
    work(data, tmp_path / "f.npy", tokens=["cls"])
    np.testing.assert_array_equal(np.load(tmp_path / "f.npy"), extracted(data, ["cls"])[1]["cls"])


def test_images_of_several_sizes_keep_their_order(tmp_path):
    """As `grouped_batches` gives them by size; each row is that of its image alone."""
    from triptych.data.sources import load_rgb
    from triptych.evals.selection import select

    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for i in range(7):
        shape = ((16, 16), (8, 16), (16, 8))[i % 3]
        Image.fromarray(rng.integers(0, 255, (*shape, 3), dtype=np.uint8)).save(tmp_path / f"data/{i}.png")
    transform, source, encoder = EvalTransform(16, 16, shape="longest"), open_source(tmp_path / "data"), encoder_of()
    embed(encoder, source, transform, tmp_path / "f.npy", batch=BATCH, workers=0)
    mean, std = (torch.tensor(x)[:, None, None] for x in (transform.mean, transform.std))
    for i, row in enumerate(np.load(tmp_path / "f.npy")):
        image = transform.pixels(load_rgb(source, i)) / 255
        with torch.no_grad():
            alone = select(encoder.eval(), ((image - mean) / std)[None], "cls")[0]
        np.testing.assert_allclose(row, alone.numpy(), rtol=1e-4, atol=1e-5)


def test_csv_has_a_column_for_each_number_that_gives_back_every_bit(data, expected, tmp_path):
    source, features, indices = expected
    work(data, tmp_path / "f.csv")
    rows = table(tmp_path / "f.csv")
    rows_fit(rows, source, indices)
    for token in TOKENS:
        x = np.array([[np.float32(row[f"{token}_{i}"]) for i in range(12)] for row in rows])
        np.testing.assert_array_equal(x, features[token])
    assert list(rows[0])[4:] == [f"{token}_{i}" for token in TOKENS for i in range(12)]


def test_parquet_has_a_list_column_for_each_token_in_groups_of_rows(data, expected, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed: pip install 'triptych[parquet]'")
    source, features, indices = expected
    monkeypatch.setattr(embed_files, "ROW_GROUP", 5)
    work(data, tmp_path / "f.parquet")
    file = parquet.ParquetFile(tmp_path / "f.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [5, 5, 5, 2]
    columns = file.read().to_pydict()
    names = ("index", "file", "label", "class")
    rows_fit(
        [dict(zip(names, row, strict=True)) for row in zip(*(columns[n] for n in names), strict=True)], source, indices
    )
    for token in TOKENS:
        np.testing.assert_array_equal(np.array(columns[token], np.float32), features[token])
    assert str(file.schema_arrow.field("cls").type) == "fixed_size_list<element: float>[12]"


def test_without_pyarrow_parquet_is_refused_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(embed_files, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'triptych\[parquet\]'"):
        run("vit_tiny_patch16_224", "nowhere", tmp_path / "f.parquet")


@pytest.mark.parametrize("ending", ["npy", "csv", "parquet"])
def test_half_precision_is_the_same_rounded(ending, data, tmp_path):
    if ending == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    out = tmp_path / f"f.{ending}"
    work(data, out, tokens=["cls"], half=True)
    if ending == "npy":
        x = np.load(out)
    elif ending == "csv":
        x = np.array([[np.float16(row[f"cls_{i}"]) for i in range(12)] for row in table(out)])
    else:
        x = np.array(parquet.read_table(out)["cls"].to_pylist(), np.float16)  # pyright: ignore[reportPossiblyUnbound]
    assert x.dtype == np.float16
    np.testing.assert_array_equal(x, extracted(data, ["cls"])[1]["cls"].astype(np.float16))


def test_images_without_labels_have_empty_labels(tmp_path):
    folder = images(tmp_path / "data", 4)
    for file in folder.rglob("*.png"):
        file.rename(folder / file.name)
    work(folder, tmp_path / "f.csv")
    assert [(row["file"], row["label"], row["class"]) for row in table(tmp_path / "f.csv")] == [
        (f"{i:02d}.png", "", "") for i in range(4)
    ]


# --- stopped and gone on with ---


class Killed(Exception):
    """Stands for whatever ends a process where nothing can be saved any more."""


@pytest.mark.parametrize("ending", ["npy", "csv"])
@pytest.mark.parametrize("after", range(6))
def test_killed_after_any_batch_it_goes_on_there_and_ends_with_the_same_bytes(
    after, ending, data, tmp_path, monkeypatch
):
    """DAMAGED leaves the third batch one image, and the last one none that is new."""
    for folder in ("straight", "stopped"):
        (tmp_path / folder).mkdir()
    work(data, tmp_path / f"straight/f.{ending}")
    monkeypatch.setattr(embed_files, "SAVE_EVERY", -1.0)
    select_all, seen = module.select_all, []

    def counted(encoder, x, *rest):
        if len(seen) == after:
            raise Killed
        seen.append(len(x))
        return select_all(encoder, x, *rest)

    monkeypatch.setattr(module, "select_all", counted)
    with pytest.raises(Killed):
        work(data, tmp_path / f"stopped/f.{ending}")
    assert not (tmp_path / f"stopped/f.{ending}").exists()
    before, after = sum(seen), -1  # from now on it runs
    work(data, tmp_path / f"stopped/f.{ending}")
    assert sum(seen) == COUNT - len(DAMAGED), f"{before} were done"  # none was computed twice
    assert written(tmp_path / "stopped") == written(tmp_path / "straight")


def test_what_was_not_saved_is_computed_again(data, tmp_path, monkeypatch):
    """Killed between two saves, with rows in the files that the note does not know of."""
    (tmp_path / "straight").mkdir()
    (tmp_path / "stopped").mkdir()
    work(data, tmp_path / "straight/f.npy")
    monkeypatch.setattr(embed_files, "SAVE_EVERY", -1.0)
    save, saves = module.Note.save, []

    def killed_at_the_third(note, reached, **more):
        saves.append(reached.seen)
        if len(saves) == 3:
            raise Killed
        save(note, reached, **more)

    monkeypatch.setattr(module.Note, "save", killed_at_the_third)
    with pytest.raises(Killed):
        work(data, tmp_path / "stopped/f.npy")
    assert json.loads((tmp_path / "stopped/f.npy.json").read_text())["progress"]["seen"] == 2 * BATCH
    assert embed_files.np.load(tmp_path / "stopped/f.npy.part/cls.npy").shape[0] > 2 * BATCH - 2
    monkeypatch.setattr(module.Note, "save", save)
    work(data, tmp_path / "stopped/f.npy")
    assert written(tmp_path / "stopped") == written(tmp_path / "straight")


def test_killed_before_the_description_is_final_nothing_is_computed_again(data, tmp_path, monkeypatch):
    (tmp_path / "straight").mkdir()
    (tmp_path / "stopped").mkdir()
    work(data, tmp_path / "straight/f.npy")
    save = module.Note.save

    def killed_at_the_end(note, reached, complete=False, **more):
        if complete:
            raise Killed
        save(note, reached, **more)

    with monkeypatch.context() as patch:
        patch.setattr(module.Note, "save", killed_at_the_end)
        with pytest.raises(Killed):
            work(data, tmp_path / "stopped/f.npy")
    monkeypatch.setattr(module, "select_all", None)
    work(data, tmp_path / "stopped/f.npy")
    assert written(tmp_path / "stopped") == written(tmp_path / "straight")


def test_features_that_were_deleted_meanwhile_are_computed_again(data, tmp_path):
    work(data, tmp_path / "f.npy")
    before = (tmp_path / "f.cls.npy").read_bytes()
    (tmp_path / "f.cls.npy").unlink()
    work(data, tmp_path / "f.npy")
    assert (tmp_path / "f.cls.npy").read_bytes() == before


def test_rows_that_a_killed_process_left_behind_the_last_are_cut_off(tmp_path):
    """An image that it could read is damaged meanwhile: there are fewer rows than it had written."""
    x = {"cls": torch.arange(15.0).view(5, 3)}
    with embed_files.Kept(tmp_path / "part", ["cls"], "float32") as kept:
        kept.put(0, x, "")
        kept.save(5)
    with embed_files.Kept(tmp_path / "part", ["cls"], "float32") as kept:
        assert kept.holds(5, {"cls": 3})
        assert not kept.holds(6, {"cls": 3})
        kept.save(4, whole=True)
    assert (tmp_path / "part/cls.npy").stat().st_size == embed_files.HEADER + 4 * 3 * 4
    np.testing.assert_array_equal(np.load(tmp_path / "part/cls.npy"), x["cls"][:4].numpy())


PROCESS = """
import sys, time
from pathlib import Path
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
import test_embed
from triptych import embed, embed_files
from triptych.errors import Interrupted
embed_files.SAVE_EVERY = -1.0
select_all = embed.select_all
def slow(*arguments):
    time.sleep(0.3)
    return select_all(*arguments)
embed.select_all = slow
try:
    test_embed.work(Path({data!r}), Path({out!r}), workers=1)
except Interrupted as stopped:
    print(stopped)
    sys.exit(stopped.exit_code)
"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_real_process_that_a_signal_ends_is_gone_on_with(number, code, data, tmp_path):
    for folder in ("straight", "stopped"):
        (tmp_path / folder).mkdir()
    out, here = tmp_path / "stopped/f.npy", Path(__file__).parent
    program = PROCESS.format(paths=[str(here)], data=str(data), out=str(out))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
    note, end = out.with_name("f.npy.json"), time.monotonic() + 120
    while time.monotonic() < end and not (note.exists() and json.loads(note.read_text())["progress"]["seen"] >= BATCH):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert ("saved" in said) == (number != signal.SIGKILL)
    reached = json.loads(note.read_text())["progress"]["seen"]
    assert BATCH <= reached < COUNT
    assert not list(out.parent.glob("f*.npy"))  # nothing that looks finished
    work(data, out)
    work(data, tmp_path / "straight/f.npy")
    assert written(tmp_path / "stopped") == written(tmp_path / "straight")


def test_a_signal_is_answered_after_the_batch_in_hand(data, tmp_path, monkeypatch):
    select_all = module.select_all

    def signalled(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return select_all(*arguments)

    monkeypatch.setattr(module, "select_all", signalled)
    with pytest.raises(Interrupted):
        work(data, tmp_path / "f.npy")
    assert json.loads((tmp_path / "f.npy.json").read_text())["progress"]["rows"] == 3  # of four, one is damaged


def test_a_rest_of_which_no_image_can_be_read_is_no_error(tmp_path, monkeypatch):
    data = images(tmp_path / "data", 8, damaged=range(4, 8))
    monkeypatch.setattr(embed_files, "SAVE_EVERY", -1.0)
    grouped = module.grouped_batches

    def one(*arguments, **options):
        yield next(grouped(*arguments, **options))
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, "grouped_batches", one)
        with pytest.raises(Killed):
            work(data, tmp_path / "f.npy")
    assert work(data, tmp_path / "f.npy").unreadable == tuple(f"dog, large/{i:02d}.png" for i in range(4, 8))


def test_images_of_which_none_can_be_read_are_an_error(tmp_path):
    with pytest.raises(UserError, match=r"no image of .*data can be read"):
        work(images(tmp_path / "data", 6, damaged=range(6)), tmp_path / "f.npy")


# --- what is refused ---


def test_a_second_call_does_nothing(data, tmp_path, monkeypatch):
    first = work(data, tmp_path / "f.npy")
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in written(tmp_path)}
    monkeypatch.setattr(module, "select_all", None)
    assert work(data, tmp_path / "f.npy") == first
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in written(tmp_path)} == before


@pytest.mark.parametrize("half_done", [False, True])
def test_a_file_of_other_features_is_refused_and_what_differs_is_named(half_done, data, tmp_path, monkeypatch):
    out = tmp_path / "f.npy"
    if half_done:
        with monkeypatch.context() as patch:
            patch.setattr(embed_files, "SAVE_EVERY", -1.0)
            patch.setattr(module, "progress", lambda items, *_, **__: [next(iter(items)), None])
            with pytest.raises(TypeError):
                work(data, out)
        assert not (tmp_path / "f.cls.npy").exists()
    else:
        work(data, out)
    before = written(tmp_path)
    source = open_source(data)
    options = {"tokens": TOKENS, "batch": BATCH, "workers": 0}
    others = {
        "encoder": lambda: embed(encoder_of(1), source, TRANSFORM, out, **options),
        "heads": lambda: embed(encoder_of(heads=2), source, TRANSFORM, out, **options),
        "transform": lambda: embed(encoder_of(), source, EvalTransform(16, 20), out, **options),
        "tokens": lambda: work(data, out, tokens=["cls"]),
        "tokens ": lambda: work(data, out, tokens=TOKENS[::-1]),
        "layers": lambda: work(data, out, layers=2),
        "dtype": lambda: work(data, out, half=True),
        "precision": lambda: work(data, out, precision=torch.bfloat16),
        "batch": lambda: work(data, out, batch=3),
        "fingerprint": lambda: work(images(tmp_path / "more", COUNT, damaged=(3,)), out),
    }
    for what, other in others.items():
        with pytest.raises(UserError, match=rf"f\.npy\.json is of other features \(.*{what.strip()} .* there, .* now"):
            other()
    assert {name: content for name, content in written(tmp_path).items() if not name.startswith("more")} == before


def test_a_file_without_a_description_and_a_damaged_one_are_refused(data, tmp_path):
    (tmp_path / "f.csv").write_text("mine")
    with pytest.raises(UserError, match=r"f\.csv exists, without f\.csv\.json"):
        work(data, tmp_path / "f.csv")
    assert (tmp_path / "f.csv").read_text() == "mine"
    (tmp_path / "g.csv.json").write_text("{")
    with pytest.raises(UserError, match=r"g\.csv\.json is damaged"):
        work(data, tmp_path / "g.csv")


def test_mistakes_are_told_before_any_work(data, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "select_all", None)
    for name, message in (("f.txt", r"name a file \.npy, \.parquet, \.csv"), ("data", "its ending")):
        with pytest.raises(UserError, match=message):
            work(data, tmp_path / name)
    (tmp_path / "d.npy").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        work(data, tmp_path / "d.npy")
    for options, message in (
        ({"tokens": []}, "at least one"),
        ({"tokens": ["cls", "cls"]}, "each once"),
        ({"tokens": ["head"]}, "choose one of"),
        ({"tokens": ["cls_plus"]}, "no class"),
        ({"layers": 3}, "2 blocks"),
    ):
        with pytest.raises(UserError, match=message):
            work(data, tmp_path / "f.npy", **options)
    assert not (tmp_path / "f.npy.part").exists()


def test_features_that_are_not_finite_name_token_and_images(data, tmp_path):
    encoder = encoder_of()
    with torch.no_grad():
        encoder.trunk.norm.weight.fill_(1e5)  # pyright: ignore
    with pytest.raises(UserError, match=r"\(cls\) of images cat/00\.png to cat/03\.png do not fit into float16: leave"):
        embed(encoder, open_source(data), TRANSFORM, tmp_path / "f.npy", batch=BATCH, workers=0, half=True)
    with torch.no_grad():
        encoder.trunk.norm.weight.fill_(float("nan"))  # pyright: ignore
    with pytest.raises(UserError, match="are NaN or infinite"):
        embed(encoder, open_source(data), TRANSFORM, tmp_path / "g.npy", batch=BATCH, workers=0)


def test_a_csv_file_is_written_in_less_memory_than_it_is_long(tmp_path):
    rows, width = 4000, 64

    class Names:
        classes = None

        def __len__(self):
            return rows

        def key(self, index):
            return str(index)

        def label(self, index):
            return None

    (tmp_path / "part").mkdir()
    np.save(tmp_path / "part/cls.npy", np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32))
    tracemalloc.start()
    embed_files.write(tmp_path / "f.csv", tmp_path / "part", Names(), [], ["cls"])  # pyright: ignore
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 300_000 < 2_000_000 < (tmp_path / "f.csv").stat().st_size


def test_the_command_reads_a_model_and_tells_what_it_wrote(tmp_path, capsys):
    torch.manual_seed(0)
    data = images(tmp_path / "data", 5, damaged=(1,))
    result = run(
        "vit_tiny_patch16_224",
        str(data),
        tmp_path / "deep/f.npy",
        token=["cls", "cls+patch_mean"],
        size=32,
        weights="untrained",
    )
    assert result.width == {"cls": 192, "cls+patch_mean": 384}
    assert np.load(tmp_path / "deep/f.cls+patch_mean.npy").shape == (4, 384)
    said = capsys.readouterr().out
    assert "1 of 5 images" in said
    assert "cat/01.png" in said
    assert "cls 192, cls+patch_mean 384" in said
    with pytest.raises(UserError, match="does not divide"):
        run("vit_tiny_patch16_224", str(data), tmp_path / "g.npy", size=33, weights="untrained")
