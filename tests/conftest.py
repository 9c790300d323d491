"""Small encoders and batches that the tests share."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from triptych.data.views import View, Views
from triptych.encoders.swin_build import SwinConfig
from triptych.encoders.swin_build import build as build_swin
from triptych.encoders.vit import ViT
from triptych.encoders.vit_init import init_vit
from triptych.tokens import TokenSpec

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # as many processes as cores: threads of several would wait for each other

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden():
    """golden("udi_head") -> {name: float64/int tensor}: numbers of the authors' code (tests/golden/README.md)."""

    def load(name: str) -> dict:
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        return {k: a if a.dtype.kind == "U" else torch.from_numpy(a) for k, a in arrays.items()}

    return load


def tiny_encoder(spec: TokenSpec, *, image=16, patch=4, width=12, depth=2, heads=3, drop_path=0.0, **options):
    """A ViT small enough for a test, through the product's own initialisation."""
    vit = VisionTransformer(
        img_size=image,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        num_classes=0,
        reg_tokens=spec.cls_plus + spec.register,
        drop_path_rate=drop_path,
    )
    encoder = ViT(vit, spec, **options)
    init_vit(vit)
    return encoder


def tiny_swin(spec: TokenSpec, *, image=16, window=4, width=8, depths=(2, 2), heads=(2, 4), drop_path=0.0):
    """A Swin of two stages whose final patches are 4 px, like tiny_encoder's."""
    sizes = {"patch_size": 2, "window_size": window, "width": width, "depths": depths, "heads": heads}
    return build_swin(SwinConfig(image_size=image, drop_path=drop_path, **sizes), spec)


def timm_tokens(encoder, images):
    """All tokens as the encoder's timm model itself would give them."""
    return encoder.as_timm(encoder(images))


GOLDEN_BLOCK = {
    "ln1": "norm1",
    "qkv": "attn.qkv",
    "attn_out": "attn.proj",
    "proj": "attn.proj",
    "ln2": "norm2",
    "mlp_in": "mlp.fc1",
    "mlp_out": "mlp.fc2",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}


def timm_name(golden_name: str) -> str:
    """'blocks.0.ln1.w' or 'blk0.ln1.w' -> timm's 'blocks.0.norm1.weight'."""
    name = golden_name.replace("blk", "blocks.") if golden_name.startswith("blk") else golden_name
    head, _, leaf = name.rpartition(".")
    leaf = {"w": "weight", "b": "bias"}.get(leaf, leaf)
    if head.startswith("blocks."):
        _, index, part = head.split(".")
        return f"blocks.{index}.{GOLDEN_BLOCK[part]}.{leaf}"
    whole = {"cls": "cls_token", "pos": "pos_embed"}
    return whole.get(name) or f"{ {'patch': 'patch_embed.proj', 'ln_out': 'norm', 'ln': 'norm'}[head] }.{leaf}"


def random_views(
    images=4, *, size=16, local=8, n_local=2, patch=4, windows=(2, 1), seed=0, dtype=torch.float64
) -> Views:
    """A batch of random pixels with overlapping boxes, stratified samples, masks on the global crops, and labels."""
    g = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)

    def view(side: int, window: int, masked: bool = False) -> View:
        from triptych.data.crops import stratified_sample

        low = torch.rand(images, 2, generator=g, dtype=dtype) * 0.3
        high = low + 0.4 + torch.rand(images, 2, generator=g, dtype=dtype) * 0.3
        box = torch.cat([low, high], 1)
        flip = torch.rand(images, generator=g) < 0.5
        box = torch.where(flip[:, None], box[:, [0, 3, 2, 1]], box)
        samples = [stratified_sample((side // patch,) * 2, window, rng) for _ in range(images)]
        pixels = torch.randn(images, 3, side, side, generator=g, dtype=dtype)
        mask = keep = corrupted = pixel_mask = None
        if masked:  # one image without a hidden patch
            mask = torch.rand(images, (side // patch) ** 2, generator=g) < 0.4
            mask[0] = False
            patches = mask.shape[1]
            keep = torch.stack([torch.randperm(patches, generator=g)[: patches * 5 // 8].sort()[0] for _ in mask])
            pixel_mask = torch.rand(images, side, side, generator=g) < 0.5
            noise = torch.randn(images, 3, side, side, generator=g, dtype=dtype)
            corrupted = torch.where(pixel_mask[:, None], noise, pixels)
        drawn = torch.from_numpy(np.stack(samples))
        pixel = torch.full((images, 2), 0.01, dtype=dtype)
        hidden = None if mask is None else mask.flatten().nonzero()[:, 0]
        return View(pixels, box, pixel, drawn, mask, keep, corrupted, pixel_mask, hidden=hidden)

    crops = [view(size, windows[0], masked=True) for _ in range(2)], [view(local, windows[1]) for _ in range(n_local)]
    return Views(*crops, labels=torch.arange(images) % 3)


def of_images(views: Views, change) -> Views:
    """The views with their images chosen or ordered anew: `change` takes a tensor with one row per image."""

    def counted(view: View) -> View:
        return view if view.mask is None else replace(view, hidden=view.mask.flatten().nonzero()[:, 0])

    changed = views.map(change)
    return Views([counted(v) for v in changed.global_crops], changed.local_crops, changed.labels)
