"""DINO and UDI on imagenette128, the same encoder and the same steps, against the untrained encoder: k-NN and linear.

    python benchmarks/imagenette.py --data ../shared/data/imagenette128 --out runs/imagenette

About 40 minutes on two cores.

Trains (or resumes) both runs, evaluates on the val split and writes benchmarks/results/imagenette_HARDWARE_DATE.md.
Linear: learning rate chosen on a held-out tenth of train; the last epoch counts.
"""

import argparse
import datetime
import json
import platform
import time
from pathlib import Path

import torch

from triptych import commands
from triptych.data.sources import open_source
from triptych.run_folder import provenance
from triptych.settings import parse_overrides, resolve
from triptych.train import train

RESULTS = Path(__file__).parent / "results"
# What makes the small recipes fit into 40 minutes on two cores without bf16 units.
BUDGET = """
    --encoder.image_size 48 --views.global_size 48 --views.local_size 24 --views.local_crops 4
    --encoder.width 128 --encoder.heads 4 --encoder.depth 4 --batch 16 --optim.lr 8e-3 --loader.workers 1
""".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.zip and val.zip")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=5)
    options, extra = parser.parse_known_args()
    train_data, val_data = (str(options.data / f"{split}.zip") for split in ("train", "val"))
    overrides = parse_overrides([*BUDGET, "--epochs", str(options.epochs), *extra])
    rows = []
    for name in ("dino_small", "udi_small"):
        recipe, _ = resolve(name, None, overrides)
        began = time.monotonic()
        result = train(recipe, open_source(train_data), options.out / name)
        minutes = (time.monotonic() - began) / 60
        for which in ("untrained", "teacher"):
            for token in ("cls", "cls_plus", "patch_mean") if name == "udi_small" else ("cls", "patch_mean"):
                rows.append(measure(options, name, which, token, train_data, val_data, minutes, result))
    report(rows, options, overrides)


def measure(options, name: str, which: str, token: str, train_data: str, val_data: str, minutes, result) -> dict:
    about = {"weights": which, "arch": None, "size": None, "token": token, "layers": 1, "cache": True}
    run, out = str(options.out / name), options.out / "results.jsonl"
    near = commands.eval_knn(run, train_data, val_data, out, k=[10, 20], temperature=0.07, **about)
    probe = {"epochs": 50, "batch": 256, "select": "held_out", "norm": "none", "seed": 0}
    flat = commands.eval_linear(run, train_data, val_data, out, probe, **about)
    row = {"run": name, "weights": which, "token": token, "knn10": near["top1"][10], "knn20": near["top1"][20]}
    row |= {"linear": flat["top1"], "lr": flat["lr"]}
    return row | ({"minutes": minutes, "images_per_second": result.images_per_second} if which == "teacher" else {})


def report(rows: list[dict], options, overrides: dict) -> None:
    about = provenance() | {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    day = datetime.date.today().isoformat()
    hardware = about["hardware"].split(",")[0].replace(" ", "-").lower()
    command = f"python benchmarks/imagenette.py --data {options.data} --out {options.out} --epochs {options.epochs}"
    lines = [
        f"# DINO and UDI on imagenette128, {day}",
        "",
        f"Command: `{command}`",
        "",
        f"Provenance: `{json.dumps(about)}`; seed 0; settings over the small recipes: `{json.dumps(overrides)}`.",
        "",
        "| run | encoder | token | 10-NN % | 20-NN % | linear % (rate) | minutes | images/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        trained = f"{r['minutes']:.1f} | {r['images_per_second']:.0f}" if "minutes" in r else "- | -"
        lines.append(
            f"| {r['run']} | {r['weights']} | {r['token']} | {r['knn10']:.1f} | {r['knn20']:.1f} | "
            f"{r['linear']:.1f} ({r['lr']:g}) | {trained} |"
        )
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"imagenette_{hardware}_{day}.md"
    file.write_text("\n".join(lines) + "\n")
    print("\n".join(lines), f"\nwritten to {file}")


if __name__ == "__main__":
    main()
