"""An encoder for other software: weights under timm's names, a config that timm reads, a model card."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from triptych.encoders import Encoder
from triptych.encoders.load import Loaded
from triptych.errors import UserError
from triptych.evals.features import weights_hash

# In a fresh process, with timm alone.
_CHECK = """
import sys, timm, torch
from safetensors.torch import load_file, save_file
folder, images, out = sys.argv[1:]
model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
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
    save_file({k: v.contiguous() for k, v in encoder.trunk.state_dict().items()}, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(timm_config(encoder, loaded, pixels), indent=2) + "\n")
    native = encoder.native_size[0]
    difference = compare_with_timm(encoder, out, native)
    if not difference <= 1e-3:
        raise RuntimeError(f"timm reads {out} as another model: its tokens differ by {difference:.3g}; do not use it")
    (out / "README.md").write_text(card(encoder, loaded, pixels, native, difference))
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
        "classifier": "head",
    }
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": encoder.width,
        "model_args": arguments,
        "pretrained_cfg": preprocessing,
        "triptych": {"tokens": vars(encoder.spec), "positions": encoder.positions},
    }


@torch.no_grad()
def compare_with_timm(encoder: Encoder, folder: Path, size: int) -> float:
    """Largest absolute difference of all final tokens on four random images."""
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    ours = encoder.as_timm(encoder(images))
    with tempfile.TemporaryDirectory() as scratch:
        save_file({"images": images}, Path(scratch) / "images")
        files = [str(folder.resolve()), str(Path(scratch) / "images"), str(Path(scratch) / "tokens")]
        done = subprocess.run([sys.executable, "-c", _CHECK, *files], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"timm cannot load what was written to {folder}:\n{done.stderr}")
        theirs = load_file(files[-1])["tokens"]
    return (ours - theirs).abs().max().item()


def card(encoder: Encoder, loaded: Loaded, pixels: int, native: int, difference: float) -> str:
    """The model card."""
    from triptych.run_folder import provenance

    about, spec = provenance(), encoder.spec
    parameters = sum(p.numel() for p in encoder.trunk.parameters()) / 1e6
    order = ["class"] * spec.cls + ["class+"] * spec.cls_plus + [f"{spec.register} registers"] * bool(spec.register)
    plus = "\nClass+ is UDI's second class token: token 1 of `forward_features`.\n" if spec.cls_plus else ""
    return f"""---
library_name: timm
tags: [image-feature-extraction, self-supervised]
---
# {loaded.name}

A vision transformer ({parameters:.1f} M parameters, patches of {encoder.patch_size} px, width {encoder.width}, \
{encoder.depth} blocks), pre-trained without labels by Triptych {about["triptych"]} (commit {about["commit"]}).

```python
import timm
model = timm.create_model("local-dir:PATH/OF/THIS/FOLDER", pretrained=True).eval()
tokens = model.forward_features(images)  # (B, tokens, {encoder.width})
```
Tokens, in order: {", ".join([*order, "patches row by row"])}.
{plus}
- Images: {pixels} px, mean {loaded.mean}, std {loaded.std}.
- Weights: sha256 prefix {weights_hash(encoder)}.
- Checked when written: timm {__import__("timm").__version__} in a fresh process gives the same tokens on four random \
images of {native} px, largest difference {difference:.3g}.
- Positions on other grids: trained with the "{encoder.positions}" resampling; timm resamples its own way.
- The weights are yours: Triptych claims no rights in what it trains.
"""
