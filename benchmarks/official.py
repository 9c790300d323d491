"""Our training step beside the authors' own: DINO, iBOT and UDI, the same weights, crops, pixels and step order.

    python benchmarks/official.py --against dino=../dino ibot=../ibot udi=../udi --batch 4 --memory

Each path is a checkout of that method's repository (facebookresearch/dino, bytedance/ibot, ISL-CV/udi), or a folder
that holds the package lightly.  First both sides take three steps without stochastic depth, and their losses must
agree; then they take turns.  Settings: those of our ViT-S/16 recipes for ImageNet-1k.

dtypes: float32, bfloat16 (autocast on both sides), float16 (theirs with autocast and a gradient scaler as released,
ours in bfloat16).  With both float32 and bfloat16 on the CPU a further row compares theirs as shipped, which is fp32
there, with ours in bfloat16.  --clock cpu counts this process's CPU seconds: on a shared machine, with --threads 1.
"""

import argparse
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

import lightly_step
import theirs
from checkouts import Checkout, one_process
from ours import NOW, PRECISION, Ours, Step, peak_mib, same_losses, sized
from timing import RESULTS, Ratio, report, rounds_of
from triptych.errors import UserError
from triptych.recipe import Recipe
from triptych.recipes import RECIPES


@dataclass(frozen=True)
class Goal:
    """Of issue 5: how many times faster, and the share of their memory."""

    shipped: float  # on the CPU, ours in bf16 against theirs in fp32
    same: float  # on the CPU, the same dtype
    fp16: float  # on an H200, ours in bf16 against theirs in fp16
    memory: float
    memory_checkpointing: float = 0.3


RECIPE = {
    "dino": "dino_vits16_in1k_100ep",
    "ibot": "ibot_vits16_multicrop_in1k_100ep",
    "udi": "udi_vits16_in1k_300ep",
    "lightly": "dino_vits16_in1k_100ep",
}
GOALS = {
    "dino": Goal(5.0, 1.8, 2.5, 0.5),
    "ibot": Goal(4.5, 1.6, 2.5, 0.4),
    "udi": Goal(6.0, 2.5, 3.0, 0.3),
}
LIGHTLY = 2.2  # times faster than lightly in bf16


def comparisons(dtypes: list[str], device: str) -> list[tuple[torch.dtype, torch.dtype]]:
    """(theirs, ours)"""
    named = {name: getattr(torch, name) for name in dtypes}
    pairs = [(d, torch.bfloat16 if d == torch.float16 else d) for d in named.values()]
    if device == "cpu" and {"float32", "bfloat16"} <= set(dtypes):
        pairs.append((torch.float32, torch.bfloat16))
    return pairs


def sides(name: str, code: Checkout, recipe: Recipe, device: str, dtype: torch.dtype) -> tuple[theirs.Step, Ours]:
    """Their step and ours, from equal weights, on equal batches."""
    ours = Ours(recipe, device, dtype if dtype in PRECISION else torch.bfloat16)
    made = theirs.NETWORKS[name] if name != "lightly" else lightly_step.networks
    networks = made(code, ours.method, ours.views, NOW, recipe.encoder.drop_path)  # type: ignore[arg-type]
    return theirs.Step(networks, recipe, NOW, ours.method.momentum(NOW), device, dtype), ours  # type: ignore[operator]


def compare(name: str, code: Checkout, options: argparse.Namespace) -> list[dict]:
    """One row per comparison.  Raises UserError where the two sides do not compute the same losses."""
    asked = {"arch": f"{options.arch}_patch16_224", "batch": options.batch, "local_crops": options.locals}
    recipe = sized(RECIPES[RECIPE[name]](), **asked, prototypes=options.prototypes, drop_path=options.drop_path)
    if name == "lightly":
        recipe = lightly_step.as_theirs(recipe)
    mine = sized(recipe, checkpoint=options.checkpointing, compile="on" if options.compile else "off")
    differences = same_losses(*sides(name, code, sized(mine, drop_path=0.0), options.device, torch.float32))
    print(f"{name}: losses of three updates differ by {', '.join(f'{d:.1e}' for d in differences)}", flush=True)
    pairs = comparisons(options.dtypes, options.device)
    steps: dict[str, Step] = {}
    for dtype in dict.fromkeys(d for d, _ in pairs):
        steps[f"theirs {dtype}"] = sides(name, code, recipe, options.device, dtype)[0]
    for dtype in dict.fromkeys(d for _, d in pairs):
        steps[f"ours {dtype}"] = Ours(mine, options.device, dtype)
    seconds = rounds_of(steps, options.rounds, options.clock)
    memory = {key: peak_mib(step, options.device) for key, step in steps.items()} if options.memory else {}
    rows = []
    for their_dtype, our_dtype in pairs:
        a, b = f"theirs {their_dtype}", f"ours {our_dtype}"
        ratio = Ratio.of(seconds[a], seconds[b])
        row = {"method": name, "theirs": str(their_dtype)[6:], "ours": str(our_dtype)[6:]}
        row |= {"theirs_s": seconds[a], "ours_s": seconds[b], "ratio": vars(ratio), "loss_differences": differences}
        row |= {"batch": recipe.batch, "local_crops": recipe.views.local_crops, "arch": options.arch}
        row |= {"prototypes": recipe.method.prototypes, "drop_path": options.drop_path}  # type: ignore[union-attr]
        row |= {"device": options.device, "checkpointing": options.checkpointing, "compile": options.compile}
        row |= {"clock": options.clock, "goal": goal(name, their_dtype, our_dtype, options.device)}
        if memory:
            goals = GOALS.get(name)
            least = goals and (goals.memory_checkpointing if options.checkpointing else goals.memory)
            row |= {"theirs_mib": memory[a], "ours_mib": memory[b], "memory_goal": least}
        rows.append(row)
    return rows


def goal(name: str, their_dtype: torch.dtype, our_dtype: torch.dtype, device: str) -> float | None:
    """Times faster that issue 5 asks for; None where it says nothing."""
    if name == "lightly":
        return LIGHTLY if device == "cpu" and their_dtype == torch.bfloat16 else None
    goals = GOALS[name]
    if device == "cuda":
        return goals.fp16 if their_dtype == torch.float16 else None
    if their_dtype != our_dtype:
        return goals.shipped
    return None if name == "dino" and their_dtype == torch.float32 else goals.same


def table_of(rows: list[dict]) -> list[str]:
    table = [
        "| method | theirs | ours | theirs s/step | ours s/step | times faster: median [least, most] of rounds | goal |"
        " memory above weights, MiB | ratio | goal |",
        "|---" * 10 + "|",
    ]
    for r in rows:
        crops = f"2 + {r['local_crops']}, batch {r['batch']}, K = {r['prototypes']}"
        cells = [f"{r['method']}, {crops}", r["theirs"], r["ours"], f"{min(r['theirs_s']):.2f}"]
        cells += [f"{min(r['ours_s']):.2f}", str(Ratio(**r["ratio"])), f">= {r['goal']}" if r["goal"] else "-"]
        if "ours_mib" in r:
            share = r["ours_mib"] / r["theirs_mib"]
            cells += [f"{r['theirs_mib']:.0f} -> {r['ours_mib']:.0f}", f"{share:.2f}"]
            cells += [f"<= {r['memory_goal']}" if r["memory_goal"] and r["theirs"] == r["ours"] else "-"]
        table.append(f"| {' | '.join(cells + ['-'] * (10 - len(cells)))} |")
    return table


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", nargs="+", required=True, metavar="METHOD=PATH", help=", ".join(RECIPE))
    parser.add_argument("--arch", default="vit_small", choices=["vit_tiny", "vit_small", "vit_base"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--locals", type=int, help="local crops; default: the recipe's (DINO 8, iBOT and UDI 10)")
    parser.add_argument("--prototypes", type=int, help="default: the recipe's (65536, iBOT 8192)")
    parser.add_argument("--drop-path", type=float, default=0.1, help="while timing")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"], default=["float32"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--memory", action="store_true", help="peak memory of a step too")
    parser.add_argument("--checkpointing", action="store_true", help="ours computes activations again")
    parser.add_argument("--compile", action="store_true", help="ours with torch.compile")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args(words)
    unknown = [x for x in options.against if x.partition("=")[0] not in RECIPE or "=" not in x]
    if unknown:
        parser.error(f"--against {unknown[0]}: give METHOD=PATH with one of {', '.join(RECIPE)}")
    if options.device == "cpu" and "float16" in options.dtypes:
        parser.error("--dtypes float16 is for --device cuda: the authors' mixed precision runs there only")
    if options.compile and options.memory and options.device == "cpu":
        parser.error("--memory counts no tensors of compiled code on the CPU: leave one of --compile, --memory out")
    return options


def main(words: list[str]) -> None:
    options = parse(words)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of their weight_norm
    torch.set_num_threads(options.threads or torch.get_num_threads())
    torch.backends.cudnn.allow_tf32 = False  # fp32 is to mean fp32 while losses are compared
    paths = dict(x.split("=", 1) for x in options.against)
    modules = theirs.MODULES | {"lightly": lightly_step.MODULES}
    rows, commits = [], {}
    with one_process(options.device):
        for name, path in paths.items():
            code = Checkout(Path(path), *modules[name])
            commits[name] = code.commit
            rows += compare(name, code, options)
    about = {"checkouts": commits, "threads": torch.get_num_threads()}
    title = f"Training step beside the authors' code, {options.arch} on {options.device}, clock: {options.clock}"
    command = f"python benchmarks/official.py {' '.join(words)}"
    report(f"official-{'-'.join(paths)}", title, command, table_of(rows), rows, about, options.out)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))
