"""The classifiers of a supervised run, counted image by image."""

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import tiny_encoder
from triptych.data.sources import open_source
from triptych.errors import UserError
from triptych.evals.classify import check_supervised, classify
from triptych.evals.transform import EvalTransform, batches
from triptych.methods import DINOConfig, SupervisedConfig, build
from triptych.methods.supervised import Supervised

TRANSFORM = EvalTransform(16, 18)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Seven classes of four images."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for c in range(7):
        (folder / f"class{c}").mkdir()
        for i in range(4):
            Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(folder / f"class{c}" / f"{i}.png")
    return open_source(folder)


def supervised(**options) -> Supervised:
    torch.manual_seed(0)
    config = SupervisedConfig(classes=7, pool_kernel=3, **options)
    method = build(tiny_encoder(Supervised.token_spec(config)), config).eval()
    assert isinstance(method, Supervised)
    with torch.no_grad():  # spread-out logits, and an average that is not what is trained
        for name, p in method.named_parameters():
            p.add_((0.2 if "average" in name else 0.1) * torch.randn(p.shape))
    return method


def counted(scores: list[torch.Tensor], labels: list[int], n: int) -> float:
    right = [y in sorted(range(7), key=lambda c, s=s: -float(s[c]))[:n] for s, y in zip(scores, labels, strict=True)]
    return 100 * sum(right) / len(right)


@torch.no_grad()
def test_every_classifier_has_the_accuracy_that_counting_gives(source):
    method = supervised(aux=2, pooled=1)
    result = classify(method, source, TRANSFORM, batch=5, workers=0)
    images = torch.cat([x for _, x in batches(source, TRANSFORM, batch=28, device=CPU, workers=0)])
    labels = [source.label(i) for i in range(len(source))]
    tokens = method.model.encoder(images)
    each = method.ensemble.embeddings(method.ensemble.tokens(tokens))
    scores = {"global": method.average(images)[1], "ensemble": each.sum(0)}
    scores |= dict(zip(["aux 0", "aux 1", "pooled 0"], each, strict=True))
    assert list(result.top1) == list(scores)
    for name, logits in scores.items():
        assert result.top1[name] == pytest.approx(counted(list(logits), labels, 1))
        assert result.top5[name] == pytest.approx(counted(list(logits), labels, 5))
    assert len(set(result.top1.values())) > 1, "the test must tell classifiers apart"
    assert (result.images, result.classes, result.averaged) == (28, 7, True)


@torch.no_grad()
def test_the_classifier_as_trained_and_a_run_without_an_average(source):
    method = supervised()
    images = torch.cat([x for _, x in batches(source, TRANSFORM, batch=28, device=CPU, workers=0)])
    labels = [source.label(i) for i in range(len(source))]
    result = classify(method, source, TRANSFORM, average=False, workers=0)
    assert result.top1 == {"global": pytest.approx(counted(list(method.model(images)[1]), labels, 1))}
    assert not result.averaged
    assert not classify(supervised(average=0), source, TRANSFORM, workers=0).averaged


def test_other_methods_and_other_classes_are_refused(source):
    dino = build(
        tiny_encoder(Supervised.token_spec(SupervisedConfig())), DINOConfig(hidden=4, embedding=4, prototypes=4)
    )
    with pytest.raises(UserError, match=r"\(dino\) trained without labels"):
        check_supervised(dino, source)
    few = build(tiny_encoder(Supervised.token_spec(SupervisedConfig())), SupervisedConfig(classes=3))
    with pytest.raises(UserError, match="trained on 3 classes"):
        check_supervised(few, source)
