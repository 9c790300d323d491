"""What every encoder is to the rest: images in, tokens by role out."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn

from triptych.errors import UserError
from triptych.tokens import Tokens, TokenSpec

EMBEDDING = ("cls_token", "reg_token", "pos_embed", "patch_embed", "norm_pre")  # names in a timm model


@dataclass(frozen=True)
class Crops:
    """Images of one size for an encoder."""

    images: Tensor  # (B, 3, H, W)
    mask: Tensor | None = None  # (B, N) bool, True = replaced by the mask token
    keep: Tensor | None = None  # (B, n) int64: the patches that enter the encoder
    # Are patches wanted after the last block?  Without them it gives (B, 0, D) and saves nearly all its work.  An
    # encoder without class token needs them in any case.
    patches: bool = True


class Encoder(nn.Module, ABC):
    """images (B, 3, H, W) -> Tokens.  H and W are any multiples of `patch_size`."""

    spec: TokenSpec
    positions: str  # beside the weights, what decides the tokens: part of the key of cached features
    mask_token: nn.Parameter | None
    aux_tokens: nn.Parameter | None
    checkpoint = False  # of the config: activations of blocks are computed again in the backward pass

    def recomputes(self, block: nn.Module) -> bool:
        """Is this block to be checkpointed?  Not a frozen one, which keeps nothing."""
        return self.checkpoint and torch.is_grad_enabled() and any(p.requires_grad for p in block.parameters())

    @property
    @abstractmethod
    def trunk(self) -> nn.Module:
        """The timm model inside, whose weights are exported."""

    @property
    @abstractmethod
    def width(self) -> int:
        """D, of the final tokens."""

    @property
    @abstractmethod
    def depth(self) -> int:
        """Number of blocks."""

    @property
    @abstractmethod
    def heads(self) -> int:
        """Attention heads of the last block."""

    @property
    @abstractmethod
    def norm_eps(self) -> float:
        """ε of the layer norms."""

    @property
    @abstractmethod
    def activation(self) -> str:
        """Of the feed-forward layers."""

    def beside_weights(self) -> dict[str, Any]:
        """What decides the tokens beside the weights; values that JSON can hold."""
        own = {"heads": self.heads, "norm_eps": self.norm_eps, "activation": self.activation}
        return own | {"positions": self.positions, "roles": vars(self.spec)}

    @property
    @abstractmethod
    def patch_size(self) -> int:
        """Pixels per side that one final patch token stands for."""

    @property
    @abstractmethod
    def native_size(self) -> tuple[int, int]:
        """Height and width (pixels) that the trunk was built for."""

    @abstractmethod
    def block_parts(self) -> list[list[nn.Module]]:
        """What runs in each transformer block; a Swin's merging of patches belongs to the block behind it."""

    def layer_numbers(self) -> Iterator[tuple[nn.Parameter, int]]:
        """Every parameter with its layer: 0 = embedding, tokens and positions; 1 ... = blocks; depth + 1 = the rest."""
        parts = enumerate(self.block_parts(), 1)
        of_block = {id(p): i for i, modules in parts for module in modules for p in module.parameters()}
        first = [p for p in (self.mask_token, self.aux_tokens) if p is not None]
        first += [p for name, p in self.trunk.named_parameters() if name.startswith(EMBEDDING)]
        of_block |= {id(p): 0 for p in first}
        for p in self.parameters():
            yield p, of_block.get(id(p), self.depth + 1)

    @abstractmethod
    def run(self, inputs: Sequence[Crops], blocks: Sequence[int]) -> list[list[Tokens]]:
        """For every input the tokens after each of the given blocks (0-based, negative from the end)."""

    def many(self, inputs: Sequence[Crops], mixed: Sequence[int] = ()) -> list[Tokens]:
        """The final tokens of every input, in one pass.

        mixed: blocks, counted from 1 as in papers, whose mean patches go through the final norm into Tokens.mixed.
        Raises UserError as `check_blocks`.
        """
        self.check_blocks(mixed)
        runs = self.run(inputs, [*(b - 1 for b in mixed), self.depth - 1])
        if not mixed:
            return [last for (last,) in runs]
        norm = cast(nn.Module, self.trunk.norm)
        return [
            replace(last, mixed=norm(torch.stack([x.patch_raw for x in taps]).mean(0))) if crops.patches else last
            for crops, (*taps, last) in zip(inputs, runs, strict=True)
        ]

    def layers(
        self, images: Tensor, blocks: Sequence[int], mask: Tensor | None = None, keep: Tensor | None = None
    ) -> list[Tokens]:
        """The tokens after each of the given blocks (0-based, negative from the end)."""
        return self.run([Crops(images, mask, keep)], blocks)[0]

    def forward(self, images: Tensor, mask: Tensor | None = None, keep: Tensor | None = None) -> Tokens:
        """The tokens after the last block; arguments as of `Crops`."""
        return self.many([Crops(images, mask, keep)])[0]

    def mixed(
        self, images: Tensor, blocks: Sequence[int], mask: Tensor | None = None, keep: Tensor | None = None
    ) -> Tokens:
        """`many` of one input with Tokens.mixed."""
        return self.many([Crops(images, mask, keep)], blocks)[0]

    def check_blocks(self, blocks: Sequence[int]) -> None:
        """Raises UserError for blocks, counted from 1, that are not there or whose patches have another size."""
        wrong = [b for b in blocks if not 1 <= b <= self.depth]
        if wrong:
            raise UserError(f"block {wrong[0]}: this encoder has blocks 1 to {self.depth}")

    def last_attention(self, images: Tensor) -> Tensor:
        """(B, heads, T, T): attention of the last block; T = prefix tokens (class, class+, registers), then patches."""
        raise UserError(f"{type(self).__name__} has no class token whose attention could be shown: use a ViT")

    def layers_and_attention(self, images: Tensor, blocks: Sequence[int]) -> tuple[list[Tokens], Tensor]:
        """`layers`, and what the last block's prefix tokens attend to among patches (B, heads, prefix, N): one pass."""
        raise UserError(f"{type(self).__name__} has no class token whose attention could be used: use a ViT")

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of final patch tokens of an image of this size (pixels)."""
        p = self.patch_size
        if height % p or width % p:
            raise UserError(f"an image of {height}x{width} px does not divide into patches of {p} px: use multiples")
        return height // p, width // p

    def without(self, role: Literal["aux", "mask", "prefix"]) -> Self:
        """A copy without a role.

        "aux", "mask": the same class and patch tokens to the last bit (but for aux_sees "uncut").  "prefix": a ViT
        without class token, class+ and registers, as UDI's detectors have it; its patches no longer see them.
        """
        kept = copy.deepcopy(self)
        if role == "prefix":
            kept._drop_prefix()
            return kept
        if role == "aux":
            kept.aux_tokens = None
        else:
            kept.mask_token = None
        kept.spec = TokenSpec(**{**vars(self.spec), role: type(getattr(self.spec, role))(0)})
        return kept

    def _drop_prefix(self) -> None:
        """In place; nothing to do for encoders that have none."""

    @abstractmethod
    def timm_arguments(self) -> tuple[str, dict]:
        """timm's name of an architecture and the arguments with which `timm.create_model` builds this trunk."""

    @abstractmethod
    def as_timm(self, tokens: Tokens) -> Tensor:
        """The tokens as the trunk's own `forward_features` gives them."""
