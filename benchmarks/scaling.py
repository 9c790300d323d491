"""Does twice the work take at most twice the time?  Our training steps with images, local crops or prototypes doubled.

python benchmarks/scaling.py --recipes dino_vits16_in1k_100ep udi_vits16_in1k_300ep --batch 2 --memory
"""

import argparse
import sys
from pathlib import Path

import torch

from ours import Ours, peak_mib, sized
from timing import RESULTS, Ratio, report, rounds_of
from triptych.recipes import RECIPES

DOUBLED = ("batch", "local_crops", "prototypes")
DEFAULT = "dino_vits16_in1k_100ep ibot_vits16_multicrop_in1k_100ep udi_vits16_in1k_300ep".split()


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=DEFAULT, metavar="RECIPE")
    parser.add_argument("--arch", default="vit_small_patch16_224", help="timm's name")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--locals", type=int, default=4, help="local crops")
    parser.add_argument("--prototypes", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: this process's CPU seconds")
    parser.add_argument("--memory", action="store_true", help="peak memory of a step too")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    rows = [row for name in options.recipes for row in doublings(name, options)]
    size = f"batch {options.batch}, 2 + {options.locals} crops, K = {options.prototypes}"
    table = [
        f"Before doubling: {size}, {options.dtype}.  Goal: at most 2.",
        "",
        "| recipe | doubled | time over the undoubled: median [least, most] of rounds | memory over the undoubled |",
        "|---" * 4 + "|",
    ]
    for r in rows:
        memory = f"{r['mib'][1] / r['mib'][0]:.2f}" if "mib" in r else "-"
        table.append(f"| {r['recipe']} | {r['doubled']} | {Ratio(**r['ratio'])} | {memory} |")
    title = f"Training steps with twice the work, {options.arch} on {options.device}, clock: {options.clock}"
    report("scaling", title, f"python benchmarks/scaling.py {' '.join(words)}", table, rows, folder=options.out)


def doublings(name: str, options: argparse.Namespace) -> list[dict]:
    """One row for each of DOUBLED."""
    base = {"batch": options.batch, "local_crops": options.locals, "prototypes": options.prototypes}
    sizes = {"": base} | {what: base | {what: 2 * base[what]} for what in DOUBLED}
    recipes = {what: sized(RECIPES[name](), arch=options.arch, **size) for what, size in sizes.items()}
    steps = {what: Ours(recipe, options.device, getattr(torch, options.dtype)) for what, recipe in recipes.items()}
    seconds = rounds_of(steps, options.rounds, options.clock)
    memory = {what: peak_mib(step, options.device) for what, step in steps.items()} if options.memory else {}
    rows = []
    for what in DOUBLED:
        row = {"recipe": name, "doubled": what, "arch": options.arch, "dtype": options.dtype} | base
        row |= {"device": options.device, "clock": options.clock, "seconds": [seconds[""], seconds[what]]}
        row |= {"ratio": vars(Ratio.of(seconds[what], seconds[""]))}
        rows.append(row | ({"mib": [memory[""], memory[what]]} if memory else {}))
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
