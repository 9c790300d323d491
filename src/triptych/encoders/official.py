"""State dicts of other code bases: whose they are, and their names as timm's.

A file may hold several encoders (student, teacher) under prefixes, beside heads, decoders and queues.  The tables
say of each code base how its files are recognised and what they leave unsaid: norm ε, the rule by which its authors
resample positions, mean and deviation of the images.  Sources: the released code of each paper, and the papers.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from triptych.encoders.positions import Positions
from triptych.encoders.report import Report
from triptych.encoders.state import State
from triptych.errors import UserError, nearest

Part = Literal["teacher", "student"]
RGB = tuple[float, float, float]
_NONE, _ANY = r"(?!)", r"(?!.*(student|teacher)\.).*"
_TEACHER, _STUDENT = (rf"(model\.)?{who}\.(module\.)?(backbone\.)*" for who in ("teacher", "student"))


@dataclass(frozen=True)
class Origin:
    """A code base.  Patterns are regular expressions; the prefix is what stands before the encoder's names."""

    key: str
    name: str
    known_by: str = ""  # found in one of the file's "name (shape)", names without the prefix; or in its suffix
    only: str = _NONE  # the whole prefix, where a file has one encoder
    teacher: str = _NONE  # where it has two: the momentum, target or EMA encoder
    student: str = _NONE
    positions: Positions = "timm"
    norm_eps: float = 1e-6
    heads: int | None = None  # None: by width
    mean: RGB = (0.485, 0.456, 0.406)
    std: RGB = (0.229, 0.224, 0.225)


HALF: RGB = (0.5, 0.5, 0.5)

# The first row that fits decides.
VITS = (
    Origin("hf_dinov2_with_registers", "Hugging Face DINOv2 with registers", r"^embeddings\.register_tokens", _ANY),
    Origin("hf_dinov2", "Hugging Face DINOv2", r"^encoder\.layer\.0\.layer_scale1", _ANY, positions="mae"),
    Origin("hf_vit_mae", "Hugging Face ViTMAE", r"^decoder\.decoder_embed", _ANY, positions="mae", norm_eps=1e-12),
    Origin(
        "hf_vit",
        "Hugging Face ViT",
        r"^embeddings\.patch_embeddings",
        _ANY,
        positions="mae",
        norm_eps=1e-12,
        mean=HALF,
        std=HALF,
    ),
    Origin("udi", "UDI", r"^cls_token \(1, 2,", _ANY, _TEACHER, _STUDENT, "dino"),
    # By size and with antialiasing, where DINOv2 without registers goes by the factor.
    Origin("dinov2_registers", "DINOv2 with registers", r"^register_tokens ", _ANY, _TEACHER, _STUDENT),
    Origin("mae", "MAE", r"^decoder_embed\.", _ANY, positions="mae"),
    Origin("dinov2", "DINOv2", r"^(mask_token |blocks\.0\.0\.)", _ANY, _TEACHER, _STUDENT, "dino"),
    Origin(  # its ViT-S, too, has 12 heads
        "mocov3",
        "MoCo v3",
        teacher=r"(state_dict\.)?(module\.)?momentum_encoder\.",
        student=r"(state_dict\.)?(module\.)?base_encoder\.",
        heads=12,
    ),
    Origin("msn", "MSN", teacher=r"target_encoder\.(module\.)?", student=r"encoder\.(module\.)?", positions="mae"),
    Origin("timm", "timm", r"^(\.safetensors|head\.|fc_norm\.|norm_pre\.|reg_token )", r"(state_dict\.)?(module\.)?"),
    Origin("dino", "DINO or iBOT", "", r"(state_dict\.)?", _TEACHER, _STUDENT, "dino"),
    Origin("deit", "MAE or DeiT", only=r"model\.", positions="mae"),
    Origin("other", "unknown code", only=_ANY),
)
SWINS = (
    Origin("ibot_swin", "iBOT", "", _NONE, _TEACHER, _STUDENT),
    # Its authors evaluate the online encoder; the momentum encoder is encoder_k.
    Origin("moby", "MoBY (online encoder)", r"encoder_k\.", r"(model\.)?(module\.)?encoder\.", norm_eps=1e-5),
    Origin("swin", "Swin", only=_ANY, norm_eps=1e-5),
)

# Not the encoder's.  With `fc_norm`, which is a head's beside a final norm of its own.
IGNORED = (
    r"(head|fc|classifier|pooler|projector|projection_head|pred|predictor|prototypes|srs|mask_token|masked_embed|"
    r"decoder|dino_head|ibot_head|attn_pool|fc_norm)(\d*$|\d*\.|_.*)"
)

RENAMES = tuple(
    (re.compile(old), new)
    for old, new in (
        (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # DINOv2's chunks for FSDP; the second number counts through
        (r"\.gamma_([12])$", r".ls\1.gamma"),  # iBOT's layer scale
        (r"\.mlp\.(w12|weights_in)\.", ".mlp.fc1."),  # SwiGLU
        (r"\.mlp\.(w3|weights_out|down_proj)\.", ".mlp.fc2."),
        (r"^embeddings\.", ""),  # from here Hugging Face's, on disk and (transformers 5) in memory
        (r"^patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^position_embeddings$", "pos_embed"),
        (r"^register_tokens$", "reg_token"),
        (r"^(encoder\.layer|layers)\.(\d+)\.", r"blocks.\2."),
        (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
        (r"\.attention\.(attention\.)?", ".attn."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
        (r"^layernorm\.", "norm."),
        (r"\.attn\.(q|query|q_proj)\.", ".attn.q."),
        (r"\.attn\.(k|key|k_proj)\.", ".attn.k."),
        (r"\.attn\.(v|value|v_proj)\.", ".attn.v."),
    )
)
FUSED = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "mlp.fc1": ("mlp.gate_proj", "mlp.up_proj")}
_FIRST_TABLE = "layers.0.blocks.0.attn.relative_position_bias_table"
_KERNELS = ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight")


@dataclass(frozen=True)
class Found:
    """An encoder's tensors in a file."""

    origin: Origin
    part: str  # for `Report.part`
    role: Part | None  # None: the file has one encoder
    swin: bool
    state: State  # under timm's names; a Swin's also has the shift masks of the file
    sources: dict[str, tuple[str, ...]]  # of each the file's names
    ignored: tuple[str, ...]

    def report(self, ours: State, state: State) -> Report:
        """Of an encoder with the tensors `ours`, to be filled from `state`."""
        fits = {name for name, value in state.items() if name in ours and value.shape == ours[name].shape}
        wrong = []
        for name in (n for n in state if n not in fits):
            here = f", the encoder's {name} {tuple(ours[name].shape)}" if name in ours else ""
            wrong += [f"{source} {tuple(state[name].shape)}{here}" for source in self.sources[name]]
        return Report(
            self.origin.name,
            self.part,
            matched=tuple(dict.fromkeys(source for name in state if name in fits for source in self.sources[name])),
            missing=tuple(name for name in ours if name not in fits),
            unexpected=tuple(wrong),
            ignored=self.ignored,
        )


def origin_named(key: str) -> Origin:
    rows = {row.key: row for row in (*VITS, *SWINS)}
    if key not in rows:
        raise UserError(f"origin {key!r} is not known{nearest(key, rows)}; choose from {', '.join(rows)}")
    return rows[key]


def find_encoder(tensors: State, file: str, weights: Part = "teacher", origin: Origin | None = None) -> Found:
    """The encoder of a file (`read_tensors`).  origin: whose file it is, where that is known.  Raises UserError."""
    roots = sorted(
        {name.removesuffix(k) for name in tensors for k in _KERNELS if f".{name}".endswith(f".{k}")}, key=len
    )
    if not roots:
        raise UserError(
            f"{file} holds no plain ViT or Swin: none of its names ends in {_KERNELS[0]}; they begin with "
            f"{', '.join(list(tensors)[:3])}"
        )
    swins = [r for r in roots if r + _FIRST_TABLE in tensors]
    rows: Sequence[Origin] = (origin,) if origin else SWINS if swins else VITS
    row, root, role = _first_that_fits(rows, swins or roots, tensors, file, weights, bool(origin))
    inside = {name.removeprefix(root): value for name, value in tensors.items() if name.startswith(root)}
    ignored = [name for name in tensors if not name.startswith(root)]
    renamed = swin_names(list(inside)) if swins else _timm_names(list(inside))
    twice = [name for name, n in Counter(renamed.values()).items() if n > 1]
    if twice:
        raise UserError(f"{file} has several tensors for {', '.join(twice[:3])}")
    ignored += [root + name for name in inside if name not in renamed]
    state, sources = _fused({name: value for name, value in inside.items() if name in renamed}, renamed)
    sources = {name: tuple(root + s for s in of) for name, of in sources.items()}
    part = f"{role or 'encoder'}, from {root}*" if root else "the whole file"
    return Found(row, part, role, bool(swins), state, sources, tuple(ignored))


def _first_that_fits(
    rows: Sequence[Origin], roots: list[str], tensors: State, file: str, weights: Part, said: bool
) -> tuple[Origin, str, Part | None]:
    def fits(row: Origin, pattern: str, root: str) -> bool:
        if said or not re.fullmatch(pattern, root):
            return bool(re.fullmatch(pattern, root))
        names = [f"{name.removeprefix(root)} {tuple(value.shape)}" for name, value in tensors.items()]
        return any(re.search(row.known_by, line) for line in ("." + file.rpartition(".")[2], *names))

    for row in rows:
        two: tuple[tuple[Part | None, str], ...] = ((weights, getattr(row, weights)), (None, row.only))
        for role, pattern in two:
            fit = [r for r in roots if fits(row, pattern, r)]
            if len(fit) > 1:
                raise UserError(f"{file} holds several encoders, at {', '.join(fit)}: keep one of them in the file")
            if fit and (role or weights == "teacher"):
                return row, fit[0], role
    held = ", ".join(f"{r}*" if r else "the whole file" for r in roots)
    name = f" of {rows[0].name}" if said else ""
    raise UserError(
        f"{file} holds no {weights}{name} that could be told from other parts; it holds an encoder at {held}"
    )


def _timm_names(names: list[str]) -> dict[str, str]:
    """The file's name -> timm's (parts of fused tensors: timm's but for the last step), without what is ignored."""
    renamed = {}
    for name in names:
        new = name
        for old, by in RENAMES:
            new = old.sub(by, new)
        if new.startswith("fc_norm.") and "norm.weight" not in names:
            new = new.removeprefix("fc_")  # mean-pooling models keep their final norm there
        if not re.match(IGNORED, new):
            renamed[name] = new
    return renamed


def is_swin(names: Iterable[str]) -> bool:
    return any(f".{name}".endswith(f".{_FIRST_TABLE}") for name in names)


def swin_names(names: Collection[str]) -> dict[str, str]:
    """The file's names of a trunk -> timm's, without what is ignored.

    Official code merges patches at the end of a stage, timm at the start of the next; the four neighbours have the same
    order in both.
    """
    if "absolute_pos_embed" in names:
        raise UserError("this Swin has absolute positions besides its bias tables (ape), which timm's Swin lacks")
    by = int("layers.0.downsample.reduction.weight" in names)
    return {
        name: re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + by}.downsample", name)
        for name in names
        if not re.match(IGNORED, name) and not name.endswith("relative_position_index")
    }


def _fused(inside: State, renamed: dict[str, str]) -> tuple[State, dict[str, tuple[str, ...]]]:
    """Separate queries, keys and values as one tensor.  -> tensors and the file's names of each, by timm's name"""
    state = {renamed[name]: value for name, value in inside.items()}
    sources: dict[str, tuple[str, ...]] = {new: (old,) for old, new in renamed.items()}
    for whole, parts in FUSED.items():
        for first in [name for name in state if f".{parts[0]}." in name]:
            pieces = [first.replace(parts[0], part) for part in parts]
            if all(p in state for p in pieces):
                fused: Tensor = torch.cat([state.pop(p) for p in pieces])
                name = first.replace(parts[0], whole)
                state[name], sources[name] = fused, tuple(s for p in pieces for s in sources.pop(p))
    return state, sources
