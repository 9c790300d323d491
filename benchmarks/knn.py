"""The k-NN classifier beside DINO's script: k = 10, 20, 100 and 200 at once against one run for each.

    python benchmarks/knn.py --against ../dino --train 128000 --test 2000

Made-up features: classes are directions in the space, images their noisy copies.  Both sides start from features as an
encoder gives them, bring them to unit length and must end with the same accuracies.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from checkouts import Checkout
from timing import RESULTS, Ratio, report, rounds_of
from triptych.errors import UserError
from triptych.evals.knn import DEFAULT_K, knn
from triptych.memory import LiveMemory

TEMPERATURE = 0.07
GOAL = 8.0  # times faster


def features(count: int, classes: int, width: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """(count, width) and labels (count,); the classes are the same for every seed."""
    directions = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1 + seed)
    labels = torch.randint(classes, (count,), generator=generator)
    return directions[labels] + noise * torch.randn(count, width, generator=generator), labels


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, required=True, help="a checkout of facebookresearch/dino")
    parser.add_argument("--train", type=int, default=128_000, help="images")
    parser.add_argument("--test", type=int, default=2000, help="images; at least 100, which is what their script needs")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--noise", type=float, default=4.0, help="over the length of a class's direction")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: this process's CPU seconds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    code = Checkout(options.against, "eval_knn")
    sizes = options.classes, options.width, options.noise
    sets = [*features(options.train, *sizes, seed=0), *features(options.test, *sizes, seed=1)]
    train, train_labels, test, test_labels = (x.to(options.device) for x in sets)

    def theirs() -> dict[int, tuple[float, float]]:
        bank, queries = F.normalize(train, dim=1), F.normalize(test, dim=1)
        given = bank, train_labels, queries, test_labels
        classify = code["eval_knn"].knn_classifier
        return {k: classify(*given, k, TEMPERATURE, options.classes) for k in DEFAULT_K}

    def ours() -> dict[int, tuple[float, float]]:
        found = knn(train, train_labels, test, test_labels, temperature=TEMPERATURE)
        return {k: (found.top1[k], found.top5[k]) for k in found.top1}

    accuracies = same_accuracies(theirs(), ours(), 100 / options.test)
    seconds = rounds_of({"theirs": theirs, "ours": ours}, options.rounds, options.clock)
    memory = {}
    for name, run in (("theirs", theirs), ("ours", ours)):
        with LiveMemory() as live:
            run()
        memory[name] = live.peak / 2**20
    ratio = Ratio.of(seconds["theirs"], seconds["ours"])
    row = {"train": options.train, "test": options.test, "classes": options.classes, "width": options.width}
    row |= {"device": options.device, "clock": options.clock, "seconds": seconds, "ratio": vars(ratio), "goal": GOAL}
    row |= {"mib": memory, "accuracies": accuracies}
    table = ["| | s | MiB beside the features |", "|---|---|---|"]
    table += [f"| {name} | {min(seconds[name]):.2f} | {memory[name]:.0f} |" for name in seconds]
    table += ["", f"Times faster, median [least, most] of rounds: {ratio}; goal >= {GOAL}.", ""]
    table += [f"{k}-NN: top-1 {a:.2f} %, top-5 {b:.2f} % on both sides." for k, (a, b) in accuracies.items()]
    title = f"k-NN classifier beside DINO's, {options.test} images against {options.train}, clock: {options.clock}"
    about = {"checkouts": {"dino": code.commit}, "threads": torch.get_num_threads()}
    report("knn", title, f"python benchmarks/knn.py {' '.join(words)}", table, [row], about, options.out)


def same_accuracies(a: dict, b: dict, one_image: float) -> dict[int, tuple[float, float]]:
    """b's (top-1, top-5) for each k.

    Raises UserError where the sides differ by more than one image: rounding may settle one tie.
    """
    differences = [abs(x - y) for k in a for x, y in zip(a[k], b[k], strict=True)]
    if max(differences) > one_image + 1e-6:
        raise UserError(f"the accuracies differ: theirs {a}, ours {b}")
    return b


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))
