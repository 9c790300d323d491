"""Who changes colours: chosen by a measurement, kept by the run, refused where it cannot be."""

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console

from triptych.data import placement
from triptych.data.corruption import CorruptionConfig
from triptych.data.loader import ViewDataset, ViewsConfig
from triptych.data.placement import Placement, check, choose
from triptych.data.sources import open_source
from triptych.data.views import ViewSpec
from triptych.errors import UserError
from triptych.settings import parse_overrides, resolve
from triptych.train import train

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = ViewsConfig(global_size=32, local_size=16, local_crops=1)


def dataset(config: ViewsConfig = SMALL, **spec) -> ViewDataset:
    return ViewDataset(open_source("scenes:12"), config, ViewSpec(**spec), patch_size=8, seed=0)


@pytest.fixture
def times(monkeypatch):
    """Sets what is measured: ms per image of a worker without and with colours, and of the device."""

    def fake(crops: float, coloured: float, batch: float) -> None:
        monkeypatch.setattr(placement, "_of_worker", lambda *_: [crops, coloured])
        monkeypatch.setattr(placement, "_of_device", lambda *_: batch)

    return fake


@pytest.mark.parametrize(
    ("device", "workers", "crops", "coloured", "batch", "expected"),
    [
        (CUDA, 8, 4, 8, 0.1, "device"),  # workers go from 1.0 to 0.5 per image, the device has time
        (CUDA, 8, 4, 8, 0.85, "device"),  # beside the workers: 0.85 is still less than 1.0
        (CUDA, 8, 4, 8, 0.95, "workers"),  # not clearly
        (CUDA, 8, 4, 8, 1.1, "workers"),
        (CUDA, 8, 4, 4, 0.1, "workers"),  # nothing to gain
        (CUDA, 0, 4, 8, 3.1, "device"),  # one after the other
        (CUDA, 0, 4, 8, 4.1, "workers"),
        (CPU, 2, 4, 8, 1.5, "device"),  # on the CPU the batch waits for it: 2 + 1.5 against 4
        (CPU, 2, 4, 8, 2.1, "workers"),
    ],
)
def test_the_smaller_bottleneck_wins(device, workers, crops, coloured, batch, expected, times):
    times(crops, coloured, batch)
    place, why = choose(dataset(), device, workers)
    assert place == expected
    assert f"shared by {max(workers, 1)}" in why


def test_a_real_measurement_ends_with_figures_and_leaves_threads_alone():
    before = torch.get_num_threads()
    place, why = choose(dataset(), CPU, 2)
    assert place in ("workers", "device")
    assert "ms per image" in why
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("config", "corruption", "why"),
    [
        (SMALL.model_copy(update={"colour": "randaug"}), None, "RandAugment"),
        (SMALL, CorruptionConfig(), "corrupted with pixels of other crops"),
    ],
)
def test_what_only_workers_can_do_is_theirs(config, corruption, why, times):
    times(1.0, 100.0, 0.0)
    assert choose(dataset(config, corruption=corruption), CPU, 2) == Placement(
        "workers", placement.obstacle(config.colour, corruption) or ""
    )
    with pytest.raises(UserError, match=f"--loader.colour device: .*{why}.*leave it at auto"):
        check("device", config.colour, corruption)
    check("workers", config.colour, corruption)


# --- in a run ---

QUICK = [
    *"--batch 8 --epochs 2 --encoder.width 24 --encoder.depth 1 --encoder.heads 3 --method.hidden 16".split(),
    *"--method.embedding 8 --method.prototypes 32 --loader.workers 0 --health.every 0 --checkpoint.every 0.5".split(),
]


def run(out, *more: str, source: str = "scenes:32"):
    recipe, _ = resolve("udi_quickstart", None, parse_overrides([*QUICK, *more]))
    console = Console(record=True, width=200, file=None, quiet=False)
    with console.capture() as printed:
        train(recipe, open_source(source), out, console)
    state = torch.load(max((out / "checkpoints").glob("step_*.pt")), weights_only=True)
    return state["method"], printed.get()


def chosen(out) -> str:
    return yaml.safe_load((out / "recipe.yaml").read_text())["loader"]["colour"]


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, b[k]) for k, x in a.items() if isinstance(x, torch.Tensor))


@pytest.mark.parametrize("place", ["workers", "device"])
def test_a_run_keeps_what_was_chosen_and_says_so(place, tmp_path, monkeypatch):
    monkeypatch.setattr(placement, "choose", lambda *_: Placement(place, "in this test"))
    straight, printed = run(tmp_path / "a")
    assert chosen(tmp_path / "a") == place
    assert f"colours are changed by the {place} (in this test)" in printed
    assert f"colour on {place}" in printed
    # The same run, stopped after one epoch and gone on with where a new measurement would say otherwise.
    from triptych import train as module

    class Stop(Exception):
        pass

    def stop(self, done, t):
        if done == 4:
            self._save(done)
            raise Stop

    with monkeypatch.context() as inner:
        inner.setattr(module.Run, "_epoch_end", stop)
        with pytest.raises(Stop):
            run(tmp_path / "b")
    other = "device" if place == "workers" else "workers"
    monkeypatch.setattr(placement, "choose", lambda *_: Placement(other, "in this test"))
    resumed, printed = run(tmp_path / "b")
    assert "going on from step 4" in printed
    assert equal(resumed, straight)
    with pytest.raises(UserError, match=f"loader.colour: '{place}' there, '{other}' now"):
        run(tmp_path / "b", "--loader.colour", other)


def test_both_places_train_nearly_the_same(tmp_path, monkeypatch):
    here, _ = run(tmp_path / "a", "--loader.colour", "workers", "--epochs", "1")
    there, _ = run(tmp_path / "b", "--loader.colour", "device", "--epochs", "1")
    assert not equal(here, there)
    for name, x in here.items():
        if isinstance(x, torch.Tensor) and x.is_floating_point() and name.startswith("student"):
            torch.testing.assert_close(there[name], x, rtol=0.05, atol=5e-3)


def test_a_run_of_an_older_version_goes_on_with_its_workers(tmp_path, monkeypatch):
    run(tmp_path / "a", "--loader.colour", "workers", "--epochs", "1")
    file = tmp_path / "a" / "recipe.yaml"
    about = yaml.safe_load(file.read_text())
    del about["loader"]["colour"], about["loader"]["cache_side"]
    file.write_text(yaml.safe_dump(about))
    monkeypatch.setattr(placement, "choose", lambda *_: pytest.fail("it was measured"))
    _, printed = run(tmp_path / "a", "--epochs", "1")
    assert "is finished" in printed


def test_a_run_from_its_cache_says_so_and_makes_it_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    for i in range(16):
        pixels = np.random.default_rng(i).integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{i}.jpg")
    options = "--loader.cache_side", "32", "--loader.colour", "workers", "--epochs", "1"
    first, printed = run(tmp_path / "a", *options, source=str(tmp_path / "data"))
    assert "making a cache of 32 pixels: 16 of 16 images" in printed
    again, printed = run(tmp_path / "b", *options, source=str(tmp_path / "data"))
    assert "making a cache" not in printed
    assert equal(first, again)
    with pytest.raises(UserError, match=r"loader\.cache_side: 32 there, None now"):
        run(tmp_path / "a", *options[2:], source=str(tmp_path / "data"))
