"""Classification by a method's own prototypes."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import tiny_encoder, tiny_swin
from triptych.data.sources import open_source
from triptych.errors import UserError
from triptych.evals.clustering import cluster_metrics
from triptych.evals.features import extract
from triptych.evals.pseudo_labels import nearest_prototype, prototype_head, pseudo_labels
from triptych.evals.transform import EvalTransform
from triptych.heads import Prototypes
from triptych.methods import METHODS, DINOConfig, MSNConfig, MTEConfig, SwAVConfig, UDIConfig, build, iBOTConfig

TRANSFORM = EvalTransform(16, 18)
WITH = [config for config in METHODS if "prototypes" in config.model_fields]
WITHOUT = [config for config in METHODS if config not in WITH and config is not MTEConfig]


def name_of(config):
    return config.model_fields["name"].default


def labels_of(source):
    return torch.tensor([source.label(i) for i in range(len(source))])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Three classes of four images."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for c in range(3):
        (folder / f"class{c}").mkdir()
        for i in range(4):
            Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(folder / f"class{c}" / f"{i}.png")
    return open_source(folder)


def small(config):
    sizes = {"hidden": 8, "embedding": 4, "prototypes": 6, "queue": 16, "head_kernel": 3, "classes": 3, "blocks": (2,)}
    return config(**{name: n for name, n in sizes.items() if name in config.model_fields})


def make(config, build_encoder=tiny_encoder):
    torch.manual_seed(0)
    method = build(build_encoder(METHODS[type(config)].token_spec(config)), config)
    with torch.no_grad():  # a teacher that is not the student
        for p in method.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    return method


def spread(method, source, student=False):
    """Six images become the prototypes, so that images choose unlike ones; -> the embeddings of all."""
    base = getattr(method, "base", method)
    tower = base.student if student else base.teacher
    x, _ = extract(tower.encoder, source, TRANSFORM, workers=0, precision=torch.float32)
    modes = [(m, m.training) for m in tower.modules()]
    with torch.no_grad():
        z = tower.eval().projector(x)
        prototypes = getattr(tower, "prototypes", None) or base.prototypes
        getattr(prototypes, "direction", prototypes.weight).copy_(torch.nn.functional.normalize(z[::2]))
        if hasattr(prototypes, "gain"):
            prototypes.gain.fill_(1)
    for m, training in modes:
        m.training = training
    return z, prototypes.weight.detach()


def test_pseudo_labels_are_the_argmax_of_the_methods_logits():
    torch.manual_seed(0)
    prototypes = Prototypes(6, 11, train_gain=True)
    torch.nn.init.uniform_(prototypes.gain, 0.5, 2.0)
    z = torch.randn(25, 6)
    expected = prototypes(z).argmax(1)
    assert torch.equal(nearest_prototype(z, prototypes.weight), expected)
    assert torch.equal(nearest_prototype(100 * z, prototypes.weight, rows=7), expected)


def test_half_precision_does_not_choose_the_prototype():
    """Prototypes that bf16 cannot tell apart, within autocast."""
    z = torch.eye(4)[:2]
    prototypes = torch.stack([z[0], 1.001 * z[0], z[1], 1.001 * z[1]])
    with torch.autocast("cpu", torch.bfloat16):
        assert nearest_prototype(z, prototypes).tolist() == [1, 3]


@pytest.mark.parametrize("student", [False, True])
@pytest.mark.parametrize("config", WITH, ids=name_of)
def test_every_method_with_prototypes_classifies_by_them(source, config, student):
    method = make(small(config))
    embeddings, weight = spread(method, source, student)
    ours = pseudo_labels(method, source, TRANSFORM, student=student, batch=5, workers=0, precision=torch.float32)
    found = [max(range(6), key=lambda k, z=z: float(z / z.norm() @ weight[k])) for z in embeddings]
    assert found[::2] == list(range(6))
    assert ours.metrics == cluster_metrics(labels_of(source), torch.tensor(found))
    assert ours.prototypes == 6
    assert ours.shuffled.clusters == ours.metrics.clusters
    assert json.loads(json.dumps(asdict(ours), allow_nan=False)) == asdict(ours)


@pytest.mark.parametrize("base", [DINOConfig, MSNConfig], ids=name_of)
def test_a_run_of_mte_classifies_by_the_head_of_its_base(source, base):
    config = small(base)
    if base is MSNConfig:
        config = config.model_copy(update={"drop": 0})
    method = make(MTEConfig(base=config, aux=2, pooled=0))
    spread(method, source)
    options = {"batch": 4, "workers": 0, "precision": torch.float32}
    found = pseudo_labels(method, source, TRANSFORM, **options)
    assert found.metrics.clusters == 6
    assert found == pseudo_labels(method.base, source, TRANSFORM, **options)


def test_a_swin_classifies_by_its_mean_patch(source):
    method = make(small(SwAVConfig), lambda spec: tiny_swin(spec.__class__(cls=0)))
    assert pseudo_labels(method, source, TRANSFORM, workers=0).metrics.images == 12


def test_it_is_the_class_token_that_chooses_not_class_plus(source):
    method = make(small(UDIConfig)).eval()
    spread(method, source)
    tower, weight = prototype_head(method)
    assert tower is method.teacher
    found = {}
    for token in ("cls", "cls_plus"):
        x, _ = extract(tower.encoder, source, TRANSFORM, token=token, workers=0)
        with torch.no_grad():
            found[token] = nearest_prototype(tower.projector(x), weight)
    assert not torch.equal(found["cls"], found["cls_plus"]), "the two would be told apart"
    ours = pseudo_labels(method, source, TRANSFORM, workers=0)
    assert ours.metrics == cluster_metrics(labels_of(source), found["cls"])


def test_the_method_is_left_as_it_was(source):
    method = make(small(DINOConfig)).train()
    modes = [m.training for m in method.modules()]
    before = {name: value.clone() for name, value in method.state_dict().items()}
    pseudo_labels(method, source, TRANSFORM, workers=0)
    assert [m.training for m in method.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())


@pytest.mark.parametrize("config", WITHOUT, ids=name_of)
def test_methods_without_prototypes_are_sent_to_clustering(source, config):
    with pytest.raises(UserError, match=rf"{name_of(config)} has no prototypes.*eval clustering"):
        pseudo_labels(make(small(config)), source, TRANSFORM)


def test_images_without_labels_are_an_error_before_the_work(source, monkeypatch):
    method = make(small(DINOConfig))
    monkeypatch.setattr(type(source), "label", lambda *_: None)
    monkeypatch.setattr(method.teacher.encoder, "run", lambda *_: 1 / 0)
    with pytest.raises(UserError, match="no labels"):
        pseudo_labels(method, source, TRANSFORM)


def test_what_a_few_images_score_by_chance_stands_beside(source):
    """Shuffled by the seed: the same again for the same one."""
    method = make(small(iBOTConfig))
    spread(method, source)
    first, again, other = (pseudo_labels(method, source, TRANSFORM, seed=s, workers=0) for s in (0, 0, 3))
    assert first == again
    assert first.metrics == other.metrics
    assert first.shuffled != other.shuffled
