"""Feature extraction beside DINO's ViT: class tokens of equal weights and images, without gradient.

    python benchmarks/inference.py --against ../dino --batch 16 --dtypes float32 bfloat16

With both dtypes on the CPU a further row compares theirs as shipped (fp32) with ours in bfloat16.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import theirs
from checkouts import Checkout
from official import comparisons
from ours import Ours, sized
from timing import RESULTS, Ratio, report, rounds_of
from triptych.errors import UserError
from triptych.evals.selection import select
from triptych.recipes import RECIPES

GOALS = {("float32", "bfloat16"): 4.5, ("bfloat16", "bfloat16"): 1.25}  # theirs, ours: times faster, on the CPU
LEAST_COSINE = 0.9999  # to their fp32 features


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, required=True, help="a checkout of facebookresearch/dino")
    parser.add_argument("--arch", default="vit_small", choices=["vit_tiny", "vit_small", "vit_base"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: this process's CPU seconds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    code = Checkout(options.against, "vision_transformer")
    asked = {"arch": f"{options.arch}_patch16_224", "batch": options.batch, "local_crops": 0, "prototypes": 2}
    made = Ours(sized(RECIPES["dino_vits16_in1k_100ep"](), **asked), options.device, torch.float32)
    encoder, images = made.method.encoder.eval(), made.views.global_crops[0].images
    vit = theirs.vit_like(code["vision_transformer"], encoder)
    vit.load_state_dict(theirs.trunk_state(encoder))
    vit.to(options.device).eval()

    def run(side: str, dtype: torch.dtype) -> Tensor:
        with torch.no_grad(), torch.autocast(options.device, dtype, enabled=dtype != torch.float32):
            return vit(images) if side == "theirs" else select(encoder, images, "cls")

    pairs, exact = comparisons(options.dtypes, options.device), run("theirs", torch.float32)
    contenders = dict.fromkeys([side for a, b in pairs for side in (("theirs", a), ("ours", b))])
    cosine = {key: F.cosine_similarity(run(*key).float(), exact).min().item() for key in contenders}
    least = min(value for (side, _), value in cosine.items() if side == "ours")
    if least < LEAST_COSINE:
        raise UserError(f"our features have a cosine of {least:.6f} with theirs, below {LEAST_COSINE}")
    named = {f"{side} {dtype}": lambda key=(side, dtype): run(*key) for side, dtype in contenders}
    seconds, rows = rounds_of(named, options.rounds, options.clock), []
    for a, b in pairs:
        row = {"theirs": str(a)[6:], "ours": str(b)[6:], "arch": options.arch, "batch": options.batch}
        row |= {"theirs_s": seconds[f"theirs {a}"], "ours_s": seconds[f"ours {b}"], "clock": options.clock}
        row |= {"ratio": vars(Ratio.of(row["theirs_s"], row["ours_s"])), "cosine": cosine["ours", b]}
        goal = GOALS.get((row["theirs"], row["ours"])) if options.device == "cpu" else None
        rows.append(row | {"device": options.device, "goal": goal})
    table = [
        "| theirs | ours | theirs images/s | ours images/s | times faster: median [least, most] of rounds | goal |"
        " least cosine of ours to their fp32 |",
        "|---" * 7 + "|",
    ]
    for r in rows:
        rates = [f"{options.batch / min(r[side]):.1f}" for side in ("theirs_s", "ours_s")]
        cells = [r["theirs"], r["ours"], *rates, str(Ratio(**r["ratio"])), f">= {r['goal']}" if r["goal"] else "-"]
        table.append(f"| {' | '.join([*cells, format(r['cosine'], '.7f')])} |")
    title = f"Feature extraction beside DINO's ViT, {options.arch} on {options.device}, clock: {options.clock}"
    about = {"checkouts": {"dino": code.commit}, "threads": torch.get_num_threads()}
    report("inference", title, f"python benchmarks/inference.py {' '.join(words)}", table, rows, about, options.out)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))
