"""State dicts under the names of released code bases, and a plain reading of the architecture over those names."""

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTH, DEPTH, PATCH, GRID = 128, 2, 4, 4

# role -> name; {} is the block
FACEBOOK = {
    "kernel": "patch_embed.proj",
    "cls": "cls_token",
    "pos": "pos_embed",
    "registers": "register_tokens",
    "norm1": "blocks.{}.norm1",
    "qkv": "blocks.{}.attn.qkv",
    "proj": "blocks.{}.attn.proj",
    "norm2": "blocks.{}.norm2",
    "fc1": "blocks.{}.mlp.fc1",
    "fc2": "blocks.{}.mlp.fc2",
    "ls1": "blocks.{}.ls1.gamma",
    "ls2": "blocks.{}.ls2.gamma",
    "norm": "norm",
}
CHUNKED = {role: name.replace("blocks.{}", "blocks.0.{}") for role, name in FACEBOOK.items()}
SWIGLU = FACEBOOK | {"fc1": "blocks.{}.mlp.w12", "fc2": "blocks.{}.mlp.w3"}
IBOT_SCALED = FACEBOOK | {"ls1": "blocks.{}.gamma_1", "ls2": "blocks.{}.gamma_2"}
HF_VIT = {
    "kernel": "embeddings.patch_embeddings.projection",
    "cls": "embeddings.cls_token",
    "pos": "embeddings.position_embeddings",
    "registers": "embeddings.register_tokens",
    "norm1": "encoder.layer.{}.layernorm_before",
    "q": "encoder.layer.{}.attention.attention.query",
    "k": "encoder.layer.{}.attention.attention.key",
    "v": "encoder.layer.{}.attention.attention.value",
    "proj": "encoder.layer.{}.attention.output.dense",
    "norm2": "encoder.layer.{}.layernorm_after",
    "fc1": "encoder.layer.{}.intermediate.dense",
    "fc2": "encoder.layer.{}.output.dense",
    "norm": "layernorm",
}
HF_DINOV2 = HF_VIT | {
    "norm1": "encoder.layer.{}.norm1",
    "norm2": "encoder.layer.{}.norm2",
    "fc1": "encoder.layer.{}.mlp.fc1",
    "fc2": "encoder.layer.{}.mlp.fc2",
    "ls1": "encoder.layer.{}.layer_scale1.lambda1",
    "ls2": "encoder.layer.{}.layer_scale2.lambda1",
}
HF_SWIGLU = HF_DINOV2 | {"fc1": "encoder.layer.{}.mlp.weights_in", "fc2": "encoder.layer.{}.mlp.weights_out"}
HF_MEMORY = HF_VIT | {  # what transformers 5 has in memory, and a user's torch.save(model.state_dict()) writes
    "norm1": "layers.{}.layernorm_before",
    "q": "layers.{}.attention.q_proj",
    "k": "layers.{}.attention.k_proj",
    "v": "layers.{}.attention.v_proj",
    "proj": "layers.{}.attention.o_proj",
    "norm2": "layers.{}.layernorm_after",
    "fc1": "layers.{}.mlp.fc1",
    "fc2": "layers.{}.mlp.fc2",
}


def random_state(names: dict, *, seed=0, width=WIDTH, cls=1, registers=0, scale=False, gated=False, bias=True) -> dict:
    """Embeddings are small, so that a wrong ε of the first norm shows."""
    g = torch.Generator().manual_seed(seed)
    state = {}

    def tensor(name, *shape, std):
        state[name] = torch.randn(shape, generator=g) * std

    def linear(role, out, inside, i="", bias=True):
        tensor(names[role].format(i) + ".weight", out, inside, std=2 * inside**-0.5)
        if bias:
            tensor(names[role].format(i) + ".bias", out, std=0.3)

    tensor(names["cls"], 1, cls, width, std=1e-3)
    tensor(names["pos"], 1, cls + GRID * GRID, width, std=1e-3)
    if registers:
        tensor(names["registers"], 1, registers, width, std=1e-3)
    tensor(names["kernel"] + ".weight", width, 3, PATCH, PATCH, std=1e-4)
    tensor(names["kernel"] + ".bias", width, std=1e-3)
    hidden = 176 if gated else 4 * width
    for i in range(DEPTH):
        for norm in ("norm1", "norm2"):
            tensor(names[norm].format(i) + ".weight", width, std=1.0)
            tensor(names[norm].format(i) + ".bias", width, std=0.3)
        for role, out in (("qkv", 3 * width), ("q", width), ("k", width), ("v", width)):
            if role in names:
                linear(role, out, width, i, bias)
        linear("proj", width, width, i)
        linear("fc1", 2 * hidden if gated else hidden, width, i)
        linear("fc2", width, hidden, i)
        for role in ("ls1", "ls2") if scale else ():
            tensor(names[role].format(i), width, std=1.0)
    tensor(names["norm"] + ".weight", width, std=1.0)
    tensor(names["norm"] + ".bias", width, std=0.3)
    return state


def resampled(table: Tensor, grid: tuple[int, int], rule: str) -> Tensor:
    """(1, GRID², D) -> (1, rows·columns, D) as the authors' code does it."""
    if grid == (GRID, GRID):
        return table
    image = table.reshape(1, GRID, GRID, -1).permute(0, 3, 1, 2)
    if rule == "dino":
        image = F.interpolate(image, scale_factor=((grid[0] + 0.1) / GRID, (grid[1] + 0.1) / GRID), mode="bicubic")
    elif rule == "antialiased":  # in float32, as timm and DINOv2 do
        image = F.interpolate(image.float(), size=grid, mode="bicubic", antialias=True).double()
    else:
        image = F.interpolate(image, size=grid, mode="bicubic")
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def reading(state: dict, images: Tensor, names: dict, *, heads: int, eps: float, rule: str) -> Tensor:
    """(B, class tokens + registers + patches, D): the vision transformer over the file's own names, in float64."""
    w = {name: value.double() for name, value in state.items()}

    def linear(x, role, i=""):
        name = names[role].format(i)
        return F.linear(x, w[name + ".weight"], w.get(name + ".bias"))

    def norm(x, role, i=""):
        name = names[role].format(i)
        return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], eps)

    def scale(role, i):
        return w.get(names.get(role, "").format(i), 1.0)

    x = F.conv2d(images, w[names["kernel"] + ".weight"], w[names["kernel"] + ".bias"], stride=PATCH)
    grid, x = (x.shape[2], x.shape[3]), x.flatten(2).transpose(1, 2)
    cls, pos = w[names["cls"]], w[names["pos"]]
    count = cls.shape[1]
    x = torch.cat([cls.expand(len(x), -1, -1), x], 1)
    x = x + torch.cat([pos[:, :count], resampled(pos[:, count:], grid, rule)], 1)
    if names["registers"] in w:  # after the positions: they have none
        registers = w[names["registers"]].expand(len(x), -1, -1)
        x = torch.cat([x[:, :count], registers, x[:, count:]], 1)
    for i in range(DEPTH):
        y = norm(x, "norm1", i)
        q, k, v = linear(y, "qkv", i).chunk(3, -1) if "qkv" in names else (linear(y, role, i) for role in "qkv")
        out = []
        for a, b, c in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
            out.append((a @ b.transpose(1, 2) / a.shape[-1] ** 0.5).softmax(-1) @ c)
        x = x + scale("ls1", i) * linear(torch.cat(out, -1), "proj", i)
        y = linear(norm(x, "norm2", i), "fc1", i)
        if y.shape[-1] == 2 * w[names["fc2"].format(i) + ".weight"].shape[1]:  # SwiGLU
            gate, y = y.chunk(2, -1)
            y = F.silu(gate) * y
        else:
            y = 0.5 * y * (1 + torch.erf(y / 2**0.5))
        x = x + scale("ls2", i) * linear(y, "fc2", i)
    return norm(x, "norm")


def under(prefix: str, state: dict) -> dict:
    return {prefix + name: value for name, value in state.items()}


def dino_head(prefix="head.") -> dict:
    return under(prefix, {"mlp.0.weight": torch.ones(2, 2), "last_layer.weight_g": torch.ones(2, 1)})
