"""Tokens of either side of every method that has some, and what is measured on them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import tiny_encoder, tiny_swin
from triptych.data.sources import open_source
from triptych.errors import UserError
from triptych.evals.features import extract, labels_of
from triptych.evals.knn import knn
from triptych.evals.spill import Rows, on_disk
from triptych.evals.tokens import Side, extract_tokens, measure_tokens
from triptych.evals.transform import EvalTransform
from triptych.methods import BASES, METHODS, DINOConfig, HSSLConfig, MTEConfig, SupervisedConfig, build

TRANSFORM = EvalTransform(16, 18)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Three classes of five images."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for c in range(3):
        (folder / f"class{c}").mkdir()
        for i in range(5):
            Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(folder / f"class{c}" / f"{i}.png")
    return open_source(folder)


class CountedRuns:
    """How often an encoder, or a copy that is made of it inside, runs."""

    def __init__(self, encoder):
        self.encoder, self.count = encoder, 0

    def __enter__(self):
        self.kind, run = type(self.encoder), type(self.encoder).run
        token = self.encoder.trunk.norm.weight  # copies have the same values

        def counted(encoder, *arguments):
            self.count += torch.equal(encoder.trunk.norm.weight, token)
            return run(encoder, *arguments)

        self.before, self.kind.run = run, counted
        return self

    def __exit__(self, *_):
        self.kind.run = self.before


def make(config, build_encoder=tiny_encoder):
    torch.manual_seed(0)
    method = build(build_encoder(METHODS[type(config)].token_spec(config)), config)
    with torch.no_grad():  # a teacher that is not the student
        for p in method.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return method.eval()


def small(base):
    sizes = {"hidden": 8, "embedding": 4, "prototypes": 6, "queue": 16, "head_kernel": 3}
    sizes["drop"] = 0  # MSN's patches, without all of which nothing can be pooled
    return base(**{name: n for name, n in sizes.items() if name in base.model_fields})


ENSEMBLE = {"aux": 2, "pooled": 1, "pool_kernel": 3}


@pytest.mark.parametrize("base", BASES, ids=lambda b: b.model_fields["name"].default)
@pytest.mark.parametrize("student", [False, True])
def test_removal_changes_no_bit_of_the_global_token_of_any_base(source, base, student):
    side = Side.of(make(MTEConfig(base=small(base), **ENSEMBLE)), student)
    x = extract_tokens(side, source, TRANSFORM, batch=4, workers=0)
    assert torch.equal(x.before, x.after)
    own = ["own 0"] if base is HSSLConfig else []
    assert x.names == ["aux 0", "aux 1", "pooled 0", *own]
    assert x.tokens.shape == (len(x.names), 15, 12)
    assert x.embeddings.shape == (1 + len(x.names), 15, 4)
    torch.testing.assert_close(x.fused, x.embeddings[1:].mean(0))
    exported, indices = extract(side.encoder.without("aux"), source, TRANSFORM, batch=4, workers=0)
    torch.testing.assert_close(x.after, exported, rtol=0, atol=1e-6)  # which leaves out the last block's patches
    assert torch.equal(x.indices, indices)
    assert (x.compared, x.difference) == (15, 0)
    assert (side.prototypes is None) == ("prototypes" not in base.model_fields)


def test_teacher_and_student_have_tokens_of_their_own(source):
    method = make(MTEConfig(base=small(DINOConfig), **ENSEMBLE))
    sides = [extract_tokens(Side.of(method, student), source, TRANSFORM, workers=0) for student in (False, True)]
    for name in ("after", "tokens", "embeddings", "fused"):
        assert not torch.equal(*(getattr(x, name) for x in sides))


def test_only_so_many_images_are_compared_unless_they_differ(source):
    calls = {}
    for sees in ("all", "uncut"):
        side = Side.of(make(MTEConfig(base=small(DINOConfig), aux_sees=sees, **ENSEMBLE)))
        with CountedRuns(side.encoder) as runs:
            x = extract_tokens(side, source, TRANSFORM, compared=4, batch=4, workers=0)
        calls[sees] = runs.count
        assert x.compared == (4 if sees == "all" else 15)
        assert (x.difference == 0) == (sees == "all")
        assert torch.equal(x.before[4:], x.after[4:]) == (sees == "all")
    assert calls == {"all": 4 + 1, "uncut": 4 + 4}, "batches of 4, 4, 4 and 3 images"


def test_the_teacher_alone_runs_and_features_may_leave_out_embeddings(source):
    method = make(MTEConfig(base=small(DINOConfig), **ENSEMBLE))
    with CountedRuns(method.student.encoder) as student, CountedRuns(method.teacher.encoder) as teacher:
        x = extract_tokens(Side.of(method), source, TRANSFORM, embeddings=False, compared=0, workers=0)
    assert (student.count, teacher.count) == (0, 1)
    assert x.embeddings is None


def test_what_does_not_fit_into_memory_lies_in_a_file_that_goes_with_the_tensor(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path))
    rows = Rows(10)
    parts = torch.randn(2, 7, 3).split([4, 3], 1)
    for part in parts:
        rows.add(a=part, b=part[0])
    assert torch.equal(rows["a"], torch.cat(parts, 1))
    assert torch.equal(rows["b"], rows["a"][0])
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert maps.read_text().count(f"{tmp_path}/features") == 2
        del rows
        assert maps.read_text().count(f"{tmp_path}/features") == 0
    assert not any((tmp_path / "features").iterdir())


def test_no_room_on_disk_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="set TRIPTYCH_CACHE to another folder"):
        on_disk(2**40, 2**10)


def test_where_other_tokens_see_them_removal_is_not_exact_and_the_result_says_so(source):
    side = Side.of(make(MTEConfig(base=small(DINOConfig), aux_sees="uncut", **ENSEMBLE)))
    x = extract_tokens(side, source, TRANSFORM, workers=0)
    y = labels_of(source, x.indices)
    result = measure_tokens(x, y, x, y, k=3)
    assert not result.removal_is_exact
    assert result.removal_difference > 0


def test_accuracies_are_those_of_knn_on_each_feature(source):
    side = Side.of(make(MTEConfig(base=small(DINOConfig), **ENSEMBLE)))
    x = extract_tokens(side, source, TRANSFORM, workers=0)
    y = labels_of(source, x.indices)
    rows = torch.arange(len(y)) % 5 == 0

    def part(chosen):
        values = {
            k: v if not isinstance(v, torch.Tensor) else v[..., chosen] if v.ndim == 1 else v[..., chosen, :]
            for k, v in vars(x).items()
        }
        return type(x)(**values)

    train, test = part(~rows), part(rows)
    result = measure_tokens(train, y[~rows], test, y[rows], prototypes=side.prototypes, k=3, probe=False)
    assert result.removal_is_exact
    assert result.linear == {}
    together = [torch.cat([t / t.norm(dim=1, keepdim=True) for t in f.tokens], 1) for f in (train, test)]
    features = {
        "global before removal": (train.before, test.before),
        "global after removal": (train.after, test.after),
        "fused embedding": (train.fused, test.fused),
        "auxiliary tokens concatenated": together,
        **{name: (train.tokens[i], test.tokens[i]) for i, name in enumerate(x.names)},
    }
    assert result.knn.keys() == features.keys()
    for name, (a, b) in features.items():
        assert result.knn[name] == pytest.approx(knn(a, y[~rows], b, y[rows], k=[3]).top1[3])
    assert result.analysis.names == ["global", *x.names]
    assert result.analysis.nmi is not None


def test_a_supervised_ensemble_is_read_with_the_weights_as_trained_and_a_swin_has_pooled_tokens_only(source):
    method = make(SupervisedConfig(classes=3, **ENSEMBLE))
    side = Side.of(method)
    assert side.encoder is method.model.encoder
    assert side.prototypes is None
    x = extract_tokens(side, source, TRANSFORM, workers=0)
    assert torch.equal(x.before, x.after)
    swin = Side.of(make(MTEConfig(base=small(DINOConfig), aux=0, pooled=2, pool_kernel=3), tiny_swin))
    assert extract_tokens(swin, source, TRANSFORM, workers=0).names == ["pooled 0", "pooled 1"]


@pytest.mark.parametrize("config", [small(DINOConfig), SupervisedConfig(classes=3)])
def test_a_method_without_auxiliary_tokens_is_refused(config):
    with pytest.raises(UserError, match="has no auxiliary tokens"):
        Side.of(make(config))
