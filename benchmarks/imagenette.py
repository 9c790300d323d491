"""DINO and UDI on imagenette128, the same encoder and the same steps, against the untrained encoder: k-NN and linear.

    python benchmarks/imagenette.py --data ../shared/data/imagenette128 --out runs/imagenette

About 40 minutes on two cores.

Trains (or resumes) both runs at the same time, evaluates on the val split and writes a file to benchmarks/results.
Linear: learning rate chosen on a held-out tenth of train; the last epoch counts.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import yaml

from timing import report as write_report
from triptych.run_frozen import Asked, eval_knn, eval_linear

# What makes the small recipes fit into 40 minutes on two cores without bf16 units.
BUDGET = """
    --encoder.image_size 48 --views.global_size 48 --views.local_size 24 --views.local_crops 4
    --encoder.width 128 --encoder.heads 4 --encoder.depth 4 --batch 16 --optim.lr 8e-3 --loader.workers 0
""".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.zip and val.zip")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4)
    options, extra = parser.parse_known_args()
    train_data, val_data = (str(options.data / f"{split}.zip") for split in ("train", "val"))
    words = [*BUDGET, "--epochs", str(options.epochs), *extra]
    runs = {name: ["--recipe", name, *words] for name in ("dino_small", "udi_small")}
    trained = train_side_by_side(runs, train_data, options.out)
    rows = []
    for name, (minutes, images_per_second) in trained.items():
        for which in ("untrained", "teacher"):
            for token in ("cls", "cls_plus", "patch_mean") if name == "udi_small" else ("cls", "patch_mean"):
                row = measure(options, name, which, token, train_data, val_data)
                rows.append(row | {"minutes": minutes, "images_per_second": images_per_second})
    report(rows, options, words)


def train_side_by_side(runs: dict[str, list[str]], data: str, out: Path) -> dict[str, tuple[float, float]]:
    """All runs at the same time, each on its share of the cores: words of `triptych train` by folder under `out`.

    -> minutes and images/s of each
    """
    threads = max(1, (os.cpu_count() or 1) // len(runs))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "triptych", "train", "--data", data, "--out"]
    running = {
        name: subprocess.Popen([*command, str(out / name), *words], env=environment) for name, words in runs.items()
    }
    trained: dict[str, tuple[float, float]] = {}
    while len(trained) < len(running):
        time.sleep(1)
        for name, run in running.items():
            if run.poll() is not None and name not in trained:
                if run.returncode:
                    sys.exit(f"{name} ended with exit code {run.returncode}")
                trained[name] = minutes_and_rate(out / name)
    return trained


def minutes_and_rate(run: Path) -> tuple[float, float]:
    """Of all its steps, also those before an interruption: minutes, images per second."""
    batch = yaml.safe_load((run / "recipe.yaml").read_text())["batch"]
    rates = [json.loads(line).get("images_per_second") for line in (run / "metrics.jsonl").open()]
    seconds = sum(batch / rate for rate in rates if rate)
    return seconds / 60, batch * sum(1 for rate in rates if rate) / seconds


def measure(options, name: str, which: str, token: str, train_data: str, val_data: str) -> dict:
    run, out = str(options.out / name), options.out / "results.jsonl"
    asked = Asked(train_data, val_data, out, [token], encoder={"weights": which})
    (near,), (flat,) = eval_knn(run, asked, k=[10, 20]), eval_linear(run, asked, epochs=50)
    row = {"run": name, "weights": which, "token": token, "knn10": near["top1"][10], "knn20": near["top1"][20]}
    return row | {"linear": flat["top1"], "lr": flat["lr"]}


def report(rows: list[dict], options, words: list[str]) -> None:
    table = [
        f"Seed 0. Settings over the small recipes: `{' '.join(words)}`. Both runs at once, half the cores each.",
        "Linear: rate chosen on a held-out tenth of train, last epoch.",
        "",
        "| run | encoder | token | 10-NN % | 20-NN % | linear % (rate) | minutes | images/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cost = f"{r['minutes']:.1f} | {r['images_per_second']:.0f}" if r["weights"] == "teacher" else "- | -"
        table.append(
            f"| {r['run']} | {r['weights']} | {r['token']} | {r['knn10']:.1f} | {r['knn20']:.1f} | "
            f"{r['linear']:.1f} ({r['lr']:g}) | {cost} |"
        )
    names = sorted({r["run"] for r in rows})
    commits = {name: json.loads((options.out / name / "run.json").read_text())["commit"] for name in names}
    table.insert(1, f"Commits on which training began: `{json.dumps(commits)}`.")
    command = f"python benchmarks/imagenette.py --data {options.data} --out {options.out} --epochs {options.epochs}"
    write_report("imagenette", "DINO and UDI on imagenette128", command, table)


if __name__ == "__main__":
    main()
