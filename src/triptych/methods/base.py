"""The contract that every pre-training method keeps.  Two classes and one protocol, nothing to override by surprise."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol, TypeVar, cast, runtime_checkable

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from triptych.data.views import View, Views, ViewSpec
from triptych.distributed import all_mean
from triptych.encoders.base import Crops, Encoder
from triptych.heads import MLP, PixelHead
from triptych.losses import masked_error
from triptych.schedules import Progress
from triptych.spans import span
from triptych.tokens import Tokens, TokenSpec

Carry = dict[str, Tensor]
See = Literal["whole", "masked", "kept", "corrupted"]


@dataclass(frozen=True)
class Step:
    """What forward returns: the scalar to minimise, its named terms, and what update() will need.  Steps add with +."""

    loss: Tensor | float
    terms: dict[str, Tensor]
    carry: Carry = field(default_factory=dict)  # detached and small

    def __add__(self, other: "Step") -> "Step":
        return Step(self.loss + other.loss, self.terms | other.terms, self.carry | other.carry)


class Method(nn.Module, ABC):
    """A pre-training method.

    forward is pure: same parameters, buffers and views -> same loss, and nothing changes (BatchNorm's running
    statistics and the draws of stochastic depth are the exceptions).
    update is the only place where state moves that the optimiser does not move: centres, queues, the teacher.
    """

    own_aux: ClassVar[int] = 0  # see Siamese

    @staticmethod
    def token_spec(config: Any) -> TokenSpec:
        """What the method asks of the encoder."""
        return TokenSpec()

    @staticmethod
    def view_spec(config: Any) -> ViewSpec:
        """What the method asks of the loader beyond crops."""
        return ViewSpec()

    @property
    @abstractmethod
    def encoder(self) -> Encoder:
        """The encoder that is evaluated and exported: the teacher's, where there is one."""

    @abstractmethod
    def forward(self, views: Views, t: Progress) -> Step: ...

    def after_backward(self, t: Progress) -> None:
        """Between backward and the optimiser's step: DINO drops the gradient of frozen prototypes here."""

    def update(self, carries: list[Carry], t: Progress) -> None:
        """After the optimiser's step; carries holds one entry per accumulated batch."""

    def predictions(self, views: Views, t: Progress) -> tuple[Tensor, Tensor] | None:
        """(teacher, student) probabilities (B, K) of two different views of each image; None if it has none."""
        return None

    def probabilities(self, q_s: Tensor, z_t: Tensor, t: Progress) -> tuple[Tensor, Tensor] | None:
        """What student and teacher embeddings (B, P) predict, for methods that have probabilities."""
        return None


class Tower(nn.Module):
    """One branch: encoder, projector, and whatever else must be averaged with them."""

    encoder: Encoder
    prototypes: Any  # of methods that have some
    projector: MLP
    patch_projector: MLP  # of methods with a head of their own for patches
    patch_prototypes: Any  # likewise
    srs: Any  # UDI's

    def __init__(self, encoder: Encoder, projector: MLP, **more: nn.Module):
        super().__init__()
        self.encoder, self.projector = encoder, projector
        for name, module in more.items():
            self.add_module(name, module)

    def encode(
        self,
        views: list[View],
        *,
        see: See = "whole",
        mixed: Sequence[int] = (),
        patches: bool | Sequence[bool] = True,
    ) -> list[Tokens]:
        """One Tokens per view, of one pass through the encoder.

        see: of views that have something hidden, the "whole" images, those with "masked" patches replaced by the mask
        token, the "kept" patches only, or the "corrupted" images.  mixed: blocks of `Encoder.many`.  patches: of all
        or of each view, are they wanted?  (`Crops.patches`)
        """
        name = {"masked": "mask", "kept": "keep"}.get(see, "")  # of View, and of the encoder's argument
        hidden = [getattr(v, name, None) for v in views]
        wanted = [patches] * len(views) if isinstance(patches, bool) else patches
        kinds = [(v.images.shape[-2:], h is not None, w) for v, h, w in zip(views, hidden, wanted, strict=True)]
        groups = [[i for i, k in enumerate(kinds) if k == kind] for kind in dict.fromkeys(kinds)]
        crops = []
        for at in groups:
            images = torch.cat([seen(views[i]) if see == "corrupted" else views[i].images for i in at])
            more = {name: torch.cat([cast(Tensor, hidden[i]) for i in at])} if hidden[at[0]] is not None else {}
            crops.append(Crops(images, **more, patches=wanted[at[0]]))
        with span("encoder forward"):
            tokens = self.encoder.many(crops, mixed)
        out = {
            i: x for at, part in zip(groups, tokens, strict=True) for i, x in zip(at, part.chunk(len(at)), strict=True)
        }
        return [out[i] for i in range(len(views))]

    def project(self, tokens: list[Tokens]) -> Tensor:
        """(V, B, P): the projected global token of every view."""
        return self.projector(torch.stack([x.global_token for x in tokens]))


def seen(view: View) -> Tensor:
    """The corrupted images, or those of a view that has none."""
    return view.images if view.corrupted is None else view.corrupted


def unmasked(views: list[View]) -> list[View]:
    """The views with nothing hidden."""

    def bare(v: View) -> View:
        v = replace(v, keep=None, corrupted=None, pixel_mask=None)
        if v.mask is None:
            return v
        return replace(v, mask=torch.zeros_like(v.mask), hidden=v.box.new_empty(0, dtype=torch.int64))

    return [bare(v) for v in views]


def hidden_patches(views: list[View]) -> tuple[Tensor, Tensor]:
    """Masks (V, B, N) of views, and the places (H,) in V·B·N where they hold, ascending."""
    mask = torch.stack([cast(Tensor, v.mask) for v in views])
    return mask, torch.cat([v.hidden_places() + i * mask[0].numel() for i, v in enumerate(views)])


def pixel_error(head: PixelHead, S: Sequence[Tokens], views: Views, kind: Literal["l1", "l2"] = "l1") -> Tensor:
    """`masked_error` of the student's global crops, reconstructed from Tokens.mixed where it is there."""
    grid = S[0].grid
    assert grid is not None
    x = head(torch.cat([s.patch if s.mixed is None else s.mixed for s in S]), grid)
    images, masks = ([getattr(v, name) for v in views.global_crops] for name in ("images", "pixel_mask"))
    return masked_error(x, torch.cat(images), torch.cat(masks), kind)


M = TypeVar("M", bound=nn.Module)


@runtime_checkable
class Siamese(Protocol):
    """What MTE needs of a base: two towers, the loss between their global tokens, and its other losses.

    A method without a teacher is its own: `teacher is student`.
    """

    @property
    def student(self) -> Tower: ...
    @property
    def teacher(self) -> Tower: ...
    @property
    def predictor(self) -> nn.Module:
        """Between the student's embedding and the loss; the identity where there is none."""
        ...

    @property
    def own_aux(self) -> int:
        """Auxiliary tokens that its `encode` adds to Tokens.aux by itself (HSSL's head)."""
        ...

    def encode(self, views: Views, t: Progress, *, patches: bool = False) -> tuple[list[Tokens], list[Tokens]]:
        """(student's tokens, teacher's).  patches: of every view, not only where the method itself reads them."""
        ...

    def global_loss(self, q_s: Tensor, z_t: Tensor, t: Progress) -> Step:
        """q_s (Vs, B, P) after the predictor, z_t (Vt, B, P): the paper's L(.,.), weighted as in the method's total."""
        ...

    def other_losses(self, S: list[Tokens], T: list[Tokens], z_t: Tensor, views: Views, t: Progress) -> Step:
        """Everything else; z_t (Vt, B, P) is the teacher's image-level target."""
        ...

    def momentum(self, t: Progress) -> float: ...
    def probabilities(self, q_s: Tensor, z_t: Tensor, t: Progress) -> tuple[Tensor, Tensor] | None: ...


def ema_copy(student: M) -> M:
    """The teacher: a frozen copy without stochastic depth, left in train mode (BatchNorm heads use batch statistics).

    Frozen parameters need no no_grad blocks: what the teacher computes carries no graph.
    """
    teacher = copy.deepcopy(student).requires_grad_(False)
    for module in teacher.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    return teacher


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """θ_t <- m θ_t + (1 − m) θ_s, over parameters only (buffers are not averaged)."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


def carried_mean(carries: list[Carry], name: str) -> Tensor:
    """Mean of one carried value over accumulated batches and processes."""
    return all_mean(torch.stack([c[name] for c in carries]).mean(0))
