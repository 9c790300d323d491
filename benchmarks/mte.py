"""Does MTE help?  DINO against MTE(DINO), and BYOL against MTE(BYOL), the same steps, on imagenette128.

    python benchmarks/mte.py --data ../shared/data/imagenette128 --out runs/mte

About 60 minutes on two cores; with a GPU: --epochs 100 --workers 8.

Trains (or resumes) each base beside its MTE variant, then measures on the val split: the global token before and after
the auxiliary tokens are removed, and the auxiliary tokens fused and side by side; k-NN and linear.  Writes a file to
benchmarks/results.  Linear: learning rate chosen on a held-out tenth of train; the last epoch counts.
"""

import argparse
import json
from pathlib import Path

from imagenette import train_side_by_side
from timing import report as write_report
from triptych import run_evals
from triptych.run_frozen import Asked, eval_knn, eval_linear

# What makes the small recipes fit into an hour on two cores without bf16 units.
SIZE = "--encoder.image_size 48 --views.global_size 48 --encoder.width 128 --encoder.heads 4 --encoder.depth 4".split()
BUDGET = {
    "dino_small": "--views.local_size 24 --views.local_crops 4 --batch 16 --optim.lr 8e-3".split(),
    "byol_small": [],
}
EPOCHS = {"dino_small": 4, "byol_small": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.zip and val.zip")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bases", nargs="+", default=list(BUDGET), choices=list(BUDGET))
    parser.add_argument("--epochs", type=int, help=f"of every run; default {EPOCHS}")
    parser.add_argument("--workers", type=int, default=0, help="of each run's loader")
    options, extra = parser.parse_known_args()
    data = tuple(str(options.data / f"{split}.zip") for split in ("train", "val"))
    table = [
        "Seed 0, both runs of a pair at once, half the cores each.  Linear: rate chosen on a held-out tenth of train, "
        "last epoch.",
        "",
        "| run | what | 10-NN % | linear % | minutes | images/s |",
        "|---|---|---|---|---|---|",
    ]
    notes = []
    for base in options.bases:
        epochs = options.epochs or EPOCHS[base]
        words = [*SIZE, *BUDGET[base], "--loader.workers", str(options.workers), "--epochs", str(epochs), *extra]
        pair = {name: ["--recipe", name, *words] for name in (base, f"mte_{base}")}
        trained = train_side_by_side(pair, data[0], options.out)
        commits = {name: json.loads((options.out / name / "run.json").read_text())["commit"] for name in trained}
        notes += ["", f"{base}: `{' '.join(words)}`; commits on which training began `{json.dumps(commits)}`."]
        out = options.out / "results.jsonl"
        cost = {name: f"{minutes:.1f} | {rate:.0f}" for name, (minutes, rate) in trained.items()}
        table.append(
            f"| {base} | untrained, class token | {of_global(options.out / base, 'untrained', data, out)} | - | - |"
        )
        plain = of_global(options.out / base, "teacher", data, out)
        table.append(f"| {base} | class token | {plain} | {cost[base]} |")
        rows = of_tokens(options.out / f"mte_{base}", data, out)
        table += [f"| mte_{base} | {what} | {cost[f'mte_{base}']} |" for what in rows]
    write_report("mte", "MTE over DINO and over BYOL on imagenette128", command(options), table + notes)


def of_global(run: Path, weights: str, data: tuple[str, ...], out: Path) -> str:
    """k-NN and linear of a run's class token."""
    asked = Asked(data[0], data[1], out, ["cls"], encoder={"weights": weights})
    (near,), (flat,) = eval_knn(str(run), asked, k=[10]), eval_linear(str(run), asked, epochs=50)
    return f"{near['top1'][10]:.1f} | {flat['top1']:.1f}"


def of_tokens(run: Path, data: tuple[str, ...], out: Path) -> list[str]:
    """Of an MTE run: the global token before and after removal, the fused vector, all auxiliary tokens."""
    found = run_evals.eval_tokens(str(run), data[0], data[1], out, weights="teacher", size=None, k=10, probe=True)
    flat = {name: f"{probe['top1']:.1f}" for name, probe in found["linear"].items()}
    exact = "to the last bit" if found["removal_is_exact"] else f"difference {found['removal_difference']:.3g}"
    flat["global before removal"] = f"the same ({exact})"
    best = max((v, k) for k, v in found["knn"].items() if k.split()[0] in ("aux", "pooled"))
    names = "global before removal", "global after removal", "fused embedding", "auxiliary tokens concatenated"
    rows = [f"{name} | {found['knn'][name]:.1f} | {flat.get(name, '-')}" for name in names]
    return [*rows, f"best single auxiliary token ({best[1]}) | {best[0]:.1f} | -"]


def command(options) -> str:
    words = f"python benchmarks/mte.py --data {options.data} --out {options.out} --bases {' '.join(options.bases)}"
    return words + (f" --epochs {options.epochs}" if options.epochs else "")


if __name__ == "__main__":
    main()
