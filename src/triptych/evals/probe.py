"""Linear classifiers of frozen features, one for each learning rate, trained side by side."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triptych.errors import UserError
from triptych.evals.knn import label_rank
from triptych.evals.linear_presets import LinearPreset, Norm


class Probe:
    """R linear classifiers of C classes as one: weight (D, R * C), bias (R * C,), the class varying fastest.

    A step of all rates is two matrix products, and no column ever reads another rate's.  Every rate starts from the
    same W ~ N(0, 0.01), drawn from a generator on the CPU so that every device has the same, and b = 0.
    """

    def __init__(
        self, preset: LinearPreset, width: int, classes: int, generator: torch.Generator, device: torch.device | str
    ):
        self.preset, self.classes = preset, classes
        self.norm = _norm(preset.norm, width).to(device)
        start = torch.randn(width, classes, generator=generator) * 0.01
        self.weight = start.to(device).repeat(1, len(preset.lrs))
        self.bias = self.weight.new_zeros(self.weight.shape[1])
        self.momenta = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        self.rates = self.weight.new_tensor(preset.lrs).repeat_interleave(classes)

    def fix_statistics(self, x: Tensor) -> None:
        """A BatchNorm takes mean and variance of these features (M, D) from now on, not those of each batch."""
        if isinstance(self.norm, nn.BatchNorm1d):
            var, mean = torch.var_mean(x.float(), dim=0, correction=0)
            self.norm.load_state_dict({"running_mean": mean, "running_var": var}, strict=False)
        self.norm.eval()

    def step(self, x: Tensor, y: Tensor, factor: float) -> None:
        """One step on features (B, D) and labels (B,) int64 at the rates times `factor`."""
        x = self.norm(x.float())
        # The gradient of the mean cross-entropy is (softmax - one-hot) / B, without autograd's bookkeeping.  By hand,
        # as torch's softmax is slow for few classes; e^-46 = 1e-20 moves no float32 weight, and what is far below is
        # denormal, which makes the product 5 x slower.
        error = self._logits(x)
        error.sub_(error.amax(-1, keepdim=True)).clamp_(min=-46).exp_()
        error.div_(error.sum(-1, keepdim=True).mul_(len(x)))
        error[torch.arange(len(x), device=x.device), :, y] -= 1 / len(x)
        error = error.flatten(1)
        self.update(x.T @ error, error.sum(0), factor)

    def update(self, weight_grad: Tensor, bias_grad: Tensor, factor: float) -> None:
        """One step of the optimiser with gradients like weight and bias.

        SGD: u = g + λθ.  LARS (You et al. 2017): the same for W, times η|W|/|u| where neither norm is 0, both of one
        rate's columns; u = g for the bias.  Then m <- μm + u; θ <- θ − rate · m.
        """
        preset = self.preset
        changes = [weight_grad, bias_grad]
        if preset.weight_decay:
            decayed = 1 if preset.optimiser == "lars" else 2
            pairs = zip(changes, (self.weight, self.bias), strict=True)
            changes = [u.add(p, alpha=preset.weight_decay) if i < decayed else u for i, (u, p) in enumerate(pairs)]
        if preset.optimiser == "lars":
            changes[0] = changes[0] * self._trust(changes[0])
        for parameter, momentum, change in zip((self.weight, self.bias), self.momenta, changes, strict=True):
            momentum.mul_(preset.momentum).add_(change)
            parameter.addcmul_(momentum, self.rates * factor, value=-1)

    def _trust(self, change: Tensor) -> Tensor:
        """(R * C,): η|W|/|u| of each rate, 1 where a norm is 0."""
        size, length = (
            torch.linalg.vector_norm(x.view(len(x), -1, self.classes), dim=(0, 2)) for x in (self.weight, change)
        )
        ratio = torch.where((size > 0) & (length > 0), self.preset.trust * size / length, 1.0)
        return ratio.repeat_interleave(self.classes)

    def score(self, x: Tensor, y: Tensor) -> Tensor:
        """Top-1 and top-5 (of min(5, C) classes) in percent of every rate, (2, R) float64."""
        training = self.norm.training
        self.norm.eval()
        right = torch.zeros(2, len(self.preset.lrs), dtype=torch.float64, device=x.device)
        size = max(1, 2**23 // len(self.bias))  # tens of MB of logits at a time
        for rows, labels in zip(x.split(size), y.split(size), strict=True):
            rank = label_rank(self._logits(self.norm(rows.float())), labels)
            right += torch.stack([(rank < 1).sum(0), (rank < min(5, self.classes)).sum(0)])
        self.norm.train(training)
        return right * (100 / len(x))

    def check(self) -> None:
        """Raises UserError where no rate has finite weights any more."""
        if not self.weight.isfinite().all(0).view(-1, self.classes).all(1).any():
            raise UserError(f'every learning rate of {list(self.preset.lrs)} diverged; give lower ones or norm="batch"')

    def _logits(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, R, C)."""
        return torch.addmm(self.bias, x, self.weight).view(len(x), -1, self.classes)


class _UnitNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(F.layer_norm(x, x.shape[1:]), dim=1)


def _norm(name: Norm, width: int) -> nn.Module:
    return {
        "none": nn.Identity,
        "batch": lambda: nn.BatchNorm1d(width, eps=1e-6, affine=False),
        "unit": _UnitNorm,
    }[name]()
