"""The prototype cross-entropy alone: ours beside two forms that hold all logits.

    python benchmarks/prototype_loss.py --rounds 3
    python benchmarks/prototype_loss.py --shrink 8          # an eighth of the rows and of the prototypes

"theirs" is what the authors' code has; "at once" does the least work that is possible with all logits in memory.

Forward and backward, prototypes with their normalisation on both sides.  Temporaries: the most bytes alive at once,
without inputs and without the gradients that are asked for.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from timing import RESULTS, Ratio, report, rounds_of
from triptych.heads import Prototypes
from triptych.memory import LiveMemory
from triptych.prototype_loss import other_views, prototype_cross_entropy

TEMPS: dict[str, Any] = {"student_temp": 0.1, "teacher_temp": 0.05}
# views of the student, of the teacher, images (or patches), prototypes; one view each: patches, each with itself alone
CASES = (1, 1, 1024, 65536), (1, 1, 4096, 8192), (12, 2, 32, 65536)
DOUBLING = (8192, 16384, 32768, 65536, 131072)  # prototypes, for 512 patch pairs
GOALS = "temporaries <= 1/10, never slower at K >= 8192"


def contenders(S: int, T: int, rows: int, K: int, device: str) -> tuple[dict[str, Callable[[], object]], int]:
    """{name: forward and backward}, and the bytes of the gradients."""
    g = torch.Generator().manual_seed(0)
    student, teacher = (Prototypes(256, K).to(device) for _ in range(2))
    teacher.requires_grad_(False)
    z_s, z_t = (F.normalize(torch.randn(v, rows, 256, generator=g), dim=-1).to(device) for v in (S, T))
    z_s.requires_grad_()
    center = torch.randn(K, generator=g).to(device) * 0.01
    weight = other_views(T, S, rows, like=z_s) if T > 1 else torch.ones(1, 1, 1, device=device) / rows

    def ours() -> Tensor:
        options: dict[str, Any] = {"center": center, "weight": weight, **TEMPS}
        return prototype_cross_entropy(z_s, student, z_t, teacher, **options)

    def theirs() -> Tensor:
        """Softmax and log-softmax in full, the latter once per pair of views, as in DINO's and iBOT's losses."""
        g_s = z_s @ student.weight.T / TEMPS["student_temp"]
        p_t = ((z_t @ teacher.weight.T - center) / TEMPS["teacher_temp"]).softmax(-1).detach()
        total = z_s.new_zeros(())
        for t in range(T):
            for s in range(S):
                if weight[t, s].any():
                    loss = torch.sum(-p_t[t] * F.log_softmax(g_s[s], dim=-1), dim=-1)
                    total = total + (weight[t, s] * loss).sum()
        return total

    def at_once() -> Tensor:
        """Each student row's log-sum-exp once, each teacher row's prototypes once, pairs in P dimensions."""
        w = student.weight
        lse = (z_s @ w.T / TEMPS["student_temp"]).logsumexp(-1)
        target = ((z_t @ teacher.weight.T - center) / TEMPS["teacher_temp"]).softmax(-1) @ w
        return (weight * (lse - (target[:, None] * z_s).sum(-1) / TEMPS["student_temp"])).sum()

    parameters = [z_s, *(p for p in student.parameters() if p.requires_grad)]
    losses = {"theirs": theirs, "at once": at_once, "ours": ours}
    first, *others = ((loss(), *torch.autograd.grad(loss(), parameters)) for loss in losses.values())
    for values in others:
        torch.testing.assert_close(values, first, rtol=1e-4, atol=1e-6)

    def timed(loss: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(), parameters)

    return {name: timed(loss) for name, loss in losses.items()}, sum(p.nbytes for p in parameters)


def temporaries(run: Callable[[], object], gradients: int) -> float:
    """MiB"""
    with LiveMemory() as memory:
        run()
    return (memory.peak - gradients) / 2**20


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shrink", type=int, default=1, help="divides rows and prototypes")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: this process's CPU seconds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args(words)
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = []
    table = [f"Goal: {GOALS}.", "", "| float32 | ms: theirs, at once, ours | times faster than theirs |"]
    table[-1] += " than at once | temporaries, MiB | ours over theirs, over at once |"
    table.append("|---" * 6 + "|")
    for S, T, images, K in CASES:
        sizes = S, T, images // options.shrink, K // options.shrink
        runs, gradients = contenders(*sizes, options.device)
        seconds = rounds_of(runs, options.rounds, options.clock)
        ratios = [Ratio.of(seconds[name], seconds["ours"]) for name in ("theirs", "at once")]
        least, mib = [min(x) for x in seconds.values()], [temporaries(run, gradients) for run in runs.values()]
        name = f"{sizes[2]} patch pairs" if T == 1 else f"{T} + {S - T} crops of {sizes[2]} images"
        cells = [f"{name}, K = {sizes[3]}", ", ".join(f"{1e3 * x:.0f}" for x in least), *map(str, ratios)]
        cells += [", ".join(f"{x:.0f}" for x in mib), ", ".join(f"{mib[2] / x:.3f}" for x in mib[:2])]
        table.append(f"| {' | '.join(cells)} |")
        rows.append({"case": cells[0], "seconds": least, "ratios": [vars(r) for r in ratios], "mib": mib})
    pairs = 512 // options.shrink
    table += ["", f"| {pairs} patch pairs, ours | ms | temporaries, MiB | beyond the first row's |", "|---" * 4 + "|"]
    first = None
    for K in (K // options.shrink for K in DOUBLING):
        runs, gradients = contenders(1, 1, pairs, K, options.device)
        ours = {"ours": runs["ours"]}
        best = min(rounds_of(ours, options.rounds, options.clock)["ours"])
        used = temporaries(runs["ours"], gradients)
        first = used if first is None else first
        table.append(f"| K = {K} | {1e3 * best:.0f} | {used:.1f} | {used - first:.1f} |")
        rows.append({"case": f"{pairs} patch pairs, K = {K}", "seconds": [best], "mib": [used]})
    command = f"python benchmarks/prototype_loss.py {' '.join(words)}"
    title = f"Prototype cross-entropy, forward and backward, clock: {options.clock}"
    report("prototype-loss", title, command, table, rows, folder=options.out)


if __name__ == "__main__":
    main(sys.argv[1:])
