"""An encoder for other software: weights under timm's names, a config that timm reads, a model card."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from triptych.encoders import Encoder, Swin, ViT
from triptych.encoders.load import Loaded
from triptych.encoders.load_swin import official_names
from triptych.errors import UserError
from triptych.evals.features import encoder_hash

# Of the layer norms in timm's models; no argument that JSON can hold changes it.
_TIMM_EPS = {Swin: 1e-5, ViT: 1e-6}
_SET_EPS = """
for module in model.modules():
    if isinstance(module, torch.nn.LayerNorm):
        module.eps = {eps}
"""

# In a fresh process, with timm alone.
_CHECK = """
import sys, timm, torch
from safetensors.torch import load_file, save_file
folder, images, out = sys.argv[1:]
model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
SET_EPS
with torch.no_grad():
    save_file({"tokens": model.forward_features(load_file(images)["images"])}, out)
"""


def export(loaded: Loaded, out: Path, *, size: int | None = None) -> float:
    """Write the encoder without training-only tokens to the new folder `out`.

    -> the largest absolute difference between its tokens here and in timm in a fresh process (also in the card).
    Raises UserError where the folder is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: give a new folder")
    pixels = size or loaded.size
    loaded.encoder.grid(pixels, pixels)
    out.mkdir(parents=True, exist_ok=True)
    encoder = loaded.encoder.without("aux").without("mask").cpu().float().eval()
    state = {k: v.contiguous() for k, v in encoder.trunk.state_dict().items()}
    save_file(official_names(state) if isinstance(encoder, Swin) else state, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(timm_config(encoder, loaded, pixels), indent=2) + "\n")
    difference = compare_with_timm(encoder, out)
    if not difference <= 1e-3:
        raise RuntimeError(f"timm reads {out} as another model: its tokens differ by {difference:.3g}; do not use it")
    (out / "README.md").write_text(card(encoder, loaded, pixels, difference))
    return difference


def timm_config(encoder: Encoder, loaded: Loaded, pixels: int) -> dict:
    """What `timm.create_model("local-dir:...")` needs, and under "triptych" what our roles need."""
    architecture, arguments = encoder.timm_arguments()
    preprocessing = {
        "input_size": [3, pixels, pixels],
        "fixed_input_size": False,
        "interpolation": "bicubic",
        "crop_pct": 224 / 256,
        "mean": list(loaded.mean),
        "std": list(loaded.std),
        "num_classes": 0,
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc" if isinstance(encoder, Swin) else "head",
    }
    ours: dict = {"tokens": vars(encoder.spec), "norm_eps": encoder.norm_eps}
    if isinstance(encoder, ViT):
        ours["positions"] = encoder.positions
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": encoder.width,
        "model_args": arguments,
        "pretrained_cfg": preprocessing,
        "triptych": ours,
    }


def _set_eps(encoder: Encoder) -> str:
    """The lines of Python that timm's model needs after loading."""
    return _SET_EPS.format(eps=encoder.norm_eps) if encoder.norm_eps != _TIMM_EPS[type(encoder)] else ""


@torch.no_grad()
def compare_with_timm(encoder: Encoder, folder: Path) -> float:
    """Largest absolute difference of all final tokens on four random images of the encoder's native size."""
    images = torch.randn(4, 3, *encoder.native_size, generator=torch.Generator().manual_seed(0))
    ours = encoder.as_timm(encoder(images))
    with tempfile.TemporaryDirectory() as scratch:
        save_file({"images": images}, Path(scratch) / "images")
        files = [str(folder.resolve()), str(Path(scratch) / "images"), str(Path(scratch) / "tokens")]
        check = _CHECK.replace("SET_EPS", _set_eps(encoder))
        done = subprocess.run([sys.executable, "-c", check, *files], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"timm cannot load what was written to {folder}:\n{done.stderr}")
        theirs = load_file(files[-1])["tokens"]
    return (ours - theirs).abs().max().item()


def card(encoder: Encoder, loaded: Loaded, pixels: int, difference: float) -> str:
    """The model card."""
    from triptych.run_folder import provenance

    about = provenance()
    parameters = sum(p.numel() for p in encoder.trunk.parameters()) / 1e6
    kind, layout, sizes = _about_swin(encoder) if isinstance(encoder, Swin) else _about_vit(encoder)
    set_eps = _set_eps(encoder).rstrip()
    eps = ""
    if set_eps:
        usual = _TIMM_EPS[type(encoder)]
        eps = f"\n- It was trained with ε {encoder.norm_eps:g} in its layer norms, where timm builds {usual:g}."
    return f"""---
library_name: timm
tags: [image-feature-extraction, self-supervised]
---
# {loaded.name}

{kind} ({parameters:.1f} M parameters, patches of {encoder.patch_size} px, width {encoder.width}, \
{encoder.depth} blocks), pre-trained without labels by Triptych {about["triptych"]} (commit {about["commit"]}).

```python
import timm{", torch" if set_eps else ""}
model = timm.create_model("local-dir:PATH/OF/THIS/FOLDER", pretrained=True).eval(){set_eps}
tokens = model.forward_features(images)  {layout}

- Images: {pixels} px, mean {loaded.mean}, std {loaded.std}.
- Weights: sha256 prefix {encoder_hash(encoder)}.
- Checked when written: timm {__import__("timm").__version__} in a fresh process gives the same tokens on four random \
images of {"x".join(map(str, encoder.native_size))} px, largest difference {difference:.3g}.
- {sizes}{eps}
- The weights are yours: Triptych claims no rights in what it trains.
"""


def _about_vit(encoder: Encoder) -> tuple[str, str, str]:
    """-> what it is, the layout of its tokens, what happens at other sizes"""
    spec = encoder.spec
    order = ["class"] * spec.cls + ["class+"] * spec.cls_plus + [f"{spec.register} registers"] * bool(spec.register)
    layout = f"# (B, tokens, {encoder.width})\n```\nTokens, in order: {', '.join([*order, 'patches row by row'])}.\n"
    if spec.cls_plus:
        layout += "\nClass+ is UDI's second class token: token 1 of `forward_features`.\n"
    sizes = f'Positions on other grids: trained with the "{encoder.positions}" resampling; timm resamples its own way.'
    return "A vision transformer", layout, sizes


def _about_swin(encoder: Swin) -> tuple[str, str, str]:
    layout = f"""# (B, rows, columns, {encoder.width})
```
Tokens: one per {encoder.patch_size} px, no class token; an image's vector is their mean, `tokens.mean((1, 2))`.
"""
    sizes = (
        "Other sizes: timm's tokens are Triptych's where windows tile the grid of every stage; elsewhere timm shifts "
        "before it pads, Triptych after, as iBOT does."
    )
    return "A Swin transformer", layout, sizes
