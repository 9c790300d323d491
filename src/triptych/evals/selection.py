"""Which vector stands for an image: tokens by name."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from triptych.encoders import Encoder
from triptych.encoders.base import Crops
from triptych.errors import UserError
from triptych.tokens import Tokens

Token = str
TOKENS: dict[Token, str] = {
    "cls": "class token, or the mean patch of encoders without one",
    "cls_plus": "UDI's class+ token",
    "patch_mean": "mean of the patch tokens",
    "cls+patch_mean": "both side by side (MMC's Hybrid)",
    "cls_raw": "class token before the final norm (MSN)",
    "cls+gem": "class token and generalised mean of the patches, power 4 (DINO's copy detection)",
    "attended_N": "mean of the N patches that the class token attends to most (iBOT's and MTE's part analysis)",
}
"""Names and meanings; N is a number of patches."""
ATTENDED = re.compile(r"attended_([1-9]\d*)")
PARTS = (1, 7, 14, 56, 112, 196)
"""How many attended patches iBOT's part analysis looks at; 196 are all of 224 px in patches of 16."""


def check_token(encoder: Encoder, token: Token) -> None:
    """Raises UserError for a name that is none, or a token that the encoder does not have."""
    if token not in TOKENS.keys() - {"attended_N"} and not ATTENDED.fullmatch(token):
        raise UserError(f"token {token!r}: choose one of {', '.join(TOKENS)}")
    if token == "cls_plus" and not encoder.spec.cls_plus:
        raise UserError("this encoder has no class+ token (only UDI's have): choose cls, patch_mean or cls+patch_mean")
    if ATTENDED.fullmatch(token) and not encoder.spec.cls:
        raise UserError(f"token {token}: this encoder has no class token that would attend to patches: take patch_mean")


def attended_tokens(patches: int) -> tuple[Token, ...]:
    """Tokens of the part analysis of images of so many patches: those of PARTS that are fewer, then all patches."""
    return tuple(f"attended_{count}" for count in (*(n for n in PARTS if n < patches), patches))


def select(encoder: Encoder, images: Tensor, token: Token, layers: int = 1) -> Tensor:
    """`select_all` of one token: (B, 3, H, W) -> (B, features)."""
    return select_all(encoder, images, [token], layers)[token]


def select_all(encoder: Encoder, images: Tensor, tokens: Sequence[Token], layers: int = 1) -> dict[Token, Tensor]:
    """(B, 3, H, W) -> (B, features) of each: class tokens of the last `layers` blocks, then what is of the last alone.

    Each through the final norm but for "cls_raw"; TOKENS tells what they are.  One pass for all of them.
    Raises UserError for a token that the encoder does not have.
    """
    for token in tokens:
        check_token(encoder, token)
    if not 1 <= layers <= encoder.depth:
        raise UserError(f"layers {layers}: this encoder has {encoder.depth} blocks")
    blocks, attention = range(-layers, 0), None
    if any(map(ATTENDED.fullmatch, tokens)):
        taps, of_prefix = encoder.layers_and_attention(images, blocks)
        attention = of_prefix[:, :, 0].mean(1)  # the class token is the first; mean over the heads
    else:
        crops = Crops(images, patches=any(not token.startswith("cls") or "+" in token for token in tokens))
        (taps,) = encoder.run([crops], blocks)
    return {token: _features(taps, token, attention) for token in tokens}


def _features(taps: Sequence[Tokens], token: Token, attention: Tensor | None) -> Tensor:
    """(B, features) of the tokens of some blocks, the last one last."""
    patches = taps[-1].patch
    if match := ATTENDED.fullmatch(token):
        assert attention is not None
        return mean_attended(patches, attention, int(match[1]))
    if token == "patch_mean":
        return patches.mean(1)
    parts = [_single(tokens, token) for tokens in taps]
    if token == "cls+patch_mean":
        parts.append(patches.mean(1))
    elif token == "cls+gem":
        parts.append(generalised_mean(patches))
    return torch.cat(parts, -1)


def _single(tokens: Tokens, token: Token) -> Tensor:
    if token == "cls_plus":
        assert tokens.cls_plus is not None
        return tokens.cls_plus
    if token == "cls_raw":
        return tokens.patch_raw.mean(1) if tokens.cls_raw is None else tokens.cls_raw
    return tokens.global_token


def generalised_mean(patches: Tensor, power: float = 4) -> Tensor:
    """(B, N, D) -> (B, D): (mean max(x, 1e-6)^p)^(1/p)."""
    return patches.clamp(min=1e-6).pow(power).mean(1).pow(1 / power)


def mean_attended(patches: Tensor, attention: Tensor, count: int) -> Tensor:
    """(B, N, D), (B, N) -> (B, D): mean of the `count` patches of largest attention (MTE, Fig. 14; N gives the mean of
    all).  Raises UserError where there are fewer."""
    if count > patches.shape[1]:
        raise UserError(f"token attended_{count}: an image has {patches.shape[1]} patches at this size")
    chosen = attention.topk(count, -1).indices
    return patches.gather(1, chosen[..., None].expand(-1, -1, patches.shape[-1])).mean(1)
