"""A subject: one encoder or several, whose features are extracted once."""

import pytest
import torch

from conftest import tiny_encoder, tiny_swin
from triptych.data.sources import open_source
from triptych.encoders.load import Loaded
from triptych.errors import UserError
from triptych.evals import features as extraction
from triptych.evals.subject import Subject
from triptych.tokens import TokenSpec


def loaded(encoder, name="a"):
    return Loaded(encoder.eval(), name, 16)


@pytest.fixture
def plain(tmp_path):
    return Subject([loaded(tiny_encoder(TokenSpec()))], folder=tmp_path)


def test_all_tokens_take_one_pass_and_the_next_call_none(plain, monkeypatch):
    passes = []
    whole = extraction.extract_all
    monkeypatch.setattr(extraction, "extract_all", lambda *a, **k: passes.append(a[3]) or whole(*a, **k))
    source = open_source("scenes:6")
    found = plain.features_of(source, plain.tokens())
    assert torch.equal(plain.features(source, "cls").x, found["cls"].x)
    assert passes == [["cls", "patch_mean", "cls+patch_mean"]]
    assert found["cls"].labels is not None
    assert found["cls"].indices.tolist() == list(range(6))


def test_features_of_several_encoders_stand_side_by_side_each_of_unit_length(tmp_path):
    a, b = loaded(tiny_encoder(TokenSpec())), loaded(tiny_swin(TokenSpec(cls=0)), "b")
    source = open_source("scenes:5")
    joint = Subject([a, b], folder=tmp_path).features(source)
    parts = [Subject([one], folder=tmp_path).features(source).x for one in (a, b)]
    parts = [x / x.norm(dim=1, keepdim=True) for x in parts]
    torch.testing.assert_close(joint.x, torch.cat(parts, 1))
    about = Subject([a, b], folder=tmp_path).about()
    assert about["model"] == ["a", "b"]
    assert about["precision"] in ("float32", "bfloat16")


def test_tokens_are_those_that_all_encoders_have():
    udi, dino = loaded(tiny_encoder(TokenSpec(cls_plus=1))), loaded(tiny_encoder(TokenSpec()))
    assert Subject([udi]).tokens() == ["cls", "cls_plus", "patch_mean", "cls+patch_mean"]
    assert Subject([udi, dino]).tokens() == ["cls", "patch_mean", "cls+patch_mean"]
    assert Subject([loaded(tiny_swin(TokenSpec(cls=0)))]).tokens() == ["cls"]
    with pytest.raises(UserError, match="no class"):
        Subject([udi, dino]).check(["cls_plus"])
    with pytest.raises(UserError, match="2 blocks"):
        Subject([dino]).check(["cls"], 3)


def test_unreadable_images_are_told_once(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
    from PIL import Image

    Image.new("RGB", (20, 20)).save(tmp_path / "data" / "a" / "1.png")
    (tmp_path / "data" / "b" / "2.png").write_bytes(b"no image")
    said = []
    subject = Subject([loaded(tiny_encoder(TokenSpec()))], folder=tmp_path / "cache", say=said.append)
    for _ in range(2):
        assert subject.features(open_source(tmp_path / "data")).indices.tolist() == [0]
    assert len(said) == 1
    assert "1 of 2 images" in said[0]
