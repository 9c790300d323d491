"""The helpers of benchmarks/: turns, files, equal weights.  Nothing here is timed.

Tests beside other people's code need checkouts of it: TRIPTYCH_CHECKOUTS names a folder that holds them as dino, ibot,
udi and lightly (a folder with that package).
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import knn as knn_benchmark
import lightly_step
import official
import theirs
from checkouts import Checkout, one_process
from ours import Ours, peak_mib, same_losses, sized
from timing import Ratio, report, rounds_of
from triptych.data.views import between
from triptych.errors import UserError
from triptych.recipes import RECIPES
from views import batch_of_views

HERE = Path(os.environ.get("TRIPTYCH_CHECKOUTS", "/nowhere"))


def checkout(name: str, *modules: str) -> Checkout:
    if not (HERE / name).exists():
        pytest.skip(f"no {name} in TRIPTYCH_CHECKOUTS: other people's code is not part of this repository")
    return Checkout(HERE / name, *modules)


def toy(name: str, **encoder):
    """The recipe of a benchmark with a ViT of width 24 and two blocks."""
    recipe = sized(RECIPES[official.RECIPE[name]](), batch=2, local_crops=2, prototypes=64, drop_path=0.0)
    small = {"width": 24, "depth": 2, "heads": 6, **encoder}
    return recipe.model_copy(
        update={
            "encoder": recipe.encoder.model_copy(update=small),
            "method": recipe.method.model_copy(update={"hidden": 32, "embedding": 16}),
        }
    )


def test_contenders_take_turns_and_the_warm_up_round_does_not_count():
    calls = []
    seconds = rounds_of({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=3)
    assert calls == list("ab") * 4
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_a_ratio_is_that_of_each_round():
    ratio = Ratio.of([2.0, 9.0, 10.0], [1.0, 1.0, 10.0])
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 1.0, 9.0)
    assert str(ratio) == "2.00 [1.00, 9.00]"


def test_a_report_says_how_its_numbers_came_about(tmp_path):
    report("theme", "Title", "python it.py", ["| a |"], [{"a": 1}, {"a": 2}], {"checkouts": {"x": "abc"}}, tmp_path)
    text = next(tmp_path.glob("theme_*.md")).read_text()
    rows = [json.loads(line) for line in next(tmp_path.glob("theme_*.jsonl")).read_text().splitlines()]
    assert [row["a"] for row in rows] == [1, 2]
    for row in rows:
        assert {"hardware", "commit", "torch", "load"} <= set(row)
        assert (row["command"], row["checkouts"]) == ("python it.py", {"x": "abc"})
    for part in ("Title", "`python it.py`", '"abc"', "| a |", rows[0]["hardware"]):
        assert part in text


@pytest.mark.parametrize("name", ["dino", "ibot", "udi"])
def test_the_batch_is_the_same_every_time_and_what_the_method_asks_for(name):
    first, again = batch_of_views(toy(name), 16), batch_of_views(toy(name), 16)
    for a, b in zip(first.all, again.all, strict=True):
        assert a.images.dtype == torch.uint8
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.box, b.box)
        assert (a.samples is not None) == (name == "udi")
    assert [v.mask is not None for v in first.all] == [name == "ibot"] * 2 + [False] * 2
    assert [v.images.shape[-1] for v in first.all] == [224, 224, 96, 96]


class Growing:
    """A step that holds `mib` MiB until its next call, as a gradient is held."""

    def __init__(self, mib: float):
        self.mib, self.held = mib, None
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.optimizer = torch.optim.SGD([self.weight])

    def __call__(self) -> float:
        made = torch.zeros(int(self.mib * 2**18))
        self.held = made
        return 0.0


def test_what_one_step_leaves_to_the_next_counts_as_memory():
    assert peak_mib(Growing(3.0), "cpu") == pytest.approx(6.0, abs=0.01)  # the second is made before the first goes


def test_sides_that_compute_different_losses_are_not_compared():
    a, b = (lambda values=values: next(values) for values in (iter([2.0, 3.0]), iter([2.0, 3.001])))
    assert same_losses(lambda: 5.0, lambda: 5.0, steps=2) == [0.0, 0.0]
    with pytest.raises(UserError, match="losses differ"):
        same_losses(a, b, steps=2)


def test_rows_compare_the_same_dtype_and_on_the_cpu_also_what_was_shipped():
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    assert official.comparisons(["float32"], "cpu") == [(f32, f32)]
    assert official.comparisons(["float32", "bfloat16"], "cpu") == [(f32, f32), (bf16, bf16), (f32, bf16)]
    assert official.comparisons(["float16", "bfloat16"], "cuda") == [(f16, bf16), (bf16, bf16)]


def test_a_folder_without_the_authors_files_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no utils\.py"):
        Checkout(tmp_path, "utils")


def test_two_checkouts_with_modules_of_one_name_do_not_meet(tmp_path):
    before = set(sys.modules)
    for name in "ab":
        folder = tmp_path / name
        (folder / "models").mkdir(parents=True)
        (folder / "utils.py").write_text(f"name = {name!r}")
        (folder / "models" / "__init__.py").write_text("")
        (folder / "models" / "head.py").write_text("import utils, tensorboardX\nname = utils.name")
    a, b = (Checkout(tmp_path / name, "models.head", "utils") for name in "ab")
    assert (a["models.head"].name, b["models.head"].name) == ("a", "b")
    assert a["utils"] is not b["utils"]
    assert set(sys.modules) == before
    assert str(tmp_path / "a") not in sys.path


MODULES = theirs.MODULES | {"lightly": lightly_step.MODULES}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", list(MODULES))
def test_three_updates_give_the_losses_of_their_code(name):
    code, recipe = checkout(name, *MODULES[name]), toy(name)
    recipe = lightly_step.as_theirs(recipe) if name == "lightly" else recipe
    with one_process("cpu"):
        their_step, our_step = official.sides(name, code, recipe, "cpu", torch.float32)
        differences = same_losses(their_step, our_step)
        assert max(differences) <= 1e-5
        other = Ours(recipe.model_copy(update={"seed": 1}), "cpu", torch.float32)  # the check can fail
        with pytest.raises(UserError, match="losses differ"):
            same_losses(their_step, other)


def test_their_maps_between_crops_read_the_places_that_ours_read():
    code, ours = checkout("udi", *theirs.MODULES["udi"]), Ours(toy("udi"), "cpu", torch.float32)
    views, c = ours.views, ours.method.config
    source, target = theirs.udi_maps(code, views, ours.method.encoder, (c.window_global, c.window_local))
    grids = {224: (14, 14), 96: (6, 6)}
    crops, pairs = views.all, [(0, 1), (1, 0), (2, 1), (2, 0), (3, 1), (3, 0)]
    valid = 0
    for (s, v), theirs_ in zip(pairs, target, strict=True):
        grid_s, grid_v = (grids[crops[i].images.shape[-1]] for i in (s, v))
        weights, inside = between(crops[s], grid_s, crops[v], grid_v, c.token_coords)
        assert torch.equal(inside.sum(1), (theirs_.sum(-1) > 0.5).sum(1))
        # Theirs packs the valid places to the front.
        for image in range(len(weights)):
            ours_ = weights[image][inside[image]]
            torch.testing.assert_close(ours_, theirs_[image, : len(ours_)], rtol=0, atol=1e-3)
            valid += len(ours_)
    assert valid > 20
    assert len(source) == len(target)


def test_their_knn_gives_our_accuracies(tmp_path):
    checkout("dino", "eval_knn")
    sizes = "--train 600 --test 100 --classes 7 --width 8 --noise 1 --rounds 1"
    knn_benchmark.main(["--against", str(HERE / "dino"), *sizes.split(), "--out", str(tmp_path)])
    row = json.loads(next(tmp_path.glob("*.jsonl")).read_text())
    assert 30 < row["accuracies"]["20"][0] < 100
