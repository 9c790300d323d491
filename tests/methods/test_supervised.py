"""Supervised training with and without MTE's ensemble: equations (7) to (9), targets, and what inference uses."""

import random

import numpy as np
import pytest
import torch

from conftest import random_views, tiny_encoder, tiny_swin
from triptych.errors import UserError
from triptych.methods import SupervisedConfig, build
from triptych.methods.supervised import Supervised
from triptych.schedules import Progress

T0 = Progress(0, 10)
PLAIN = SupervisedConfig(classes=3, mixup=0, cutmix=0, average=0, label_smoothing=0.1)
MTE = PLAIN.model_copy(update={"aux": 2, "pooled": 2, "pool_kernel": 3})


def make(config, **options):
    torch.manual_seed(0)
    return build(tiny_encoder(Supervised.token_spec(config), **options), config).double()


def cross_entropy(logits, target):
    """−Σ_c y_c log softmax(o)_c, one image."""
    return -sum(target[c] * torch.log(torch.exp(logits[c]) / torch.exp(logits).sum()) for c in range(3))


def smoothed(label):
    return [0.9 * (c == label) + 0.1 / 3 for c in range(3)]


@pytest.mark.parametrize("logits", ["mean", "sum"])
def test_the_loss_is_equation_9_written_as_loops(logits):
    method, views = make(MTE.model_copy(update={"logits": logits})), random_views(4)
    tokens = method.model.encoder(views.global_crops[0].images)
    ensemble = method.ensemble
    aux = [ensemble.ten(tokens.aux_raw, tokens.patch_raw)[:, i] for i in range(2)]
    aux += [ensemble.pool(tokens.patch, tokens.grid)[:, i] for i in range(2)]
    o_a = sum(head(a) for head, a in zip(ensemble.heads, aux, strict=True))  # (7)
    o_a = o_a if logits == "sum" else o_a / 4
    o_g = method.model.head(tokens.cls)  # (8)
    first = [cross_entropy(o_a[b], smoothed(views.labels[b])) for b in range(4)]
    second = [cross_entropy(o_g[b], o_a[b].softmax(-1)) for b in range(4)]
    step = method(views, T0)
    torch.testing.assert_close(step.loss, (sum(first) + sum(second)) / 4)
    torch.testing.assert_close(step.terms["ensemble"], sum(first) / 4)


def test_without_auxiliary_tokens_it_is_the_cross_entropy_with_smoothed_labels():
    method, views = make(PLAIN), random_views(4)
    _, o_g = method.model(views.global_crops[0].images)
    expected = sum(cross_entropy(o_g[b], smoothed(views.labels[b])) for b in range(4)) / 4
    torch.testing.assert_close(method(views, T0).loss, expected)


def test_the_global_token_teaches_the_ensemble_nothing():
    method, views = make(MTE), random_views(4)
    method(views, T0).terms["distill"].backward()
    assert all(p.grad is None for p in method.ensemble.parameters())
    assert method.model.head.weight.grad.abs().sum() > 0


def test_mixing_follows_the_seed_and_leaves_the_batch_alone():
    method, views = make(PLAIN.model_copy(update={"mixup": 0.8, "cutmix": 1.0, "erase": 0.5})), random_views(4)
    before = views.global_crops[0].images.clone()

    def augment(seed):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        return method.augment(views.global_crops[0].images, views.labels)

    for a, b in zip(augment(1), augment(1), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(augment(1)[0], augment(2)[0])
    assert torch.equal(views.global_crops[0].images, before)
    targets = augment(3)[1]
    torch.testing.assert_close(targets.sum(1), torch.ones_like(targets[:, 0]))


def test_what_is_evaluated_is_the_average_where_there_is_one():
    plain, averaged = make(PLAIN), make(PLAIN.model_copy(update={"average": 0.75}))
    assert plain.encoder is plain.model.encoder
    assert averaged.encoder is averaged.average.encoder
    with torch.no_grad():
        for p in averaged.model.parameters():
            p.add_(1.0)
    before = averaged.average.head.bias.clone()
    averaged.update([{}], T0)
    torch.testing.assert_close(averaged.average.head.bias, before + 0.25)


def test_classifiers_of_all_tokens_may_be_one():
    shared = make(MTE.model_copy(update={"heads": "shared"}))
    assert len(shared.ensemble.heads) == 1
    assert shared(random_views(4), T0).loss.isfinite()


def test_fc_norm_is_the_final_norm_started_afresh_behind_the_mean_of_the_patches():
    """MAE's fine-tuning: o_g = Wᵀ (x - mean x) / sqrt(var x + ε), x the mean of the patches before any norm."""
    config = PLAIN.model_copy(update={"token": "patch_mean", "fc_norm": True, "average": 0.5})
    encoder = tiny_encoder(Supervised.token_spec(config))
    with torch.no_grad():
        encoder.vit.norm.weight.fill_(3.0)  # of pre-training
        encoder.vit.norm.bias.fill_(1.0)
    method = build(encoder, config).double()
    images = random_views(4).global_crops[0].images
    tokens, o_g = method.model(images)
    for b in range(4):
        x = sum(tokens.patch_raw[b]) / tokens.patch_raw.shape[1]
        normed = (x - x.mean()) / (x.var(correction=0) + encoder.vit.norm.eps).sqrt()
        torch.testing.assert_close(o_g[b], method.model.head.weight @ normed + method.model.head.bias)
    method(random_views(4), T0).loss.backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)  # DDP would refuse others
    assert torch.equal(method.average.encoder.vit.norm.weight, torch.ones(12, dtype=torch.float64))


def test_a_swin_has_a_norm_behind_the_mean_of_its_patches_too():
    config = PLAIN.model_copy(update={"token": "patch_mean", "fc_norm": True})
    method = build(tiny_swin(Supervised.token_spec(config)), config).double()
    method(random_views(4), T0).loss.backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


def test_a_projection_and_its_gelu_stand_between_class_token_and_classifier():
    method = make(PLAIN.model_copy(update={"projection": 5}))
    tokens, o_g = method.model(random_views(4).global_crops[0].images)
    a = tokens.cls @ method.model.projection.weight.T + method.model.projection.bias
    a = a * (1 + torch.erf(a / 2**0.5)) / 2
    torch.testing.assert_close(o_g, a @ method.model.head.weight.T + method.model.head.bias)
    method(random_views(4), T0).loss.backward()
    assert method.model.projection.weight.grad.abs().sum() > 0


def test_a_new_classifier_may_start_near_zero():
    heads = [make(PLAIN.model_copy(update={"head_std": std, "classes": 300})).model.head for std in (0.02, 2e-5)]
    for head, std in zip(heads, (0.02, 2e-5), strict=True):
        assert head.weight.std().item() == pytest.approx(std, rel=0.05)
        assert not head.bias.any()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"fc_norm": True}, "token patch_mean"),
        ({"fc_norm": True, "token": "patch_mean", "aux": 2}, "aux 0"),
        ({"projection": 8, "token": "patch_mean"}, "token cls"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        SupervisedConfig(classes=3, **wrong)


def test_fusing_logits_as_unit_vectors_is_refused():
    with pytest.raises(ValueError, match="logits are fused as they are"):
        SupervisedConfig(classes=3, fusion="unit")


def test_unlabelled_images_are_an_error(tmp_path):
    from PIL import Image

    from triptych.data.sources import open_source
    from triptych.recipe import of_source
    from triptych.recipes import RECIPES

    for i in range(3):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / f"{i}.png")
    with pytest.raises(UserError, match="has no labels"):
        of_source(RECIPES["supervised_small"](), open_source(str(tmp_path)))
