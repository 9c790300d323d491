"""The gradients of a loss's terms at the last block, on methods and on the command line."""

import json
from pathlib import Path

import pytest
import torch

from conftest import random_views, tiny_encoder
from triptych.cli import main
from triptych.data.scenes import write
from triptych.evals.gradients import gradients
from triptych.methods import MMCConfig, build
from triptych.schedules import Progress
from triptych.tokens import TokenSpec

SMALL = "--batch 8 --epochs 1 --encoder.width 24 --encoder.depth 2 --encoder.heads 3 --views.global_size 32"
SMALL += " --loader.workers 0 --health.every 0 --method.hidden 16 --method.embedding 8"


def test_norms_and_cosines_are_those_of_backward():
    torch.manual_seed(0)
    method = build(tiny_encoder(TokenSpec()), MMCConfig(hidden=16, embedding=6, weights=(2, 1, 1))).double()
    views, t = random_views(3, n_local=0), Progress(0, 10)
    result = gradients(method, [views, views], t)
    found = {}
    for name, term in method(views, t).terms.items():
        method.zero_grad()
        term.backward(retain_graph=True)
        found[name] = torch.cat([p.grad.flatten() for p in method.student.encoder.blocks[-1].parameters()])
    assert result.batches == 2
    assert result.norms == pytest.approx({name: g.norm().item() for name, g in found.items()})
    cosine = torch.cosine_similarity(found["class"], found["pixels"], dim=0).item()
    assert result.cosines["class, pixels"] == pytest.approx(cosine)
    assert result.loss == pytest.approx((2 * found["pixels"] + found["patch"] + found["class"]).norm().item())


def test_the_commands_measure_a_run_and_append_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data", train=16, test=8, size=32)
    main(["train", "--recipe", "mmc_small", "--data", "data/train", *SMALL.split(), "--out", "run"])
    for words in ("gradients run --batches 3", "patches run", "patches run --head"):
        main(["eval", *words.split(), "--data", "data/train"])
    lines = [json.loads(line) for line in Path("results.jsonl").read_text().splitlines()]
    assert [line["protocol"] for line in lines] == ["gradients", "patches", "patches"]
    assert set(lines[0]["norms"]) == {"class", "pixels", "patch"}
    assert lines[1]["within"] != lines[2]["within"]
    main(["train", "--recipe", "sit_small", "--data", "data/train", *SMALL.split(), "--out", "sit"])
    with pytest.raises(SystemExit) as stopped:
        main(["eval", "patches", "sit", "--head", "--data", "data/train"])
    assert stopped.value.code == 2
    assert "sit has no head of its own for patches" in capsys.readouterr().err
