"""One transformer block over the tokens of several views at once, which may differ in size.

All tokens lie in one matrix, view after view and image after image: norms, linear layers and MLPs run once over all of
them, attention once per size.

    rows (R, D), R = Σ_i B_i T_i,    shapes [(B_1, T_1), (B_2, T_2), ...]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from triptych.compiling import compilable
from triptych.encoders.saving import gelu_linear, norm_linear, packed_linear
from triptych.tokens import AuxSees

Shape = tuple[int, int]  # images, tokens of each
Heads = tuple[Tensor, Tensor, Tensor]  # queries, keys, values, each (B, heads, T, d)


@dataclass(frozen=True)
class Stream:
    """Tokens of several views.  Base tokens never read private ones, and share no tensor with them."""

    rows: Tensor  # (Σ B_i T_i, D)
    shapes: list[Shape]
    aux: Tensor | None = None  # (Σ B_i A, D): private tokens, likewise
    count: int = 0  # A

    def base(self) -> list[Tensor]:
        """(B_i, T_i, D) of each size."""
        return unpacked(self.rows, self.shapes)

    def private(self) -> list[Tensor] | list[None]:
        """(B_i, A, D) of each size, or None."""
        return [None] * len(self.shapes) if self.aux is None else unpacked(self.aux, self.aux_shapes)

    @property
    def aux_shapes(self) -> list[Shape]:
        return [(images, self.count) for images, _ in self.shapes]


def packed(parts: Sequence[Tensor]) -> Tensor:
    """[(B_i, T_i, D)] -> (Σ B_i T_i, D)"""
    return torch.cat([x.flatten(0, 1) for x in parts]) if len(parts) > 1 else parts[0].flatten(0, 1)


def unpacked(rows: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """(Σ B_i T_i, ...) -> [(B_i, T_i, ...)]"""
    parts = rows.split([b * n for b, n in shapes]) if len(shapes) > 1 else [rows]
    return [x.unflatten(0, shape) for x, shape in zip(parts, shapes, strict=True)]


def run_block(
    block: Block, x: Stream, sees: AuxSees, prefix: int, queries: Sequence[int | None] = (), *, skip: bool = False
) -> Stream:
    """The tokens after one block.

    sees, prefix: what private tokens attend to beside themselves; base tokens before the patches.  queries: of each
    size how many tokens, from the first, are wanted after the block (None = all): the others are keys and values only.
    skip: stochastic depth leaves its share of the images out of the work, instead of dropping what they give.
    """
    drops = _drop_rates(block)
    if skip and any(drops):
        return _skipping(block, x, sees, prefix, drops)
    if any(q is not None for q in queries):
        heads, kept = _heads_of_first(block, x, queries)
    else:
        heads, kept = _heads_of(block, _queries_keys_values(block, x.rows), x.shapes), x
    shares = [_keep_shares(kept, p) for p in drops]
    update = [merged(attention(q, k, v, _dropout(block))) for q, k, v in heads]
    aux = None
    if x.aux is not None:
        of_aux = _private(block, x, sees, prefix, heads)
        aux = _rest_of_block(block, x.aux, of_aux, *(None if s is None else s[1] for s in shares))
    rows = _rest_of_block(block, kept.rows, update, *(None if s is None else s[0] for s in shares))
    return Stream(rows, kept.shapes, aux, x.count)


def _skipping(block: Block, x: Stream, sees: AuxSees, prefix: int, drops: list[float]) -> Stream:
    """`run_block` whose two updates are computed for a random subset of the images of each size only (DINOv2)."""

    def update(x: Stream, p: float, change) -> Stream:
        chosen = [torch.randperm(b, device=x.rows.device)[: max(1, round(b * (1 - p)))] for b, _ in x.shapes]
        part = _images_of(x, chosen)
        u, u_aux = change(part)
        # The expectation over subsets is the full update: each is scaled by B / kept.
        scale = [b / len(c) for (b, _), c in zip(x.shapes, chosen, strict=True)]
        rows = _add(x.rows, u, x.shapes, chosen, scale)
        aux = x.aux if u_aux is None else _add(cast(Tensor, x.aux), u_aux, x.aux_shapes, chosen, scale)
        return Stream(rows, x.shapes, aux, x.count)

    def attend(part: Stream):
        heads = _heads_of(block, _queries_keys_values(block, part.rows), part.shapes)
        u = _projected(block, part.rows, [merged(attention(q, k, v, _dropout(block))) for q, k, v in heads])
        if part.aux is None:
            return u, None
        return u, _projected(block, part.aux, _private(block, part, sees, prefix, heads))

    def mlp(part: Stream):
        return _mlp(block, part.rows), None if part.aux is None else _mlp(block, part.aux)

    return update(update(x, drops[0], attend), drops[1], mlp)


def _images_of(x: Stream, chosen: list[Tensor]) -> Stream:
    """The tokens of some images of each size."""
    shapes = [(len(c), n) for c, (_, n) in zip(chosen, x.shapes, strict=True)]
    rows = packed([part[c] for part, c in zip(x.base(), chosen, strict=True)])
    aux = None if x.aux is None else packed([cast(Tensor, p)[c] for p, c in zip(x.private(), chosen, strict=True)])
    return Stream(rows, shapes, aux, x.count)


def _add(rows: Tensor, update: Tensor, shapes: list[Shape], chosen: list[Tensor], scale: list[float]) -> Tensor:
    parts = unpacked(update, [(len(c), n) for c, (_, n) in zip(chosen, shapes, strict=True)])
    whole = zip(unpacked(rows, shapes), parts, chosen, scale, strict=True)
    return packed([x.index_add(0, c, u.to(x.dtype), alpha=s) for x, u, c, s in whole])


def attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q kᵀ/√d) v.  (B, heads, T, d), (B, heads, T', d) -> (B, heads, T, d)"""
    half_on_cpu = q.device.type == "cpu" and q.dtype != torch.float32 and q.requires_grad and not dropout
    if half_on_cpu:  # the fused kernel's backward is 2-12 times slower there (measured with torch 2.15)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return scores.softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)


def merged(heads: Tensor) -> Tensor:
    """(B, heads, T, d) -> (B, T, heads·d)"""
    return heads.transpose(1, 2).flatten(2)


def _heads_of(block: Block, qkv: Tensor, shapes: list[Shape]) -> list[Heads]:
    """(R, 3·heads·d) -> of each size"""
    attn = cast(Attention, block.attn)
    out = []
    for part in unpacked(qkv, shapes):
        q, k, v = part.unflatten(2, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        out.append((attn.q_norm(q), attn.k_norm(k), v))
    return out


def queries_and_keys(block: Block, x: Stream) -> list[tuple[Tensor, Tensor]]:
    """Of each size."""
    return [(q, k) for q, k, _ in _heads_of(block, _queries_keys_values(block, x.rows), x.shapes)]


def _heads_of_first(block: Block, x: Stream, queries: Sequence[int | None]) -> tuple[list[Heads], Stream]:
    """Queries of the first tokens only, keys and values of all; and the tokens that go on."""
    attn, y = cast(Attention, block.attn), block.norm1(x.rows)
    weight, bias, wide = attn.qkv.weight, attn.qkv.bias, attn.attn_dim
    shapes = [(b, n if wanted is None else wanted) for (b, n), wanted in zip(x.shapes, queries, strict=True)]

    def first(rows: Tensor) -> Tensor:
        return packed([part[:, :n] for part, (_, n) in zip(unpacked(rows, x.shapes), shapes, strict=True)])

    q = F.linear(first(y), weight[:wide], None if bias is None else bias[:wide])
    kv = F.linear(y, weight[wide:], None if bias is None else bias[wide:])
    heads = []
    for q_part, kv_part in zip(unpacked(q, shapes), unpacked(kv, x.shapes), strict=True):
        k, v = kv_part.chunk(2, -1)
        of_heads = [t.unflatten(2, (attn.num_heads, attn.head_dim)).transpose(1, 2) for t in (q_part, k, v)]
        heads.append((attn.q_norm(of_heads[0]), attn.k_norm(of_heads[1]), of_heads[2]))
    return heads, Stream(first(x.rows), shapes, x.aux, x.count)


def _private(block: Block, x: Stream, sees: AuxSees, prefix: int, base: list[Heads]) -> list[Tensor]:
    """What private tokens read, (B_i, A, D) of each size: base tokens' keys and values, and their own."""
    own = _heads_of(block, _queries_keys_values(block, cast(Tensor, x.aux)), x.aux_shapes)
    first, out = (0 if sees == "all" else prefix), []
    for (q, k_a, v_a), (_, k, v) in zip(own, base, strict=True):
        # Two products instead of one over joined keys: a joint tensor would copy all keys and values of the base.
        q, k, v = q * q.shape[-1] ** -0.5, k[:, :, first:], v[:, :, first:]
        alone = sees == "patches"  # each sees itself, but no other
        among = (q * k_a).sum(-1, keepdim=True) if alone else q @ k_a.transpose(-2, -1)
        weights = torch.cat([q @ k.transpose(-2, -1), among], -1).softmax(-1).to(v.dtype)
        of_base, of_own = F.dropout(weights, _dropout(block)).split([k.shape[2], among.shape[-1]], -1)
        out.append(merged(of_base @ v + (of_own * v_a if alone else of_own @ v_a)))
    return out


def _dropout(block: Block) -> float:
    attn = cast(Attention, block.attn)
    return attn.attn_drop.p if attn.training else 0.0


def _drop_rates(block: Block) -> list[float]:
    """Of the attention's and of the MLP's update; zeros where nothing is dropped."""
    paths = (block.drop_path1, block.drop_path2)
    return [float(getattr(path, "drop_prob", 0.0) or 0.0) if path.training else 0.0 for path in paths]


def _keep_shares(x: Stream, p: float) -> tuple[Tensor, Tensor | None] | None:
    """Factors (R, 1) of an update, one draw per image: 0 with probability p, else 1/(1 − p); of base and private."""
    if not p:
        return None
    of_image = x.rows.new_empty(sum(b for b, _ in x.shapes)).bernoulli_(1 - p) / (1 - p)
    parts = of_image.split([b for b, _ in x.shapes])

    def each(shapes: list[Shape]) -> Tensor:
        return torch.cat([part[:, None].expand(shape).flatten() for part, shape in zip(parts, shapes, strict=True)])[
            :, None
        ]

    return each(x.shapes), None if x.aux is None else each(x.aux_shapes)


@compilable
def _queries_keys_values(block: Block, rows: Tensor) -> Tensor:
    return norm_linear(block.norm1, cast(Attention, block.attn).qkv, rows)


def _projected(block: Block, rows: Tensor, attended: list[Tensor]) -> Tensor:
    attn = cast(Attention, block.attn)
    if attn.gate is None and isinstance(attn.norm, nn.Identity):
        return block.ls1(attn.proj_drop(packed_linear(attended, attn.proj)))
    y = attn.norm(packed(attended))
    if attn.gate is not None:
        y = y * attn.gate(block.norm1(rows)).sigmoid()
    return block.ls1(attn.proj_drop(attn.proj(y)))


def _mlp(block: Block, rows: Tensor) -> Tensor:
    mlp = cast(Mlp, block.mlp)
    if type(mlp) is not Mlp or type(mlp.act) is not nn.GELU or mlp.act.approximate != "none":
        return block.ls2(mlp(block.norm2(rows)))
    if not isinstance(mlp.norm, nn.Identity) or (mlp.training and mlp.drop1.p):
        return block.ls2(mlp(block.norm2(rows)))
    hidden = norm_linear(block.norm2, cast(nn.Linear, mlp.fc1), rows)
    return block.ls2(mlp.drop2(gelu_linear(hidden, cast(nn.Linear, mlp.fc2))))


@compilable
def _rest_of_block(
    block: Block, rows: Tensor, attended: list[Tensor], share1: Tensor | None = None, share2: Tensor | None = None
) -> Tensor:
    u = _projected(block, rows, attended)
    rows = rows + (u if share1 is None else u * share1)
    u = _mlp(block, rows)
    return rows + (u if share2 is None else u * share2)
