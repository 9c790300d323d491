"""Our training steps beside each other, on the same crops: what MTE adds to DINO, and how UDI and iBOT compare.

    python benchmarks/step.py --batch 4 --methods dino mte_dino

ViT-S/16 recipes for ImageNet-1k with 65536 prototypes (iBOT 8192), on 2 x 224 crops and on 2 x 224 + 10 x 96.  The
authors' code is in official.py, the prototype loss alone in prototype_loss.py.
"""

import argparse
import sys
from pathlib import Path

import torch

from ours import Ours, peak_mib, sized
from timing import RESULTS, Ratio, report, rounds_of
from triptych.recipes import RECIPES

RECIPE = {
    "dino": "dino_vits16_2crop_in1k_100ep",
    "mte_dino": "mte_dino_vits16_2crop_in1k_100ep",
    "ibot": "ibot_vits16_in1k_100ep",
    "udi": "udi_vits16_in1k_300ep",
}
GOAL = {"mte_dino": "<= 1.08"}  # of DINO's time


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(RECIPE), default=["dino", "mte_dino"])
    parser.add_argument("--arch", default="vit_small_patch16_224", help="timm's name")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--locals", type=int, nargs="+", default=[0, 10], help="local crops")
    parser.add_argument("--prototypes", type=int, help="default: the recipes'")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: this process's CPU seconds")
    parser.add_argument("--memory", action="store_true", help="peak memory of a step too")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    rows = [row for n in options.locals for dtype in options.dtypes for row in beside_the_first(n, dtype, options)]
    table = [
        "| crops, dtype | method | images/s | time over the first: median [least, most] of rounds | goal | MiB |",
        "|---" * 6 + "|",
    ]
    for r in rows:
        crops = f"2 + {r['local_crops']}" if r["local_crops"] else "2"
        cells = [f"{crops}, {r['dtype']}", r["method"], f"{r['batch'] / min(r['seconds']):.2f}"]
        cells += [str(Ratio(**r["over_first"])), GOAL.get(r["method"], "-"), f"{r.get('mib', 0):.0f}"]
        table.append(f"| {' | '.join(cells)} |")
    title = f"Training steps beside each other, {options.arch} on {options.device}, clock: {options.clock}"
    report("step", title, f"python benchmarks/step.py {' '.join(words)}", table, rows, folder=options.out)


def beside_the_first(local_crops: int, dtype: str, options: argparse.Namespace) -> list[dict]:
    """One row per method."""
    asked = {"arch": options.arch, "batch": options.batch, "local_crops": local_crops}
    asked |= {"prototypes": options.prototypes, "checkpoint": options.checkpointing}
    asked |= {"compile": "on" if options.compile else "off"}
    recipes = {name: sized(RECIPES[RECIPE[name]](), **asked) for name in options.methods}
    steps = {name: Ours(recipe, options.device, getattr(torch, dtype)) for name, recipe in recipes.items()}
    seconds = rounds_of(steps, options.rounds, options.clock)
    first, rows = seconds[options.methods[0]], []
    for name, step in steps.items():
        row = {"method": name, "local_crops": local_crops, "dtype": dtype, "batch": options.batch}
        row |= {"arch": options.arch, "device": options.device, "checkpointing": options.checkpointing}
        row |= {"compile": options.compile, "clock": options.clock, "seconds": seconds[name]}
        row |= {"over_first": vars(Ratio.of(seconds[name], first))}
        rows.append(row | ({"mib": peak_mib(step, options.device)} if options.memory else {}))
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
