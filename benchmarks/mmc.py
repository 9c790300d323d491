"""What does each loss of MMC do?  All three, and each alone, the same steps, on imagenette128.

    python benchmarks/mmc.py --data ../shared/data/imagenette128 --out runs/mmc

About 60 minutes on two cores; with a GPU: --epochs 100 --workers 8.  `triptych ablate` is the whole of the paper's
Table 4, with fine-tuning.

Trains (or resumes) the runs two at a time, then measures the teacher's class token and mean patch on the val split,
k-NN and linear.  Writes a file to benchmarks/results.  Linear: rate chosen on a held-out tenth of train, last epoch.
"""

import argparse
import json
from pathlib import Path

from imagenette import train_side_by_side
from timing import report as write_report
from triptych.ablation import COMBINATIONS
from triptych.run_frozen import Asked, eval_knn, eval_linear

# What makes the small recipe fit into an hour on two cores without bf16 units.
BUDGET = """
    --encoder.image_size 48 --views.global_size 48 --encoder.width 128 --encoder.heads 4 --encoder.depth 4
""".split()
PAIRS = ("pixels+patch+class", "class"), ("patch", "pixels")
EPOCHS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.zip and val.zip")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--workers", type=int, default=0, help="of each run's loader")
    options, extra = parser.parse_known_args()
    data = str(options.data / "train.zip"), str(options.data / "val.zip")
    words = [*BUDGET, "--loader.workers", str(options.workers), "--epochs", str(options.epochs), *extra]
    trained: dict[str, tuple[float, float]] = {}
    for pair in PAIRS:
        runs = {
            name: ["--recipe", "mmc_small", "--method.weights", *map(str, COMBINATIONS[name]), *words] for name in pair
        }
        trained |= train_side_by_side(runs, data[0], options.out)
    commits = {name: json.loads((options.out / name / "run.json").read_text())["commit"] for name in trained}
    table = [
        "Seed 0; two runs at once, one core each.  Teacher's weights; k-NN with k = 10.  Linear: rate chosen on a "
        "held-out tenth of train, last epoch.",
        f"Settings over `mmc_small`: `{' '.join(words)}`; commits on which training began `{json.dumps(commits)}`.",
        "",
        "| losses | class k-NN % | patch k-NN % | class linear % | patch linear % | minutes | images/s |",
        "|---|---|---|---|---|---|---|",
        f"| none (untrained) | {measure(options.out / 'class', 'untrained', data, options.out)} | - | - |",
    ]
    for name, (minutes, rate) in trained.items():
        row = measure(options.out / name, "teacher", data, options.out)
        table.append(f"| {name} | {row} | {minutes:.1f} | {rate:.0f} |")
    command = f"python benchmarks/mmc.py --data {options.data} --out {options.out} --epochs {options.epochs}"
    write_report("mmc", "MMC and each of its losses alone on imagenette128", command, table)


def measure(run: Path, weights: str, data: tuple[str, str], out: Path) -> str:
    asked = Asked(*data, out / "results.jsonl", ["cls", "patch_mean"], encoder={"weights": weights})
    near = [f"{found['top1'][10]:.1f}" for found in eval_knn(str(run), asked, k=[10])]
    flat = [f"{found['top1']:.1f}" for found in eval_linear(str(run), asked, epochs=50)]
    return " | ".join(near + flat)


if __name__ == "__main__":
    main()
