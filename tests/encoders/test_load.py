"""Weights in and out: timm, DINO, UDI and Triptych files."""

import json
from functools import partial

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import SwiGLUPacked
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from conftest import timm_tokens, tiny_encoder
from triptych.encoders.load import Loaded, load_encoder, load_weights
from triptych.errors import UserError
from triptych.export import export
from triptych.tokens import TokenSpec


def vit(**options):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1, "num_classes": 0}
    model = VisionTransformer(**(sizes | options)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "options",
    [{}, {"init_values": 0.1}, {"reg_tokens": 4}, {"no_embed_class": True}, {"qkv_bias": False}, {"pre_norm": True}],
    ids=str,
)
def test_a_timm_state_dict_loads_and_gives_timms_tokens(tmp_path, options):
    model = vit(**options)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    loaded = load_encoder(str(tmp_path / "weights.safetensors"))
    with torch.no_grad():
        assert torch.equal(timm_tokens(loaded.encoder, IMAGES), model.forward_features(IMAGES))


def test_swiglu_of_timm_loads_and_survives_an_export(tmp_path):
    model = vit(mlp_layer=SwiGLUPacked, act_layer=nn.SiLU, mlp_ratio=5.5, init_values=0.1)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    loaded = load_encoder(str(tmp_path / "weights.safetensors"))
    export(loaded, tmp_path / "out")
    for encoder in (loaded.encoder, load_encoder(str(tmp_path / "out")).encoder):
        with torch.no_grad():
            assert torch.equal(timm_tokens(encoder, IMAGES), model.forward_features(IMAGES))


def test_timms_own_folder_loads_with_its_colours(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=5).eval()
    save_for_hf(model, tmp_path, model_args={"img_size": 32, "depth": 1})
    loaded = load_encoder(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(timm_tokens(loaded.encoder, IMAGES), model.forward_features(IMAGES))
    assert loaded.mean == (0.5, 0.5, 0.5)  # of timm's AugReg weights


def test_the_named_architecture_says_the_epsilon_of_timms_file(tmp_path):
    """CLIP's ViTs have 1e-5, which no name or shape shows."""
    sizes = {"embed_dim": 256, "num_heads": 4, "depth": 10, "patch_size": 16}
    model = vit(**sizes, pre_norm=True, norm_layer=partial(nn.LayerNorm, eps=1e-5))
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    named = load_encoder(str(tmp_path / "w.safetensors"), arch="vit_xsmall_patch16_clip_224").encoder
    assert named.norm_eps == 1e-5
    with torch.no_grad():
        assert torch.equal(timm_tokens(named, IMAGES), model.forward_features(IMAGES))


def test_heads_come_from_the_named_architecture(tmp_path):
    model = vit(embed_dim=192, num_heads=3, depth=12, patch_size=16)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    other = vit(embed_dim=192, num_heads=12)
    torch.save(other.state_dict(), tmp_path / "o.pth")
    with torch.no_grad():
        by_rule = load_encoder(str(tmp_path / "w.pth")).encoder
        assert torch.equal(timm_tokens(by_rule, IMAGES), model.forward_features(IMAGES))
        by_name = load_encoder(str(tmp_path / "o.pth"), heads=12).encoder
        assert torch.equal(timm_tokens(by_name, IMAGES), other.forward_features(IMAGES))
        named = load_encoder(str(tmp_path / "w.pth"), arch="vit_tiny_patch16_224").encoder
        assert named.heads == 3
    for arch, says in (("vit_small_patch16_224", "width 384"), ("vit_tiny_patch16_224", "depth 12")):
        with pytest.raises(UserError, match=says):  # the other file has two blocks of patches of 8 px
            load_encoder(str(tmp_path / "o.pth"), arch=arch)


def test_a_dino_checkpoint_gives_its_teacher(tmp_path):
    teacher, student = vit().state_dict(), vit(img_size=40).state_dict()
    file = {
        "student": {f"module.backbone.{k}": v for k, v in student.items()},
        "teacher": {f"backbone.{k}": v for k, v in teacher.items()} | {"head.mlp.0.weight": torch.ones(2, 2)},
        "epoch": 3,
    }
    torch.save(file, tmp_path / "dino.pth")
    loaded = load_encoder(str(tmp_path / "dino.pth"))
    assert torch.equal(loaded.encoder.vit.pos_embed, teacher["pos_embed"])


def test_checkpoints_of_mae_and_msn_give_the_encoder_without_decoder_and_head(tmp_path):
    """Under the names that these code bases write; the files themselves were not at hand."""
    mine, other = vit().state_dict(), vit(img_size=40).state_dict()
    decoder = {
        "mask_token": torch.ones(1, 1, 8),
        "decoder_pos_embed": torch.ones(1, 5, 8),
        "decoder_norm.bias": mine["norm.bias"],
    }
    head = {"module.fc.fc1.weight": torch.ones(2, 2)}
    files = {
        "mae": {"model": mine | decoder, "epoch": 3},
        "msn": {
            "encoder": {f"module.{k}": v for k, v in other.items()},
            "target_encoder": {f"module.{k}": v for k, v in mine.items()} | head,
            "prototypes": torch.ones(2, 2),
        },
    }
    for name, file in files.items():
        torch.save(file, tmp_path / f"{name}.pth")
        encoder = load_encoder(str(tmp_path / f"{name}.pth")).encoder
        found = encoder.vit.state_dict()
        assert found.keys() == mine.keys()
        assert all(torch.equal(found[k], mine[k]) for k in mine)


def test_a_released_udi_checkpoint_gives_class_and_class_plus(tmp_path):
    state = vit(reg_tokens=1).state_dict()
    expected = state["reg_token"].clone()
    released = {k: v for k, v in state.items() if k != "reg_token"}
    released["cls_token"] = torch.cat([state["cls_token"], state["reg_token"]], 1)
    torch.save({"teacher": {f"module.backbone.{k}": v for k, v in released.items()}}, tmp_path / "udi.pth")
    encoder = load_encoder(str(tmp_path / "udi.pth")).encoder
    assert encoder.spec == TokenSpec(cls=1, cls_plus=1)
    assert torch.equal(encoder.vit.reg_token, expected)
    assert encoder(IMAGES).cls_plus.shape == (2, 64)


def test_dinov2_registers_without_positions_load(tmp_path):
    state = vit(reg_tokens=4).state_dict()
    state["register_tokens"] = state.pop("reg_token")
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], state["pos_embed"][:, 5:]], 1)
    torch.save(state, tmp_path / "v2.pth")
    encoder = load_encoder(str(tmp_path / "v2.pth")).encoder
    assert encoder.spec.register == 4
    assert (encoder.vit.pos_embed[:, 1:5] == 0).all()


def test_training_can_start_from_weights_of_another_grid_and_adds_class_plus(tmp_path):
    model = vit(img_size=48)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    encoder = tiny_encoder(TokenSpec(cls_plus=1), image=32, patch=8, width=64, heads=1)
    fresh = encoder.vit.reg_token.clone()
    load_weights(encoder, str(tmp_path / "w.pth"))
    assert torch.equal(encoder.vit.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)
    assert torch.equal(encoder.vit.cls_token, model.cls_token)
    assert torch.equal(encoder.vit.pos_embed[:, 0], model.pos_embed[:, 0])
    assert torch.equal(encoder.vit.reg_token, fresh)
    with pytest.raises(UserError, match="does not fit"):
        load_weights(tiny_encoder(TokenSpec(), image=32, patch=8, width=48), str(tmp_path / "w.pth"))


def test_unusable_files_and_names_say_so(tmp_path):
    with pytest.raises(UserError, match=r"did you mean.*vit_tiny_patch16_224"):
        load_encoder("vit_tiny_patch16_22")
    (tmp_path / "w.pth").write_bytes(b"no weights")
    with pytest.raises(UserError, match="not a file of weights"):
        load_encoder(str(tmp_path / "w.pth"))
    torch.save({"conv1.weight": torch.ones(2)}, tmp_path / "resnet.pth")
    with pytest.raises(UserError, match="plain ViT"):
        load_encoder(str(tmp_path / "resnet.pth"))


class Malicious:
    def __reduce__(self):
        return (open, ("/nonexistent", "w"))


def test_files_are_never_unpickled_blindly(tmp_path):
    torch.save({"teacher": Malicious()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="safely"):
        load_encoder(str(tmp_path / "evil.pth"))


@pytest.mark.parametrize(
    "spec", [TokenSpec(), TokenSpec(cls_plus=1), TokenSpec(cls_plus=1, register=2, aux=3, mask=True)]
)
def test_an_export_gives_timm_the_same_tokens_in_a_fresh_process(tmp_path, spec):
    torch.manual_seed(3)
    encoder = tiny_encoder(spec, image=16, patch=4).eval()
    out = tmp_path / "encoder"
    assert export(Loaded(encoder, "test", 16), out) <= 1e-6
    again = load_encoder(str(out))
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(timm_tokens(again.encoder, images), timm_tokens(encoder, images))
        model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()  # strict: every key must match
        assert torch.allclose(model.forward_features(images), timm_tokens(encoder, images), atol=1e-6)
    assert again.encoder.spec == TokenSpec(cls=1, cls_plus=spec.cls_plus, register=spec.register)
    assert json.loads((out / "config.json").read_text())["pretrained_cfg"]["input_size"] == [3, 16, 16]
    assert "largest difference" in (out / "README.md").read_text()
    with pytest.raises(UserError, match="not empty"):
        export(Loaded(encoder, "test", 16), out)
