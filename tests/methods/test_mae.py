"""MAE: the equation as loops, and the numbers of the authors' code (facebookresearch/mae efb2a80)."""

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from toy import assert_all_close, grads, group

from conftest import random_views, timm_name, tiny_encoder
from triptych.data.masks import draw_keep
from triptych.data.views import View, Views
from triptych.encoders import ViTConfig
from triptych.encoders import build as build_encoder
from triptych.encoders.vit_init import sincos_table
from triptych.methods import MAEConfig, MTEConfig, build
from triptych.methods.mae import MAE, patchify, unpatchify
from triptych.optim import OptimConfig, make_optimizer, set_rates
from triptych.schedules import Progress
from triptych.tokens import TokenSpec

SMALL = {"decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2}
T0 = Progress(0, 10)


def make(config=None, **sizes) -> MAE:
    torch.manual_seed(0)
    return build(tiny_encoder(TokenSpec(), **sizes), config or MAEConfig(**SMALL)).double()


def kept(noise, n):
    """The authors' choice, in their order: that of the noise."""
    return noise.argsort(1)[:, :n]


def views_of(images, keep) -> Views:
    return Views([View(images, torch.zeros(len(images), 4), torch.ones(len(images), 2), keep=keep)], [])


@pytest.mark.parametrize("norm_pixels", [False, True])
def test_the_loss_is_the_equation_written_as_loops(norm_pixels):
    method, view = make(MAEConfig(norm_pixels=norm_pixels, **SMALL)), random_views(3).global_crops[0]
    tokens = method.encoder(view.images, keep=view.keep)
    pixels = method.decoder(tokens.cls, tokens.patch, view.keep, (4, 4))
    total = count = 0.0
    for b in range(3):
        for i in set(range(16)) - set(view.keep[b].tolist()):
            row, column = divmod(i, 4)
            patch = view.images[b, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            mean, variance = patch.mean(), ((patch - patch.mean()) ** 2).sum() / 47  # unbiased
            error = 0.0
            for y in range(4):
                for x in range(4):
                    for c in range(3):
                        target = (patch[c, y, x] - mean) / (variance + 1e-6) ** 0.5 if norm_pixels else patch[c, y, x]
                        error += (pixels[b, i, (4 * y + x) * 3 + c] - target) ** 2 / 48
            total, count = total + error, count + 1
    out = method(Views([view], []), T0)
    torch.testing.assert_close(out.loss, total / count, rtol=0, atol=1e-12)
    assert out.terms == {"pixels": out.loss}


def test_patches_and_back_equal_the_authors(golden):
    g = golden("mae_patchify")
    assert torch.equal(patchify(g["image"], int(g["patch_size"])), g["patches"])
    assert torch.equal(unpatchify(g["patches"], (4, 4)), g["roundtrip"])


def test_unpatchify_inverts_patchify_on_any_grid():
    images = torch.randn(2, 3, 12, 20)
    patches = patchify(images, 4)
    assert patches.shape == (2, 15, 48)
    assert torch.equal(patches[:, 6], images[:, :, 4:8, 4:8].permute(0, 2, 3, 1).flatten(1))  # row 1, column 1
    assert torch.equal(unpatchify(patches, (3, 5)), images)


@pytest.mark.parametrize("case", ["c0", "c1"])
def test_error_and_gradient_equal_the_authors(golden, case):
    g = {k[3:]: v for k, v in golden("mae_loss").items() if k.startswith(case)}
    method = make(MAEConfig(norm_pixels=bool(g["normalise_target"]), **SMALL), patch=int(g["patch_size"]), image=32)
    # Their masks keep more patches of one image than of the other: the shorter list names its last one again.
    rows = [(row == 0).nonzero()[:, 0] for row in g["mask_removed1"]]
    longest = max(map(len, rows))
    keep = torch.stack([torch.cat([row, row[-1:].expand(longest - len(row))]) for row in rows])
    pred = g["pred"].clone().requires_grad_()
    loss = method.error(pred, g["image"], keep)
    loss.backward()
    torch.testing.assert_close(loss, g["loss"], rtol=0, atol=1e-12)
    torch.testing.assert_close(pred.grad, g["grad_pred"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", ["c0", "c1", "c2", "c3"])
def test_as_many_patches_stay_as_the_authors_keep_and_each_goes_back_to_its_place(golden, case):
    g = {k[3:]: v for k, v in golden("mae_masking").items() if k.startswith(case)}
    (images, patches, _), n = g["tokens"].shape, int(g["num_keep"])
    drawn = draw_keep(patches, float(g["ratio"]), np.random.default_rng(0))
    assert len(set(drawn.tolist())) == n
    assert (np.diff(drawn) > 0).all()
    keep = kept(g["noise"], n)
    at = keep[..., None].expand_as(g["kept_tokens"])
    assert torch.equal(g["tokens"].gather(1, at), g["kept_tokens"])
    # The authors append mask tokens and undo the shuffle; the decoder writes what was kept over mask tokens.
    filled = torch.cat([g["kept_tokens"], torch.full_like(g["tokens"][:, n:], -9)], 1)
    theirs = filled.gather(1, g["inverse_perm"][..., None].expand_as(filled))
    assert torch.equal(torch.full_like(filled, -9).scatter(1, at, g["kept_tokens"]), theirs)
    assert torch.equal(torch.ones(images, patches).scatter(1, keep, 0.0), g["mask_removed1"])


def test_every_patch_is_kept_equally_often():
    rng, counts = np.random.default_rng(0), np.zeros(16)
    for _ in range(4000):
        counts[draw_keep(16, 0.75, rng)] += 1
    assert counts.sum() == 4000 * 4
    assert np.abs(counts - 1000).max() < 5 * math.sqrt(4000 * 0.25 * 0.75)  # standard deviations


def name(golden_name: str) -> str | None:
    """'enc.blk0.qkv.w', 'dec.in.b' -> the name in our method; None for the positions, which are fixed."""
    part, rest = golden_name.split(".", 1)
    if rest == "pos":
        return None
    if part == "dec" and not rest.startswith(("blk", "ln")):
        return "decoder." + rest.replace("in.", "read.").replace("out.", "write.").replace(".w", ".weight").replace(
            ".b", ".bias"
        )
    ours = timm_name(rest.replace(".proj.", ".attn_out."))
    return f"backbone.vit.{ours}" if part == "enc" else f"decoder.{ours}"


def authors_model(g) -> MAE:
    sizes = {k.removeprefix("cfg_"): int(v) for k, v in g.items() if k.startswith("cfg_") and k != "cfg_ln_eps"}
    config = MAEConfig(
        norm_pixels=bool(g["normalise_target"]),
        decoder_width=sizes["dec_dim"],
        decoder_depth=sizes["dec_depth"],
        decoder_heads=sizes["dec_heads"],
    )
    encoder = {k: sizes[k] for k in ("image", "patch", "depth", "heads")}
    method = make(config, width=sizes["dim"], **encoder)
    epsilons = {m.eps for m in method.modules() if isinstance(m, torch.nn.LayerNorm)}
    assert epsilons == {float(g["cfg_ln_eps"])}
    # Their positions are the same sines and cosines, but rounded to fp32, as ours are in training.
    ours = method.decoder.positions
    torch.testing.assert_close(ours, g["p.dec.pos"][0, 1:], rtol=0, atol=1e-7)
    method.decoder.positions = g["p.dec.pos"][0, 1:]
    state = group(g, "p.", name) | {"backbone.vit.pos_embed": g["p.enc.pos"]}
    rest = method.load_state_dict(state, strict=False)
    assert rest == ([], [])
    return method


@pytest.mark.parametrize("file", ["mae_model_norm0", "mae_model_norm1"])
@pytest.mark.parametrize("order", ["theirs", "ascending"])
def test_latents_pixels_loss_and_all_gradients_equal_the_authors(golden, file, order):
    """The encoder does not know the order of its tokens: ours are ascending, theirs shuffled."""
    g = golden(file)
    method, keep = authors_model(g), kept(g["noise"], int(16 * (1 - float(g["ratio"]))))
    latent = method.encoder.as_timm(method.encoder(g["image"], keep=keep))
    torch.testing.assert_close(latent, g["latent_with_cls"], rtol=0, atol=1e-12)
    keep = keep if order == "theirs" else keep.sort(1)[0]
    tokens = method.encoder(g["image"], keep=keep)
    pixels = method.decoder(tokens.cls, tokens.patch, keep, (4, 4))
    torch.testing.assert_close(pixels, g["pred"], rtol=0, atol=1e-12)
    loss = method(views_of(g["image"], keep), T0).loss
    loss.backward()
    torch.testing.assert_close(loss, g["loss"], rtol=0, atol=1e-12)
    expected, ours = group(g, "g.", name), grads(method)
    assert ours.keys() - expected.keys() == {"backbone.vit.pos_embed"}  # trained unless encoder.position_table fixes it
    assert_all_close(ours, expected, 1e-12, file)


@pytest.mark.parametrize(("dim", "grid", "table"), [("dim", "grid", "table_cls"), ("dim2", "grid2", "table2_cls")])
def test_fixed_positions_equal_the_authors(golden, dim, grid, table):
    g = golden("mae_sincos")
    ours = sincos_table((int(g[grid]),) * 2, int(g[dim]), first="column")
    torch.testing.assert_close(ours, g[table][1:], rtol=0, atol=1e-12)
    assert not g[table][0].any()  # of the class token
    torch.testing.assert_close(g["table_cls"][1:], g["table_nocls"], rtol=0, atol=0)
    assert (ours != sincos_table((int(g[grid]),) * 2, int(g[dim]), first="row")).any()  # MoCo v3's


def test_lars_of_linear_evaluation_equals_the_authors(golden):
    """A matrix, a vector (neither decayed nor adapted to) and a matrix of zeros; five steps."""
    g = golden("mae_lars")
    model = torch.nn.ParameterDict({n: g[f"{n}0"].clone() for n in "wbz"})
    optimizer = make_optimizer(model, OptimConfig(kind="lars", momentum=float(g["momentum"]), trust=float(g["trust"])))
    for step in range(5):
        for n, p in model.items():
            p.grad = g[f"grad_{n}_{step}"].clone()
        set_rates(optimizer, float(g["lr"]), float(g["weight_decay"]))
        optimizer.step()
        for n, p in model.items():
            torch.testing.assert_close(p.detach(), g[f"{n}_after_{step}"], rtol=0, atol=1e-12)


def test_the_learning_rate_equals_the_authors_at_fractional_epochs(golden):
    g, per_epoch = golden("mae_lr_schedule"), 4
    config = OptimConfig(lr=float(g["peak"]), min_lr=float(g["floor"]), warmup=int(g["warmup"]), schedule="mocov3")
    rate, total = config.rates(256)[0], int(g["total"]) * per_epoch
    assert g["epoch"].tolist() == [s / per_epoch for s in range(total)]
    ours = torch.tensor([rate(Progress(s, total, per_epoch)) for s in range(total)], dtype=torch.float64)
    torch.testing.assert_close(ours, g["lr"], rtol=0, atol=1e-12)


def test_the_encoder_never_sees_dropped_patches_and_the_loss_counts_them_only():
    method, view = make(), random_views(3).global_crops[0]
    hidden = torch.ones(3, 16).scatter(1, view.keep, 0.0).bool()
    where = unpatchify(hidden[..., None].expand(-1, -1, 48), (4, 4))  # pixels of dropped patches
    other = torch.where(where, torch.randn_like(view.images), view.images)
    a, b = (method.encoder(x, keep=view.keep) for x in (view.images, other))
    assert torch.equal(a.cls, b.cls)
    assert torch.equal(a.patch, b.patch)
    assert method(views_of(other, view.keep), T0).loss != method(views_of(view.images, view.keep), T0).loss
    pixels = method.decoder(a.cls, a.patch, view.keep, (4, 4)).detach().requires_grad_()
    images = view.images.clone().requires_grad_()
    method.error(pixels, images, view.keep).backward()
    assert torch.equal(pixels.grad.abs().sum(-1) > 0, hidden)
    assert torch.equal(patchify(images.grad, 4).abs().sum(-1) > 0, hidden)


def test_the_decoders_residual_stream_is_in_full_precision_under_autocast():
    method = build(tiny_encoder(TokenSpec()), MAEConfig(drop=0.375, **SMALL)).float()
    seen = []
    method.decoder.norm.register_forward_hook(lambda m, x, y: seen.append(x[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        method(random_views(2, dtype=torch.float32), Progress(0, 10))
    assert seen == [torch.float32]


def test_pixels_of_normalised_patches_do_not_depend_on_brightness_and_contrast():
    method, view = make(), random_views(3).global_crops[0]
    pixels = torch.randn(3, 16, 48, dtype=torch.float64)
    expected = method.error(pixels, view.images, view.keep)
    # Not exact: 1e-6 is added to the variance.
    torch.testing.assert_close(method.error(pixels, 3 * view.images + 2, view.keep), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 24), (24, 24)])
def test_images_of_other_sizes_are_decoded_at_their_own_positions(height, width):
    method, grid = make(), (height // 4, width // 4)
    images, n = torch.randn(2, 3, height, width, dtype=torch.float64), grid[0] * grid[1]
    keep = torch.stack([torch.from_numpy(draw_keep(n, 0.75, np.random.default_rng(b))) for b in range(2)])
    tokens = method.encoder(images, keep=keep)
    pixels = method.decoder(tokens.cls, tokens.patch, keep, grid)
    assert unpatchify(pixels, grid).shape == images.shape
    assert method(views_of(images, keep), T0).loss.isfinite()
    # A decoder without blocks writes every place by itself: equal tokens differ by their positions alone.
    method.decoder.blocks = torch.nn.ModuleList()
    hidden = torch.ones(2, n).scatter(1, keep, 0.0).bool()
    alone = method.decoder.mask_token[0] + sincos_table(grid, 8, first="column")
    expected = method.decoder.write(method.decoder.norm(alone)).expand(2, -1, -1)
    bare = method.decoder(tokens.cls, tokens.patch, keep, grid)
    torch.testing.assert_close(bare[hidden], expected[hidden], rtol=0, atol=1e-6)  # the native table is fp32


def test_encoder_and_decoder_start_as_the_authors():
    """Xavier-uniform matrices, the patch projection as one of them, class and mask token normal σ 0.02, biases 0."""
    torch.manual_seed(0)
    config = ViTConfig(patch_size=8, width=96, depth=2, heads=3, init="mae", position_table="sincos_mae")
    method = build(
        build_encoder(config, TokenSpec(), 64), MAEConfig(decoder_width=64, decoder_depth=1, decoder_heads=4)
    )
    vit, decoder = method.encoder.vit, method.decoder
    matrices = {n: m.weight for n, m in method.named_modules() if isinstance(m, torch.nn.Linear)}
    matrices |= {"patches": vit.patch_embed.proj.weight.flatten(1)}
    assert len(matrices) == 2 * 4 + 4 + 2 + 1
    for n, w in matrices.items():
        bound = math.sqrt(6 / sum(w.shape))
        assert 0.98 * bound < w.abs().max() <= bound, n
        assert w.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), n
    assert decoder.mask_token.shape == (1, 1, 64)
    for token in (vit.cls_token, decoder.mask_token):  # 96 and 64 draws: within three standard deviations
        assert token.std().item() == pytest.approx(0.02, rel=0.3)
        assert token.mean().abs() < 0.01
    assert all(not p.any() for n, p in method.named_parameters() if n.endswith("bias"))
    assert all((m.weight == 1).all() for m in method.modules() if isinstance(m, torch.nn.LayerNorm))
    assert torch.equal(vit.pos_embed[0, 1:], sincos_table((8, 8), 96, first="column").float())
    assert not vit.pos_embed[0, 0].any()
    fixed = {n for n, p in method.named_parameters() if not p.requires_grad}
    assert fixed == {"backbone.vit.pos_embed"}
    assert "decoder.positions" not in method.state_dict()


def test_a_decoder_that_says_nothing_has_a_loss_of_about_one():
    """Zeros against patches of variance 1: what the logged term starts at."""
    method, view = make(patch=8, image=32), random_views(2, size=32, patch=8).global_crops[0]
    loss = method.error(torch.zeros(2, 16, 192, dtype=torch.float64), view.images, view.keep)
    assert loss.item() == pytest.approx(1 - 1 / 192, abs=1e-5)  # the variance is unbiased


def test_mte_has_no_use_for_it():
    with pytest.raises(ValidationError, match="does not match any of the expected tags"):
        MTEConfig(base={"name": "mae"})
    with pytest.raises(ValidationError):
        MTEConfig(base=MAEConfig())
