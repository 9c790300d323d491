"""Part analysis: the patches that the class token attends to most."""

import pytest
import torch

from conftest import tiny_encoder, tiny_swin
from triptych.encoders.base import Crops
from triptych.encoders.blocks import queries_and_keys
from triptych.errors import UserError
from triptych.evals.selection import PARTS, attended_tokens, mean_attended, select, select_all
from triptych.tokens import Tokens, TokenSpec

SPECS = [TokenSpec(), TokenSpec(cls_plus=1), TokenSpec(register=2), TokenSpec(cls_plus=1, register=3, aux=2)]
SPECS += [TokenSpec(aux=2, aux_sees="uncut")]


def sharp(spec, **options):
    """An encoder with private weights of its own, whose attention is far from even."""
    torch.manual_seed(1)
    encoder = tiny_encoder(spec, **options).eval()
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    return encoder


def images(count=3, seed=0):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_means_of_attended_patches_equal_the_golden_ones(golden):
    """Attention (B, heads, 1 + N, 1 + N) and final tokens (B, 1 + N, D) of the authors' model."""
    g = golden("knn_topattn")
    tokens, attention = g["tokens_last_normed"], g["attention_last"]

    class Recorded:
        spec, depth = TokenSpec(), 1

        def layers_and_attention(self, images, blocks):
            patch = tokens[:, 1:]
            return [Tokens(patch=patch, patch_raw=patch, grid=None, cls=tokens[:, 0])], attention[:, :, :1, 1:]

    counts = (1, 4, 8, 16)
    found = select_all(Recorded(), torch.zeros(2, 1), [f"attended_{n}" for n in counts])
    for n in counts:
        torch.testing.assert_close(found[f"attended_{n}"], g[f"pooled_top{n}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_attended_patches_are_those_of_the_class_tokens_row_written_as_loops(spec):
    """Class+, registers and auxiliary tokens shift no index: the places are counted from the end of the prefix."""
    encoder, x = sharp(spec), images()
    with torch.no_grad():
        found, tokens, attention = select(encoder, x, "attended_3"), encoder(x), encoder.last_attention(x)
    prefix = 1 + spec.cls_plus + spec.register
    assert attention.shape == (3, 3, prefix + 16, prefix + 16)
    for b in range(3):
        seen = [sum(float(attention[b, h, 0, prefix + n]) for h in range(3)) / 3 for n in range(16)]
        most = sorted(range(16), key=lambda n, seen=seen: -seen[n])[:3]
        expected = sum(tokens.patch[b, n] for n in most) / 3
        torch.testing.assert_close(found[b], expected, rtol=0, atol=1e-5)


def test_it_is_the_class_token_that_attends_not_class_plus():
    encoder, x = sharp(TokenSpec(cls_plus=1)), images()
    with torch.no_grad():
        (tokens,), of_prefix = encoder.layers_and_attention(x, [-1])
        by_class, by_plus = (mean_attended(tokens.patch, of_prefix[:, :, i].mean(1), 3) for i in (0, 1))
        assert not torch.allclose(by_class, by_plus), "the two would be told apart"
        torch.testing.assert_close(select(encoder, x, "attended_3"), by_class)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_one_pass_gives_the_tokens_of_the_layers_and_the_attention_of_the_last_block(spec):
    encoder, x = sharp(spec, depth=3), images()
    prefix = 1 + spec.cls_plus + spec.register
    with torch.no_grad():
        taps, attention = encoder.layers_and_attention(x, [-2, -1])
        for ours, theirs in zip(taps, encoder.layers(x, [-2, -1]), strict=True):
            assert torch.equal(ours.patch, theirs.patch)
            assert torch.equal(ours.cls, theirs.cls)
        torch.testing.assert_close(attention, encoder.last_attention(x)[:, :, :prefix, prefix:], rtol=0, atol=1e-6)


def test_all_patches_together_are_their_mean():
    encoder, x = sharp(TokenSpec(register=1)), images()
    with torch.no_grad():
        torch.testing.assert_close(select(encoder, x, "attended_16"), select(encoder, x, "patch_mean"))


def test_many_parts_share_one_pass(monkeypatch):
    encoder, x = sharp(TokenSpec(), depth=3), images()
    blocks, run = [], encoder._run
    monkeypatch.setattr(encoder, "_run", lambda *a: blocks.append(1) or run(*a))
    wanted = [*attended_tokens(16), "cls", "cls+patch_mean"]
    with torch.no_grad():
        found = select_all(encoder, x, wanted, 2)
        assert len(blocks) == 3, "each of three blocks once"
        assert list(found) == wanted
        for token, vector in found.items():
            torch.testing.assert_close(vector, select(encoder, x, token, 2), rtol=0, atol=1e-6)


def test_autocast_does_not_blur_which_patches_are_attended_to():
    """Queries and keys are what half-precision layers give; their products are float32's."""
    encoder, x = sharp(TokenSpec()), images()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        _, attention = encoder.layers_and_attention(x, [-1])
        q, k = queries_and_keys(encoder.blocks[-1], encoder._pass([Crops(x)], [-1])[1])[0]
    assert q.dtype == torch.bfloat16
    scores = torch.einsum("bhd,bhnd->bhn", q[:, :, 0].float(), k.float()) / 2  # heads of 4 numbers
    torch.testing.assert_close(attention[:, :, 0], scores.softmax(-1)[..., 1:], rtol=1e-5, atol=0)


def test_the_part_analysis_of_an_image_ends_with_all_its_patches():
    assert attended_tokens(196) == tuple(f"attended_{n}" for n in PARTS)
    assert attended_tokens(64) == ("attended_1", "attended_7", "attended_14", "attended_56", "attended_64")
    assert attended_tokens(784)[-2:] == ("attended_196", "attended_784")
    assert attended_tokens(1) == ("attended_1",)


@pytest.mark.parametrize("encoder", [tiny_swin(TokenSpec(cls=0)), tiny_encoder(TokenSpec(cls=0, register=1))])
def test_an_encoder_without_class_token_has_no_attended_patches(encoder):
    with pytest.raises(UserError, match=r"attended_3: this encoder has no class token.*patch_mean"):
        select(encoder, images(), "attended_3")


def test_more_patches_than_the_image_has_are_refused():
    with pytest.raises(UserError, match="attended_17: an image has 16 patches"):
        select(sharp(TokenSpec()), images(), "attended_17")


@pytest.mark.parametrize("token", ["attended_0", "attended_", "attended_1.5", "attended_N"])
def test_a_part_is_a_whole_number_of_patches(token):
    with pytest.raises(UserError, match=f"token '{token}': choose one of"):
        select(sharp(TokenSpec()), images(), token)
