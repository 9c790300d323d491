"""Swin: timm's tokens, the authors' numbers, any size, masks, files."""

import json

import pytest
import timm
import torch
from pydantic import TypeAdapter
from timm.models.swin_transformer import SwinTransformer

from triptych.encoders import EncoderConfig, Swin, SwinConfig, ViTConfig, build
from triptych.encoders.load import Loaded, load_encoder, load_weights
from triptych.encoders.load_swin import official_names
from triptych.encoders.swin import init_encoder, set_norm_eps
from triptych.encoders.windows import shift_mask
from triptych.errors import UserError
from triptych.export import card, export
from triptych.tokens import TokenSpec

NO_CLS = TokenSpec(cls=0)
TINY = {"patch_size": 2, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4), "mlp_ratio": 2, "num_classes": 0}


def filled(swin: SwinTransformer) -> SwinTransformer:
    torch.manual_seed(1)
    for p in swin.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return swin.eval()


def tiny_swin(spec: TokenSpec = NO_CLS, *, image=32, window=4, **options) -> Swin:
    """Two stages of two blocks; the final patches have 4 px."""
    encoder = Swin(SwinTransformer(**(TINY | {"img_size": image, "window_size": window} | options)), spec)
    init_encoder(encoder)
    return encoder.eval()


LEAF = {"w": "weight", "b": "bias"}
PART = {"ln1": "norm1", "ln2": "norm2", "qkv": "attn.qkv", "attn_out": "attn.proj", "mlp_in": "mlp.fc1"}
PART |= {"mlp_out": "mlp.fc2", "patch": "patch_embed.proj", "patch_ln": "patch_embed.norm", "ln_out": "norm"}


def official_name(golden_name: str) -> str:
    """'stage0.block1.ln1.w' -> the official 'layers.0.blocks.1.norm1.weight'; merging ends a stage there."""
    *where, last = golden_name.replace("stage", "layers.").replace("block", "blocks.").split(".")
    if last == "rel_bias":
        return ".".join([*where, "attn.relative_position_bias_table"])
    if "merge" in where:
        return ".".join(["downsample" if w == "merge" else w for w in where] + [LEAF[last]])
    return ".".join([*where[:-1], PART[where[-1]], LEAF[last]])


def of_golden(g: dict, tmp_path, spec: TokenSpec = NO_CLS) -> Swin:
    """The authors' weights, read from a file in their own layout as a user's would be."""
    state = {official_name(k[6:]): v for k, v in g.items() if k.startswith("param.") and k != "param.mask_token"}
    torch.save({"model": state}, tmp_path / "official.pth")
    encoder = tiny_swin(spec).double()
    load_weights(encoder, str(tmp_path / "official.pth"))
    set_norm_eps(encoder.swin, g["cfg.ln_eps"].item())
    return encoder


def exactly(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"img_size": 224, "window_size": 7, "depths": (2, 2, 2, 2)},  # published: the last stage is one window
        {"img_size": 64, "window_size": (4, 4, 8, 2), "depths": (1, 2, 2, 1)},  # S3: a window per stage
        {"img_size": (64, 128), "window_size": 4, "depths": (2, 2, 2, 1)},
        {"img_size": 64, "window_size": 2, "depths": (2, 1, 1, 2), "qkv_bias": False, "always_partition": True},
    ],
    ids=["w7", "s3", "rect", "partition"],
)
def test_at_its_native_size_a_timm_swin_gives_timms_tokens(options):
    swin = filled(SwinTransformer(**{"embed_dim": 12, "num_heads": (1, 2, 3, 4), "num_classes": 0} | options))
    encoder, images = Swin(swin, NO_CLS), torch.randn(2, 3, *swin.patch_embed.img_size)
    with torch.no_grad():
        assert torch.equal(encoder.as_timm(encoder(images)), swin.forward_features(images))


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (32, 96), (16, 48)])
def test_at_other_sizes_that_windows_tile_tokens_are_timms_with_the_same_windows_and_shifts(size):
    swin = filled(SwinTransformer(**TINY, img_size=32, window_size=4, strict_img_size=False))
    encoder, images = Swin(swin, NO_CLS), torch.randn(2, 3, *size)
    with torch.no_grad():
        assert torch.equal(encoder.as_timm(encoder(images)), swin.forward_features(images))


def test_ibots_swin_equals_the_authors(golden, tmp_path):
    g = golden("ibot_swin")
    encoder = of_golden(g, tmp_path, TokenSpec(cls=0, mask=True))
    encoder.mask_token.data = g["param.mask_token"][None]
    images = g["image"].clone().requires_grad_()
    x = encoder(images, mask=g["mask"].repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1))
    tokens = torch.cat([x.global_token[:, None], x.patch], 1)
    exactly(tokens, g["tokens"])
    tokens.backward(g["cotangent"])
    exactly(images.grad, g["grad.image"])
    x = encoder(g["image"])
    exactly(torch.cat([x.global_token[:, None], x.patch], 1), g["tokens_unmasked"])
    exactly(x.global_token, g["gap_unmasked"])
    index = encoder.swin.layers[0].blocks[0].attn.relative_position_index
    assert torch.equal(index, g["relative_position_index"])


def test_sizes_that_windows_do_not_tile_are_padded_as_ibot_pads_them(golden, tmp_path):
    g = golden("ibot_swin")
    x = of_golden(g, tmp_path)(g["padded.image"])  # 10x10, then 5x5 tokens; windows of 4
    exactly(torch.cat([x.global_token[:, None], x.patch], 1), g["padded.tokens"])


def test_mobys_swin_equals_the_authors(golden, tmp_path):
    g = golden("moby_swin")
    encoder, images = of_golden(g, tmp_path), g["image"].clone().requires_grad_()
    out = encoder(images).global_token
    exactly(out, g["out"])
    out.backward(g["cotangent"])
    exactly(images.grad, g["grad.image"])
    mask = shift_mask((16, 16), (4, 4), (2, 2), torch.device("cpu"))
    assert torch.equal(mask.double(), g["shift_mask_stage0_block1"])


@pytest.mark.parametrize(("grid", "window", "shift"), [((8, 12), (4, 4), (2, 2)), ((4, 6), (2, 3), (1, 0))])
def test_after_a_shift_tokens_attend_to_those_that_were_near_before(grid, window, shift):
    mask = shift_mask(grid, window, shift, torch.device("cpu"))
    for i in range(grid[0] // window[0]):
        for j in range(grid[1] // window[1]):
            places = [
                ((i * window[0] + a + shift[0]) % grid[0], (j * window[1] + b + shift[1]) % grid[1])
                for a in range(window[0])
                for b in range(window[1])
            ]  # where each token of the window was before the shift
            for p, (y, x) in enumerate(places):
                for q, (v, u) in enumerate(places):
                    near = abs(y - v) < window[0] and abs(x - u) < window[1]
                    assert (mask[i * (grid[1] // window[1]) + j, p, q] == 0) == near


@pytest.mark.parametrize("size", [(4, 4), (8, 20), (12, 12), (28, 28), (36, 60), (64, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_size_that_divides_into_final_patches_works(size, dtype):
    x = tiny_swin().to(dtype)(torch.randn(2, 3, *size, dtype=dtype))
    assert x.grid == (size[0] // 4, size[1] // 4)
    assert x.patch.shape == (2, x.grid[0] * x.grid[1], 16)
    assert x.patch.dtype == dtype
    assert x.patch.isfinite().all()
    assert x.cls is None
    assert torch.equal(x.global_token, x.patch.mean(1))


def test_sizes_that_do_not_divide_say_so():
    with pytest.raises(UserError, match="patches of 4 px"):
        tiny_swin()(torch.zeros(1, 3, 32, 30))


@pytest.mark.parametrize("size", [(32, 32), (20, 12)])
def test_pixels_under_the_mask_do_not_matter_and_all_others_do(size):
    encoder = tiny_swin(TokenSpec(cls=0, mask=True))
    images, (rows, columns) = torch.randn(2, 3, *size), encoder.grid(*size)
    mask = torch.rand(2, rows * columns, generator=torch.Generator().manual_seed(0)) < 0.5
    hidden = mask.unflatten(1, (rows, columns)).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    with torch.no_grad():
        masked = encoder(images, mask=mask).patch
        assert torch.equal(masked, encoder(torch.where(hidden, images + 1, images), mask=mask).patch)
        assert not torch.equal(masked, encoder(torch.where(hidden, images, images + 1), mask=mask).patch)
        assert not torch.equal(masked, encoder(images).patch)
        assert torch.equal(encoder(images, mask=torch.zeros_like(mask)).patch, encoder(images).patch)


def test_masked_patches_change_only_the_windows_they_reach():
    encoder = tiny_swin(TokenSpec(cls=0, mask=True), depths=(1, 1))  # no shifts; windows of 4x4 final tokens
    images, mask = torch.randn(1, 3, 32, 32), torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, 1, 2] = True
    with torch.no_grad():
        changed = (encoder(images, mask=mask.flatten(1)).patch != encoder(images).patch).any(-1).unflatten(1, (8, 8))
    assert changed[:, :4, :4].all()
    changed[:, :4, :4] = False
    assert not changed.any()


def test_blocks_of_earlier_stages_give_their_own_grid_and_width_without_the_final_norm():
    encoder = tiny_swin()
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        taps = encoder.layers(images, [-1, 0, 1, 2])
        last = encoder(images)
    assert [t.grid for t in taps] == [(8, 12), (16, 24), (16, 24), (8, 12)]
    assert [t.patch.shape[-1] for t in taps] == [16, 8, 8, 16]
    assert torch.equal(taps[0].patch, last.patch)
    for t in (taps[0], taps[3]):  # iBOT's linear protocol norms every block of the last stage
        assert torch.equal(t.patch, encoder.swin.norm(t.patch_raw))
    assert torch.equal(taps[1].patch, taps[1].patch_raw)


def test_training_works_after_features_were_extracted_in_inference_mode():
    shift_mask.cache_clear()
    encoder, images = tiny_swin(), torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        encoder(images)
    encoder(images).global_token.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


SMALL = SwinConfig(width=12, depths=(1, 1, 2, 1), heads=(1, 2, 3, 4), window_size=4)


def test_build_gives_what_the_config_says():
    config = SMALL.model_copy(update={"norm_eps": 1e-6, "drop_path": 0.4})
    encoder = build(config, TokenSpec(cls=1, mask=True), 128)
    assert isinstance(encoder, Swin)
    assert encoder.spec == TokenSpec(cls=0, mask=True)
    assert (encoder.width, encoder.depth, encoder.heads, encoder.patch_size) == (96, 5, 4, 32)
    assert encoder.native_size == (128, 128)
    assert {m.eps for m in encoder.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}
    rates = [getattr(b.drop_path1, "drop_prob", 0.0) for s in encoder.swin.layers for b in s.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert encoder.mask_token.shape == (1, 1, 12)
    assert (encoder.mask_token == 0).all()
    assert encoder.without("mask").mask_token is None
    fc1 = encoder.swin.layers[3].blocks[0].mlp.fc1
    assert fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    xavier = build(SMALL.model_copy(update={"init": "xavier"}), NO_CLS, 128).swin.layers[3].blocks[0].mlp.fc1
    assert xavier.weight.abs().max().item() == pytest.approx((6 / (96 + 384)) ** 0.5, rel=0.01)
    same = TypeAdapter(EncoderConfig)
    assert same.validate_python({"name": "swin"}) == SwinConfig()
    assert same.validate_python({"name": "vit"}) == ViTConfig()


@pytest.mark.parametrize(
    ("config", "spec", "message"),
    [
        ({}, TokenSpec(aux=4), "--method.aux 0"),
        ({}, TokenSpec(cls_plus=1), "UDI"),
        ({}, TokenSpec(register=2), "registers"),
        ({"arch": "swin_tny_patch4_window7_224"}, NO_CLS, r"did you mean.*swin_tiny_patch4_window7_224"),
        ({"arch": "vit_tiny_patch16_224"}, NO_CLS, "no Swin"),
        ({"window_size": 7, "image_size": 96}, NO_CLS, "window_size 3 or 6 or 12 or 24, or another"),
        ({"image_size": 100}, NO_CLS, "multiples of 32"),
        ({"heads": (5, 2, 3, 4)}, NO_CLS, "5 does not divide"),
        ({"heads": (1, 2)}, NO_CLS, "timm cannot build"),
    ],
    ids=str,
)
def test_build_says_what_is_wrong(config, spec, message):
    with pytest.raises(UserError, match=message):
        build(SMALL.model_copy(update=config), spec, 128)


def test_patches_cannot_be_dropped():
    with pytest.raises(UserError, match="cannot leave out patches"):
        tiny_swin()(torch.zeros(1, 3, 32, 32), keep=torch.zeros(1, 3, dtype=torch.int64))


def test_models_that_are_not_swins_are_refused():
    with pytest.raises(UserError, match="not a Swin"):
        Swin(timm.create_model("swinv2_tiny_window8_256", pretrained=False, embed_dim=6, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)), NO_CLS)  # fmt: skip


def assert_same_tokens(a: Swin, b: Swin, size=32):
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(a(images).patch, b(images).patch)


@pytest.mark.parametrize("layout", ["timm", "official", "moby", "ibot"])
def test_a_bare_state_dict_of_any_layout_loads(tmp_path, layout):
    encoder = tiny_swin(image=16)  # the last stage is one window
    if layout == "ibot":
        set_norm_eps(encoder.swin, 1e-6)
    state = encoder.swin.state_dict()
    if layout != "timm":
        state = official_names(state)
        state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.int64)
        state["head.weight"] = torch.ones(5, 16)
    if layout == "moby":
        other = {f"encoder_k.{k}": torch.zeros_like(v) for k, v in state.items()}
        state = other | {f"encoder.{k}": v for k, v in state.items()} | {"queue1": torch.ones(3, 3)}
    if layout == "ibot":
        student = {f"module.backbone.{k}": torch.zeros_like(v) for k, v in state.items()}
        teacher = {f"backbone.{k}": v for k, v in state.items()} | {"head.mlp.0.weight": torch.ones(2, 2)}
        torch.save({"student": student, "teacher": teacher, "epoch": 3}, tmp_path / "w.pth")
    else:
        torch.save({"model": state}, tmp_path / "w.pth")
    loaded = load_encoder(str(tmp_path / "w.pth"))
    assert loaded.size == 16
    assert_same_tokens(loaded.encoder, encoder)


def test_shift_masks_in_a_file_tell_the_size_it_was_trained_at(tmp_path):
    encoder = tiny_swin(image=48)
    state = official_names(encoder.swin.state_dict())
    for stage in (0, 1):
        block = encoder.swin.layers[stage].blocks[1]
        state[f"layers.{stage}.blocks.1.attn_mask"] = block.get_attn_mask()
    torch.save(state, tmp_path / "w.pth")
    loaded = load_encoder(str(tmp_path / "w.pth"))
    assert loaded.size == 48
    assert_same_tokens(loaded.encoder, encoder)


def test_training_can_start_from_weights_of_another_window(tmp_path):
    source, encoder = tiny_swin(window=4), tiny_swin(TokenSpec(cls=0, mask=True), window=8)
    torch.save(source.swin.state_dict(), tmp_path / "w.pth")
    load_weights(encoder, str(tmp_path / "w.pth"))
    theirs, ours = (e.swin.layers[1].blocks[1] for e in (source, encoder))
    assert torch.equal(ours.mlp.fc1.weight, theirs.mlp.fc1.weight)
    table = ours.attn.relative_position_bias_table.unflatten(0, (15, 15))
    small = theirs.attn.relative_position_bias_table.unflatten(0, (7, 7))
    torch.testing.assert_close(table[7, 7], small[3, 3], rtol=0.2, atol=2e-3)  # the offset (0, 0) stays in the middle
    with pytest.raises(UserError, match="does not fit"):
        load_weights(tiny_swin(depths=(2, 1)), str(tmp_path / "w.pth"))
    vit = build(ViTConfig(arch="vit_tiny_patch16_224", depth=1, width=24), TokenSpec(), 32)
    with pytest.raises(UserError, match="holds a Swin, the encoder is a ViT"):
        load_weights(vit, str(tmp_path / "w.pth"))
    torch.save(vit.trunk.state_dict(), tmp_path / "v.pth")
    with pytest.raises(UserError, match="holds a ViT, the encoder is a Swin"):
        load_weights(encoder, str(tmp_path / "v.pth"))


def test_files_and_names_that_cannot_serve_say_so(tmp_path):
    state = tiny_swin().swin.state_dict()
    torch.save(state | {"absolute_pos_embed": torch.zeros(1, 4, 8)}, tmp_path / "ape.pth")
    with pytest.raises(UserError, match="absolute positions"):
        load_encoder(str(tmp_path / "ape.pth"))
    torch.save({k: v for k, v in state.items() if k != "norm.weight"}, tmp_path / "part.pth")
    with pytest.raises(UserError, match="not the state dict of a Swin"):
        load_encoder(str(tmp_path / "part.pth"))
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match="may name a Swin only"):
        load_encoder(str(tmp_path / "w.pth"), arch="vit_tiny_patch16_224")


def test_an_export_gives_timm_the_same_tokens_in_a_fresh_process(tmp_path):
    encoder, out = tiny_swin(TokenSpec(cls=0, mask=True)), tmp_path / "encoder"
    set_norm_eps(encoder.swin, 1e-6)
    assert export(Loaded(encoder, "test", 32), out) <= 1e-6
    again = load_encoder(str(out))
    assert again.encoder.spec == NO_CLS
    assert again.encoder.norm_eps == 1e-6
    assert_same_tokens(again.encoder, encoder)
    assert_same_tokens(again.encoder, encoder, 20)
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()  # strict: every key must match
    set_norm_eps(model, 1e-6)
    images = torch.randn(2, 3, 64, 64)  # another size that windows tile
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(images), encoder.as_timm(encoder(images)), rtol=0, atol=1e-6)
    assert "positions" not in json.loads((out / "config.json").read_text())["triptych"]
    text = (out / "README.md").read_text()
    assert "module.eps = 1e-06" in text
    assert "A Swin transformer" in text
    assert "no class token" in text
    assert "Positions" not in text
    assert "module.eps" not in card(tiny_swin(), Loaded(encoder, "test", 32), 32, 0.0)  # timm's own ε needs no line


def test_a_timm_name_gives_a_swin():
    loaded = load_encoder("swin_tiny_patch4_window7_224", weights="untrained")
    assert isinstance(loaded.encoder, Swin)
    assert (loaded.size, loaded.encoder.width, loaded.encoder.depth) == (224, 768, 12)
