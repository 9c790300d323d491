"""A training step: DINO against UDI, fp32 against bf16, and the prototype loss against its textbook form.

    python benchmarks/step.py --arch vit_small_patch16_224 --batch 4 --prototypes 65536

Random pixels; the same encoder, batch and crops (2 x 224 + 8 x 96) for both methods.
"""

import argparse

import torch
import torch.nn.functional as F

from timing import interleaved, report
from triptych.data.crops import stratified_sample
from triptych.data.views import View, Views
from triptych.encoders import ViTConfig
from triptych.losses import other_views, prototype_cross_entropy
from triptych.methods import DINOConfig, UDIConfig
from triptych.optim import clip_gradients, make_optimizer, set_rates
from triptych.recipe import Recipe, build_method
from triptych.schedules import Progress


def batch_of(images: int, patch: int) -> Views:
    import numpy as np

    rng = np.random.default_rng(0)

    def view(side: int, window: int) -> View:
        low, high = torch.rand(images, 2) * 0.3, 0.6 + torch.rand(images, 2) * 0.4
        grid = side // patch, side // patch
        samples = [torch.from_numpy(stratified_sample(grid, window, rng)) for _ in range(images)]
        box = torch.cat([low, high], 1)
        return View(torch.randn(images, 3, side, side), box, torch.full((images, 2), 0.002), torch.stack(samples))

    return Views([view(224, 3) for _ in range(2)], [view(96, 2) for _ in range(8)])


def stepper(method_config, options, dtype: torch.dtype):
    encoder = ViTConfig(arch=options.arch, drop_path=0.1)
    method = build_method(Recipe(name="benchmark", method=method_config, encoder=encoder))
    optimizer, views = make_optimizer(method, Recipe(name="b", method=method_config).optim), batch_of(options.batch, 16)

    def step() -> None:
        t = Progress(10, 100, 5)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = method(views, t)
        out.loss.backward()
        method.after_backward(t)
        clip_gradients(method.parameters(), 3.0)
        set_rates(optimizer, 1e-4, 0.04)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.update([out.carry], t)

    return step


def losses(options):
    """The same cross-entropies, ours and as usually written: a softmax of the student for every pair of views."""
    g = torch.Generator().manual_seed(0)
    z_s = F.normalize(torch.randn(10, options.batch, 256, generator=g), dim=-1).requires_grad_()
    z_t = F.normalize(torch.randn(2, options.batch, 256, generator=g), dim=-1)
    w_s = F.normalize(torch.randn(options.prototypes, 256, generator=g), dim=-1).requires_grad_()
    w_t, center = w_s.detach().clone(), torch.zeros(options.prototypes)

    def ours() -> torch.Tensor:
        weight = other_views(2, 10, options.batch, like=z_s)
        temperatures = {"student_temp": 0.1, "teacher_temp": 0.04}
        return prototype_cross_entropy(z_s, w_s, z_t, w_t, center=center, weight=weight, **temperatures)

    def textbook() -> torch.Tensor:
        g_s, total = z_s @ w_s.T / 0.1, torch.zeros(())
        p_t = ((z_t @ w_t.T - center) / 0.04).softmax(-1)
        for v in range(2):
            for s in range(10):
                if s != v:
                    total = total - (p_t[v] * g_s[s].log_softmax(-1)).sum(-1).mean()
        return total / 18

    torch.testing.assert_close(ours(), textbook(), rtol=1e-5, atol=1e-5)

    def timed(loss):
        def run() -> None:
            z_s.grad = w_s.grad = None
            loss().backward()

        return run

    return {"loss, ours": timed(ours), "loss, textbook": timed(textbook)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prototypes", type=int, default=65536)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    options = parser.parse_args()
    contenders = {}
    for name, kind in (("DINO", DINOConfig), ("UDI", UDIConfig)):
        for dtype in options.dtypes:
            step = stepper(kind(prototypes=options.prototypes), options, getattr(torch, dtype))
            contenders[f"{name}, {dtype}"] = step
    steps = interleaved(contenders, options.rounds)
    alone = interleaved(losses(options), options.rounds)
    table = ["| step | images/s | time over the first |", "|---|---|---|"]
    table += [f"| {n} | {options.batch / s:.2f} | {s / next(iter(steps.values())):.2f} |" for n, s in steps.items()]
    table += ["", "| loss, forward and backward, 2 + 8 crops | ms | ratio |", "|---|---|---|"]
    table += [f"| {n} | {1000 * s:.1f} | {alone['loss, textbook'] / s:.2f} |" for n, s in alone.items()]
    command = (
        f"python benchmarks/step.py --arch {options.arch} --batch {options.batch} --prototypes {options.prototypes}"
        f" --rounds {options.rounds} --dtypes {' '.join(options.dtypes)}"
    )
    report("step", f"Training step, {options.arch}, 2 x 224 + 8 x 96, K = {options.prototypes}", command, table)


if __name__ == "__main__":
    main()
