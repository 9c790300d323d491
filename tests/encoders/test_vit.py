"""The encoder: timm's tokens, the authors' numbers, roles, private tokens."""

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from conftest import timm_name, timm_tokens, tiny_encoder
from triptych.encoders.vit import ViT
from triptych.encoders.vit_build import ViTConfig, build
from triptych.encoders.vit_init import sincos_table
from triptych.errors import UserError
from triptych.tokens import TokenSpec


def filled(vit: VisionTransformer) -> VisionTransformer:
    torch.manual_seed(1)
    for p in vit.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return vit.eval()


@pytest.mark.parametrize(
    "arch",
    [
        "vit_tiny_patch16_224",
        "deit3_small_patch16_224",  # layer scale, positions for patches only
        "vit_small_patch14_reg4_dinov2",  # registers
        "vit_base_patch16_clip_224",  # norm before the blocks
        "vit_base_patch16_siglip_224",  # no class token
    ],
)
def test_any_plain_timm_vit_gives_timms_tokens(arch):
    vit = filled(timm.create_model(arch, pretrained=False, num_classes=0, depth=2, embed_dim=48, num_heads=3))
    spec = TokenSpec(cls=int(vit.has_class_token), register=vit.num_reg_tokens)
    images = torch.randn(2, 3, *vit.patch_embed.img_size)
    with torch.no_grad():
        assert torch.equal(timm_tokens(ViT(vit, spec), images), vit.forward_features(images))


def test_other_grids_resample_positions_as_timm_does():
    options = {"img_size": 48, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
    vit = filled(VisionTransformer(**options, dynamic_img_size=True))
    fixed = VisionTransformer(**options).eval()
    fixed.load_state_dict(vit.state_dict())
    for size in ((48, 48), (24, 24), (40, 72)):
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            assert torch.equal(timm_tokens(ViT(fixed, TokenSpec()), images), vit.forward_features(images))


def test_models_that_are_not_plain_vits_are_refused():
    vit = VisionTransformer(img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=3)
    vit.blocks[0] = torch.nn.Identity()
    with pytest.raises(UserError, match="not a plain ViT"):
        ViT(vit, TokenSpec())


@pytest.mark.parametrize("case", ["native", "small", "rect", "big"])
def test_dino_encoder_equals_the_authors(golden, case):
    g = golden("dino_vit")
    encoder = tiny_encoder(TokenSpec(), positions="dino").double()
    encoder.vit.load_state_dict({timm_name(k[6:]): v for k, v in g.items() if k.startswith("param.")})
    images = g[f"{case}.image"].clone().requires_grad_()
    for block, tokens in enumerate(encoder.layers(images, [0, 1])):
        ours = torch.cat([tokens.cls[:, None], tokens.patch], 1)
        torch.testing.assert_close(ours, g[f"{case}.block{block}_normed"], rtol=0, atol=1e-12)
    cls = encoder(images).cls
    torch.testing.assert_close(cls, g[f"{case}.cls_out"], rtol=0, atol=1e-12)
    cls.backward(g[f"{case}.cotangent"])
    torch.testing.assert_close(images.grad, g[f"{case}.grad.image"], rtol=0, atol=1e-12)
    attention = encoder.last_attention(images)
    torch.testing.assert_close(attention, g[f"{case}.last_attention"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", ["global", "local", "rect"])
def test_udi_encoder_with_two_class_tokens_equals_the_authors(golden, case):
    g = golden("udi_encoder")
    encoder = tiny_encoder(TokenSpec(cls_plus=1), image=28, positions="dino").double()
    state = {timm_name(k[6:]): v for k, v in g.items() if k.startswith("param.")}
    state["cls_token"], state["reg_token"] = state["cls_token"].split(1, 1)
    encoder.vit.load_state_dict(state)
    images = g[f"{case}.image"].clone().requires_grad_()
    x = encoder(images)
    torch.testing.assert_close(torch.stack([x.cls, x.cls_plus], 1), g[f"{case}.cls_out"], rtol=0, atol=1e-12)
    torch.testing.assert_close(x.patch, g[f"{case}.tokens_out_norm"][:, 2:], rtol=0, atol=1e-12)
    torch.testing.assert_close(x.patch_raw, g[f"{case}.tokens_out_prenorm"][:, 2:], rtol=0, atol=1e-12)
    torch.testing.assert_close(encoder.last_attention(images), g[f"{case}.last_attn"], rtol=0, atol=1e-12)
    x.patch_raw.backward(g[f"{case}.cotangent_prenorm"][:, 2:])
    patches_only = images.grad.clone()
    assert patches_only.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [16, 8, 24])
def test_auxiliary_tokens_can_be_dropped_without_changing_one_bit(dtype, size):
    encoder = tiny_encoder(TokenSpec(cls_plus=1, aux=4)).to(dtype).eval()
    images = torch.randn(3, 3, size, size, dtype=dtype)
    with torch.no_grad():
        plain = encoder.without("aux")(images)
        encoder.aux_tokens.fill_(float("nan"))  # nothing of them may reach a token that is kept
        x = encoder(images)
    assert torch.equal(x.cls, plain.cls)
    assert torch.equal(x.cls_plus, plain.cls_plus)
    assert torch.equal(x.patch, plain.patch)
    assert plain.aux is None
    assert x.aux.isnan().all()


def test_auxiliary_tokens_see_all_tokens_and_each_other():
    encoder = tiny_encoder(TokenSpec(aux=2)).double()
    images = torch.randn(1, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    (encoder(images).aux[:, 0] * torch.randn(12, dtype=torch.float64)).sum().backward()
    assert (images.grad != 0).any()
    assert (encoder.aux_tokens.grad[:, 1] != 0).any()
    assert (encoder.vit.cls_token.grad != 0).any()


def test_masked_patches_are_replaced_before_positions_are_added():
    encoder = tiny_encoder(TokenSpec(mask=True)).eval()
    images, mask = torch.randn(2, 3, 16, 16), torch.zeros(2, 16, dtype=torch.bool)
    mask[:, 3] = True
    other = images.clone()
    other[:, :, 0:4, 12:16] += 1  # the pixels of patch 3
    with torch.no_grad():
        assert not torch.equal(encoder(images).cls, encoder(other).cls)
        assert torch.equal(encoder(images, mask=mask).cls, encoder(other, mask=mask).cls)


def test_dropped_patches_do_not_enter_and_leave_no_grid():
    encoder = tiny_encoder(TokenSpec()).eval()
    images, keep = torch.randn(2, 3, 16, 16), torch.tensor([[0, 5], [1, 9]])
    with torch.no_grad():
        x = encoder(images, keep=keep)
    assert x.patch.shape[1] == 2
    assert x.grid is None


def test_build_says_what_is_wrong():
    with pytest.raises(UserError, match=r"did you mean.*vit_small_patch16_224"):
        build(ViTConfig(arch="vit_smal_patch16_224"), TokenSpec())
    with pytest.raises(UserError, match="patches of 8 px"):
        build(ViTConfig(arch="vit_tiny_patch16_224", patch_size=8, depth=1), TokenSpec()).grid(20, 24)
    with pytest.raises(UserError, match="timm cannot build"):
        build(ViTConfig(arch="vit_tiny_patch16_224", width=100, heads=3), TokenSpec())


def test_the_teacher_has_no_stochastic_depth():
    from triptych.methods import DINOConfig
    from triptych.methods.dino import DINO

    encoder = tiny_encoder(TokenSpec(), drop_path=0.5)
    method = DINO(encoder, DINOConfig(hidden=8, embedding=4, prototypes=8))
    images = torch.randn(8, 3, 16, 16)
    assert torch.equal(method.teacher.encoder(images).cls, method.teacher.encoder(images).cls)
    assert not torch.equal(method.student.encoder(images).cls, method.student.encoder(images).cls)


@pytest.mark.parametrize("case", ["g14_d32", "g3x5_d16"])
def test_sine_cosine_positions_equal_the_authors_of_moco_v3(golden, case):
    expected = golden("mocov3_sincos")[case]
    # On 3 rows x 5 columns the released code walks column by column: its table is that of the transposed grid.
    grid = (14, 14) if case.startswith("g14") else (5, 3)
    assert not expected[0].any()  # the class token's slot
    torch.testing.assert_close(sincos_table(grid, expected.shape[1]), expected[1:].double(), rtol=0, atol=1e-6)


def test_moco_v3_encoders_train_neither_positions_nor_the_patch_projection():
    config = ViTConfig(
        patch_size=4, width=16, depth=1, heads=2, init="mocov3", position_table="sincos", freeze_patches=True
    )
    encoder = build(config, TokenSpec(aux=2), 16)
    fixed = {name for name, p in encoder.named_parameters() if not p.requires_grad}
    assert fixed == {"vit.pos_embed", "vit.patch_embed.proj.weight", "vit.patch_embed.proj.bias"}
    assert torch.equal(encoder.vit.pos_embed[0, 1:], sincos_table((4, 4), 16).float())
    assert encoder.vit.cls_token.std() < 1e-5 < encoder.aux_tokens.std()  # or the auxiliary tokens would be copies
