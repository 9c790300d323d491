"""torch.compile: the same numbers, and switched on only where it is measured to be faster."""

from pathlib import Path

import pytest
import torch

from conftest import random_views, tiny_encoder
from triptych import compiling, step
from triptych.errors import UserError
from triptych.methods import METHODS, UDIConfig, build
from triptych.recipe import Recipe
from triptych.schedules import Progress

SMALL = {"hidden": 16, "embedding": 8, "prototypes": 32}


@pytest.mark.slow
def test_compiled_losses_and_gradients_are_the_eager_ones():
    torch.manual_seed(0)
    config = UDIConfig(**SMALL)
    method = build(tiny_encoder(METHODS[UDIConfig].token_spec(config)), config)
    views, results = random_views(3, dtype=torch.float32), []
    for on in (False, True):
        method.zero_grad()
        with compiling.compiling(on):
            loss = method(views, Progress(5, 20, 5)).loss
            loss.backward()
        results.append([loss.detach(), *(p.grad for p in method.parameters() if p.grad is not None)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-3, atol=1e-5)


def test_a_function_is_compiled_only_inside_compiling(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f: lambda x: f(x) + 100)
    double = compiling.compilable(lambda x: 2 * x)
    assert double(1) == 2
    with compiling.compiling():
        assert double(1) == 102
        with compiling.compiling(False):
            assert double(1) == 2
    assert double(1) == 2


def settle(monkeypatch, seconds, out: Path, value="auto"):
    monkeypatch.setattr(step, "compare", lambda run, rounds=3: run() and seconds)
    recipe = Recipe(name="r", method=UDIConfig(**SMALL), compile=value)
    monkeypatch.setattr(
        step, "build_method", lambda r: build(tiny_encoder(METHODS[UDIConfig].token_spec(None)), r.method)
    )
    views, said = random_views(2, dtype=torch.float32), []
    settled = step.settle_compile(recipe, torch.device("cpu"), lambda: views, out, said.append)
    return settled.compile, said


@pytest.mark.parametrize(("seconds", "choice"), [((2.0, 1.0), "on"), ((1.0, 2.0), "off")])
def test_auto_keeps_the_faster_and_says_what_it_measured(monkeypatch, tmp_path, seconds, choice):
    settled, (line,) = settle(monkeypatch, seconds, tmp_path)
    assert settled == choice
    assert f"torch.compile is {choice}" in line
    assert "1 s" in line
    assert "2 s" in line


def test_a_run_that_goes_on_keeps_its_choice(monkeypatch, tmp_path):
    (tmp_path / "recipe.yaml").write_text("compile: 'on'\n")
    assert settle(monkeypatch, (1.0, 2.0), tmp_path) == ("on", [])
    (tmp_path / "recipe.yaml").write_text("seed: 0\n")  # of a run from before there was a choice
    assert settle(monkeypatch, (2.0, 1.0), tmp_path) == ("off", [])


def test_a_machine_where_it_does_not_work_is_told_what_to_do(monkeypatch):
    from torch._dynamo.exc import TorchDynamoException

    def fails():
        if compiling._on:
            raise TorchDynamoException("no compiler")

    with pytest.raises(UserError, match=r"no compiler.*--compile off"):
        compiling.compare(fails)
    eager, compiled = compiling.compare(lambda: None, rounds=1)
    assert 0 <= eager < 1
    assert 0 <= compiled < 1
