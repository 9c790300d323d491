"""Checkpoints of the papers' code bases: their tokens, and what becomes of every tensor.

The files cannot be had here.  The state dicts have the names, shapes and nesting of the released code, small sizes and
random values; tokens are compared with a plain reading of the architecture over those names (`official_layouts`).
"""

import argparse

import pytest
import torch
from official_layouts import (
    CHUNKED,
    DEPTH,
    FACEBOOK,
    IBOT_SCALED,
    SWIGLU,
    dino_head,
    random_state,
    reading,
    under,
)
from safetensors.torch import save_file

from conftest import tiny_swin
from triptych.encoders.load import load_encoder, load_weights
from triptych.encoders.load_swin import official_names
from triptych.encoders.vit_build import ViTConfig, build
from triptych.errors import UserError
from triptych.tokens import TokenSpec

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DECODER = {
    "mask_token": torch.ones(1, 1, 8),
    "decoder_pos_embed": torch.ones(1, 17, 8),
    "decoder_embed.weight": torch.ones(8, 128),
    "decoder_blocks.0.attn.qkv.weight": torch.ones(24, 8),
    "decoder_norm.bias": torch.ones(8),
    "decoder_pred.bias": torch.ones(48),
}
OPTIONS = argparse.Namespace(arch="vit_small", lr=1e-3)


def images(height=16, width=16):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def dino(state, other):
    student = under("module.backbone.", other) | dino_head("module.head.")
    teacher = under("backbone.", state) | dino_head()
    moments = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    loss = {"center": torch.ones(1, 2)}
    return {
        "student": student,
        "teacher": teacher,
        "optimizer": moments,
        "epoch": 3,
        "args": OPTIONS,
        "dino_loss": loss,
    }


def ibot(state, other):
    file = dino(state, other | {"masked_embed": torch.ones(1, 128)})
    file["teacher"] = under("module.", file["teacher"])  # where its head has batch norm
    return file


def udi(state, other):
    wrapped = [
        under("module.backbone.backbone.", s) | {"module.backbone.attn.w_q.weight": torch.ones(2)}
        for s in (state, other)
    ]
    return {"teacher": wrapped[0] | dino_head("module.head.0."), "student": wrapped[1], "args": OPTIONS}


def mocov3(state, other):
    sides = {"momentum": state, "base": other}
    encoders = {}
    for side, weights in sides.items():
        encoders |= under(
            f"module.{side}_encoder.", weights | {"head.0.weight": torch.ones(2), "head.1.running_mean": torch.ones(2)}
        )
    return {"epoch": 3, "arch": "vit_small", "state_dict": encoders | {"module.predictor.0.weight": torch.ones(2)}}


def msn(state, other):
    head = {"fc.fc1.weight": torch.ones(2), "fc.bn1.running_var": torch.ones(2)}
    sides = {"target_encoder": state, "encoder": other}
    return {k: under("module.", s | head) for k, s in sides.items()} | {"prototypes": torch.ones(4, 2), "scaler": {}}


def dinov2(state, other):
    """Released: a bare state dict.  A training's teacher_checkpoint.pth has a backbone and two heads."""
    mask = {"mask_token": torch.ones(1, 128)}
    heads = dino_head("dino_head.") | dino_head("ibot_head.")
    return {"teacher": under("backbone.", state | mask) | heads, "student": under("backbone.", other | mask)}


PLAIN = {"heads": 2, "eps": 1e-6}
# what -> file of a state and another one, names, options of the state, and of the reading
TWO = {
    "DINO": (dino, FACEBOOK, {}, PLAIN | {"rule": "dino"}),
    "iBOT": (ibot, FACEBOOK, {}, PLAIN | {"rule": "dino"}),
    "iBOT with layer scale": (ibot, IBOT_SCALED, {"scale": True}, PLAIN | {"rule": "dino"}),
    "UDI": (udi, FACEBOOK, {"cls": 2}, PLAIN | {"rule": "dino"}),
    "MoCo v3": (mocov3, FACEBOOK, {"width": 96}, {"heads": 12, "eps": 1e-6, "rule": "antialiased"}),
    "MSN": (msn, FACEBOOK, {}, PLAIN | {"rule": "size"}),
    "DINOv2 training": (dinov2, CHUNKED, {"scale": True}, PLAIN | {"rule": "dino"}),
}
ONE = {
    "DINO backbone": (dict, FACEBOOK, {}, PLAIN | {"rule": "dino"}),
    "DINO backbone without biases": (dict, FACEBOOK, {"bias": False}, PLAIN | {"rule": "dino"}),
    "iBOT backbone": (lambda s: {"state_dict": s}, FACEBOOK, {}, PLAIN | {"rule": "dino"}),
    "UDI backbone": (dict, FACEBOOK, {"cls": 2}, PLAIN | {"rule": "dino"}),
    "DINOv2": (lambda s: s | {"mask_token": torch.ones(1, 128)}, FACEBOOK, {"scale": True}, PLAIN | {"rule": "dino"}),
    "DINOv2 with registers": (
        lambda s: s | {"mask_token": torch.ones(1, 128)},
        FACEBOOK,
        {"scale": True, "registers": 4},
        PLAIN | {"rule": "antialiased"},
    ),
    "DINOv2 ViT-g": (
        lambda s: s | {"mask_token": torch.ones(1, 128)},
        SWIGLU,
        {"scale": True, "gated": True},
        PLAIN | {"rule": "dino"},
    ),
    "MAE pre-training": (lambda s: {"model": s | DECODER, "args": OPTIONS}, FACEBOOK, {}, PLAIN | {"rule": "size"}),
    "MAE encoder": (lambda s: {"model": s}, FACEBOOK, {}, PLAIN | {"rule": "size"}),
    "MAE fine-tuned": (
        lambda s: {
            "model": {k.replace("norm.", "fc_norm.") if k.startswith("norm.") else k: v for k, v in s.items()}
            | {"head.weight": torch.ones(2, 128)}
        },
        FACEBOOK,
        {},
        PLAIN | {"rule": "size"},
    ),
    "MoCo v3 with a linear classifier": (
        lambda s: {"state_dict": under("module.", s | {"head.weight": torch.ones(2)})},
        FACEBOOK,
        {},
        PLAIN | {"rule": "antialiased"},
    ),
    "SwAV and others": (
        lambda s: under("module.", s | {"projection_head.0.weight": torch.ones(2), "prototypes.weight": torch.ones(2)}),
        FACEBOOK,
        {},
        PLAIN | {"rule": "antialiased"},
    ),
}


def check(loaded, state, names, options):
    """All tokens at the native size, at a larger one and at a smaller one that is no square."""
    encoder = loaded.encoder.double()
    assert loaded.size == 16
    for size in ((16, 16), (24, 24), (8, 12)):
        with torch.no_grad():
            found = encoder.as_timm(encoder(images(*size)))
        torch.testing.assert_close(found, reading(state, images(*size), names, **options), rtol=0, atol=1e-10)


@pytest.mark.parametrize("what", TWO)
def test_of_a_checkpoint_with_two_encoders_either_gives_its_own_tokens(tmp_path, what):
    file, names, shape, options = TWO[what]
    states = {"teacher": random_state(names, **shape), "student": random_state(names, seed=1, **shape)}
    torch.save(file(*states.values()), tmp_path / "w.pth")
    for weights, state in states.items():
        loaded = load_encoder(str(tmp_path / "w.pth"), weights=weights)
        check(loaded, state, names, options)
        assert loaded.name.endswith(f"({weights})")
        assert loaded.report.part.startswith(weights)
        assert loaded.report.complete
        assert len(loaded.report.matched) == len(state)
    assert torch.equal(load_encoder(str(tmp_path / "w.pth")).encoder.vit.norm.bias, states["teacher"]["norm.bias"])


@pytest.mark.parametrize("what", ONE)
def test_a_released_encoder_gives_the_tokens_of_its_architecture(tmp_path, what):
    file, names, shape, options = ONE[what]
    state = random_state(names, **shape)
    torch.save(file(state), tmp_path / "w.pth")
    loaded = load_encoder(str(tmp_path / "w.pth"))
    check(loaded, state, names, options)
    assert (loaded.mean, loaded.std) == IMAGENET
    assert loaded.report.complete
    assert len(loaded.report.matched) == len(state)
    with pytest.raises(UserError, match="no student"):
        load_encoder(str(tmp_path / "w.pth"), weights="student")


def test_roles_of_tokens_follow_the_code_base(tmp_path):
    torch.save(random_state(FACEBOOK, cls=2), tmp_path / "udi.pth")
    assert load_encoder(str(tmp_path / "udi.pth")).encoder.spec == TokenSpec(cls=1, cls_plus=1)
    torch.save(random_state(FACEBOOK, registers=4), tmp_path / "v2.pth")
    assert load_encoder(str(tmp_path / "v2.pth")).encoder.spec == TokenSpec(cls=1, register=4)


def test_queries_keys_and_values_may_be_apart(tmp_path):
    state = random_state(FACEBOOK)
    apart = {name: value for name, value in state.items() if ".qkv." not in name}
    for i in range(DEPTH):
        for leaf in ("weight", "bias"):
            parts = state[f"blocks.{i}.attn.qkv.{leaf}"].chunk(3)
            apart |= {f"blocks.{i}.attn.{r}.{leaf}": part.clone() for r, part in zip("qkv", parts, strict=True)}
    torch.save(apart, tmp_path / "w.pth")
    loaded = load_encoder(str(tmp_path / "w.pth"))
    check(loaded, state, FACEBOOK, PLAIN | {"rule": "dino"})
    assert len(loaded.report.matched) == len(apart)
    torch.save({k: v for k, v in apart.items() if k != "blocks.1.attn.k.bias"}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"missing: blocks.1.attn.qkv.bias\n.*blocks.1.attn.q.bias"):
        load_encoder(str(tmp_path / "w.pth"))


def test_the_report_says_what_became_of_every_tensor(tmp_path):
    state = random_state(FACEBOOK)
    torch.save({"model": state | DECODER}, tmp_path / "w.pth")
    report = load_encoder(str(tmp_path / "w.pth")).report
    assert report.origin == "MAE"
    assert set(report.matched) == set(under("model.", state))
    assert set(report.ignored) == set(under("model.", DECODER))
    assert report.missing == report.unexpected == ()
    assert f"{len(state)} matched, 0 missing, 0 unexpected, 6 ignored" in report.text()
    assert "mask_token (1), decoder_pos_embed (1)" in report.text()
    torch.save(dino(state, state), tmp_path / "w.pth")
    report = load_encoder(str(tmp_path / "w.pth")).report
    assert f"student.backbone ({len(state)}), student.head (2), teacher.head (2), dino_loss (1)" in report.text()


def test_a_partial_match_is_an_error_unless_asked_for(tmp_path):
    state = random_state(FACEBOOK)
    changed = {k: v for k, v in state.items() if k != "blocks.1.norm2.bias"}
    changed |= {"blocks.0.attn.rel_pos_bias": torch.ones(3), "blocks.0.norm1.bias": torch.ones(7)}
    torch.save(changed, tmp_path / "w.pth")
    with pytest.raises(UserError) as error:
        load_encoder(str(tmp_path / "w.pth"))
    for said in ("missing: blocks.0.norm1.bias, blocks.1.norm2.bias", "rel_pos_bias (3,)", "bias (7,)", "partial=True"):
        assert said in str(error.value)
    randomness = torch.get_rng_state()
    loaded = load_encoder(str(tmp_path / "w.pth"), partial=True)
    assert torch.equal(torch.get_rng_state(), randomness)
    assert loaded.report.missing == ("blocks.0.norm1.bias", "blocks.1.norm2.bias")
    assert len(loaded.report.unexpected) == 2
    assert len(loaded.report.matched) == len(state) - 2
    assert torch.equal(loaded.encoder.vit.blocks[1].attn.qkv.weight, state["blocks.1.attn.qkv.weight"])
    assert torch.equal(loaded.encoder.vit.blocks[1].norm2.bias, torch.zeros(128))


def test_a_bare_encoder_is_dinos_in_a_pickle_and_timms_in_safetensors_unless_said(tmp_path):
    """Their names are the same; only the rule for other sizes differs."""
    state = random_state(FACEBOOK)
    torch.save(state, tmp_path / "w.pth")
    save_file(state, tmp_path / "w.safetensors")
    assert load_encoder(str(tmp_path / "w.pth")).encoder.positions == "dino"
    assert load_encoder(str(tmp_path / "w.safetensors")).encoder.positions == "timm"
    check(load_encoder(str(tmp_path / "w.pth"), origin="timm"), state, FACEBOOK, PLAIN | {"rule": "antialiased"})
    with pytest.raises(UserError, match="did you mean mocov3"):
        load_encoder(str(tmp_path / "w.pth"), origin="moco")
    with pytest.raises(UserError, match="no teacher of MoCo v3"):
        load_encoder(str(tmp_path / "w.pth"), origin="mocov3")


def test_two_tensors_for_one_weight_are_refused(tmp_path):
    """DINOv2 counts blocks through all chunks; code that starts anew in each would be read wrongly."""
    state = random_state(CHUNKED)
    anew = {name.replace("blocks.0.1.", "blocks.1.0."): value for name, value in state.items()}
    torch.save(anew, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"several tensors for blocks\.0\."):
        load_encoder(str(tmp_path / "w.pth"))


def test_a_file_with_encoders_that_cannot_be_told_apart_is_refused(tmp_path):
    state = random_state(FACEBOOK)
    torch.save({"left": state, "right": state}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"several encoders, at left\., right\."):
        load_encoder(str(tmp_path / "w.pth"))
    torch.save({"student": under("backbone.", state)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"no teacher.*student\.backbone"):
        load_encoder(str(tmp_path / "w.pth"))
    assert load_encoder(str(tmp_path / "w.pth"), weights="student").report.complete


class Config:
    """A class of some code base, as MoBY's checkpoints pickle one."""


def test_objects_in_a_pickle_are_named_with_the_way_to_be_rid_of_them(tmp_path):
    for zipped in (True, False):
        file = {"model": random_state(FACEBOOK), "config": Config()}
        torch.save(file, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match=r"pickles test_official\.Config(.|\n)*weights_only=False"):
            load_encoder(str(tmp_path / "w.pth"))


@pytest.mark.parametrize(("layout", "eps"), [("moby", 1e-5), ("ibot", 1e-6), ("swin", 1e-5)])
def test_a_swin_of_any_origin_has_its_epsilon_and_report(tmp_path, layout, eps):
    trunk = tiny_swin(TokenSpec(cls=0)).swin
    state = official_names(trunk.state_dict()) | {"layers.0.blocks.0.attn.relative_position_index": torch.ones(16, 16)}
    other = {name: torch.zeros_like(value) for name, value in state.items()}
    heads = {"projector.linear1.weight": torch.ones(2), "queue1": torch.ones(3, 3)}
    files = {
        "moby": {"model": under("encoder.", state) | under("encoder_k.", other) | heads},
        "ibot": dino(state, other | {"masked_embed": torch.ones(1, 8)}),
        "swin": {"model": state | {"head.weight": torch.ones(2, 16)}},
    }
    torch.save(files[layout], tmp_path / "w.pth")
    loaded = load_encoder(str(tmp_path / "w.pth"))
    assert loaded.encoder.norm_eps == eps
    assert loaded.report.complete
    assert len(loaded.report.matched) == len(state) - 1
    found = loaded.encoder.swin.state_dict()
    assert all(torch.equal(found[name], value) for name, value in trunk.state_dict().items())
    torch.save({"model": state | {"layers.0.odd": torch.ones(2)}}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"unexpected: model.layers.0.odd \(2,\)"):
        load_encoder(str(tmp_path / "w.pth"))


@pytest.mark.parametrize("what", ["DINO", "MoCo v3", "MSN", "UDI"])
def test_training_starts_from_the_teacher_of_a_checkpoint(tmp_path, what):
    file, names, shape, options = TWO[what]
    state = random_state(names, **shape)
    torch.save(file(state, random_state(names, seed=1, **shape)), tmp_path / "w.pth")
    config = ViTConfig(patch_size=4, width=shape.get("width", 128), depth=DEPTH, heads=options["heads"])
    encoder = build(config, TokenSpec(cls_plus=shape.get("cls", 1) - 1), 16)
    load_weights(encoder, str(tmp_path / "w.pth"))
    encoder.eval().double()
    with torch.no_grad():
        found = encoder.as_timm(encoder(images()))
    torch.testing.assert_close(found, reading(state, images(), names, **options), rtol=0, atol=1e-10)


def test_heads_are_those_of_the_published_widths(tmp_path):
    for width, heads in ((192, 3), (1280, 16), (1536, 24)):  # ViT-Ti, MAE's ViT-H, DINOv2's ViT-g
        state = {k: v for k, v in random_state(FACEBOOK, width=width).items() if "blocks.1" not in k}
        torch.save(state, tmp_path / "w.pth")
        assert load_encoder(str(tmp_path / "w.pth")).encoder.heads == heads
    with pytest.raises(UserError, match="width 1536"):
        load_encoder(str(tmp_path / "w.pth"), heads=7)
