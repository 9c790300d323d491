"""ViTs of transformers: state dicts and folders, tokens against a plain reading over their names.

Names, values and files were compared once with transformers 5.23 itself (docs/encoders.md); it is no dependency.
"""

import json

import pytest
import torch
from official_layouts import (
    DEPTH,
    HF_DINOV2,
    HF_MEMORY,
    HF_SWIGLU,
    HF_VIT,
    random_state,
    reading,
    under,
)
from safetensors.torch import save_file

from triptych.encoders.load import load_encoder, load_weights
from triptych.encoders.vit_build import ViTConfig, build
from triptych.errors import UserError
from triptych.tokens import TokenSpec

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
MASK = {"embeddings.mask_token": torch.ones(1, 128)}
CLASSIFIER = {"classifier.weight": torch.ones(2, 128), "classifier.bias": torch.ones(2)}
POOLER = {"pooler.dense.weight": torch.ones(128, 128), "pooler.dense.bias": torch.ones(128)}
DECODER = {
    "decoder.mask_token": torch.ones(1, 1, 8),
    "decoder.decoder_pos_embed": torch.ones(1, 17, 8),
    "decoder.decoder_embed.weight": torch.ones(8, 128),
    "decoder.decoder_layers.0.attention.attention.query.weight": torch.ones(8, 8),
    "decoder.decoder_norm.bias": torch.ones(8),
    "decoder.decoder_pred.bias": torch.ones(48),
}
# class of transformers -> whole state dict, names, options of the state, ε, rule, mean and deviation without config
MODELS = {
    "ViTModel": (lambda s: s | POOLER, HF_VIT, {}, 1e-12, "size", HALF),
    "ViTModel without biases": (dict, HF_VIT, {"bias": False}, 1e-12, "size", HALF),
    "ViTForImageClassification": (lambda s: under("vit.", s) | CLASSIFIER, HF_VIT, {}, 1e-12, "size", HALF),
    "ViTModel in memory": (dict, HF_MEMORY, {}, 1e-12, "size", HALF),
    "ViTMAEForPreTraining": (lambda s: under("vit.", s) | DECODER, HF_VIT, {}, 1e-12, "size", IMAGENET),
    "Dinov2Model": (lambda s: s | MASK, HF_DINOV2, {"scale": True}, 1e-6, "size", IMAGENET),
    "Dinov2ForImageClassification": (
        lambda s: under("dinov2.", s | MASK) | CLASSIFIER,
        HF_DINOV2,
        {"scale": True},
        1e-6,
        "size",
        IMAGENET,
    ),
    "Dinov2Model, ViT-g": (lambda s: s | MASK, HF_SWIGLU, {"scale": True, "gated": True}, 1e-6, "size", IMAGENET),
    "Dinov2WithRegistersModel": (
        lambda s: s | MASK,
        HF_DINOV2,
        {"scale": True, "registers": 4},
        1e-6,
        "antialiased",
        IMAGENET,
    ),
}


def images(height=16, width=16):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def check(loaded, state, names, **options):
    encoder = loaded.encoder.double()
    for size in ((16, 16), (24, 24), (8, 12)):
        with torch.no_grad():
            found = encoder.as_timm(encoder(images(*size)))
        torch.testing.assert_close(found, reading(state, images(*size), names, **options), rtol=0, atol=1e-10)


@pytest.mark.parametrize("what", MODELS)
def test_a_state_dict_of_transformers_gives_the_tokens_of_its_architecture(tmp_path, what):
    whole, names, shape, eps, rule, colours = MODELS[what]
    state = random_state(names, **shape)
    save_file(whole(state), tmp_path / "w.safetensors")
    loaded = load_encoder(str(tmp_path / "w.safetensors"))
    check(loaded, state, names, heads=2, eps=eps, rule=rule)
    assert (loaded.mean, loaded.std) == colours
    assert loaded.report.complete
    assert len(loaded.report.matched) == len(state)
    assert len(loaded.report.ignored) == len(whole(state)) - len(state)


def folder(path, state, **config):
    path.mkdir(exist_ok=True)
    config = {"model_type": "vit", "num_attention_heads": 4, "layer_norm_eps": 1e-6, "hidden_act": "gelu"} | config
    (path / "config.json").write_text(json.dumps(config))
    torch.save(state, path / "pytorch_model.bin")
    return str(path)


@pytest.mark.parametrize("given", ["folder", "file"])
def test_a_folder_says_heads_epsilon_and_colours(tmp_path, given):
    state = random_state(HF_VIT)
    path = folder(tmp_path / "vit", state)
    path = path if given == "folder" else f"{path}/pytorch_model.bin"
    loaded = load_encoder(path)
    check(loaded, state, HF_VIT, heads=4, eps=1e-6, rule="size")
    assert loaded.mean == (0.5, 0.5, 0.5)
    said = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(said))
    loaded = load_encoder(path)
    assert (loaded.mean, loaded.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_msns_folder_has_imagenets_colours(tmp_path):
    loaded = load_encoder(folder(tmp_path / "msn", random_state(HF_VIT), model_type="vit_msn"))
    assert (loaded.mean, loaded.std) == IMAGENET
    assert loaded.encoder.norm_eps == 1e-6


def test_a_folder_of_something_else_says_so(tmp_path):
    state = random_state(HF_VIT)
    with pytest.raises(UserError, match=r"type swinv2.*dinov2"):
        load_encoder(folder(tmp_path / "a", state, model_type="swinv2"))
    with pytest.raises(UserError, match="activation quick_gelu"):
        load_encoder(folder(tmp_path / "a", state, hidden_act="quick_gelu"))
    path = folder(tmp_path / "b", state)
    (tmp_path / "b" / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        load_encoder(path)


def test_a_missing_query_is_reported(tmp_path):
    state = random_state(HF_VIT)
    del state["encoder.layer.1.attention.attention.query.weight"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"missing: blocks.1.attn.qkv.weight\n *unexpected: \S*attention.key.weight"):
        load_encoder(str(tmp_path / "w.pth"))


def test_training_starts_from_a_folder(tmp_path):
    state = random_state(HF_DINOV2, scale=True)
    path = folder(tmp_path / "v2", state | MASK, model_type="dinov2", num_attention_heads=2)
    config = ViTConfig(arch="vit_small_patch14_dinov2", patch_size=4, width=128, depth=DEPTH, heads=2)
    encoder = build(config, TokenSpec(), 16)
    load_weights(encoder, path)
    encoder.eval().double()
    with torch.no_grad():
        found = encoder.as_timm(encoder(images()))
    expected = reading(state, images(), HF_DINOV2, heads=2, eps=1e-6, rule="size")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
