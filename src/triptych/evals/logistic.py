"""Logistic regression on frozen features, solved to the optimum: the low-shot protocol of DINO, iBOT, UDI and MSN.

The papers use cyanure (Mairal 2019); the objective is strictly convex, so any solver that converges gives its weights.
`lowshot` chooses the labelled images; `linear` is the probe that SGD trains, with a bias and no penalty.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.errors import UserError
from triptych.evals.knn import check_sets, label_rank
from triptych.evals.selection import Token
from triptych.progress import progress

Rows = Literal["unit", "centred", "none"]
ROWS: tuple[Rows, ...] = ("unit", "centred", "none")


@dataclass(frozen=True)
class Setting:
    """How strongly the weights are held back, and what the rows of features are."""

    lam: float  # λ₀ > 0
    per_image: bool  # λ = λ₀ / train images; else λ = λ₀
    rows: Rows  # "unit": L2-normalised; "centred": each minus its own mean, then L2-normalised; "none": as they are
    token: Token = "cls"  # of the paper's script, for who extracts the features


SETTINGS = {
    "udi": Setting(0.1, True, "unit"),
    "dino": Setting(0.1, False, "unit"),
    "msn": Setting(0.075, True, "centred", "cls_raw"),
    "msn_few": Setting(0.0025, True, "centred", "cls_raw"),
}
"""The papers' settings.  "dino" takes λ literally: at 1 % of ImageNet that gave people 57.5 to 58 % where the papers
have 64 to 66 % (dino issue 121, ibot issue 21), which "udi" gives.  iBOT's script tries "dino" with λ₀ = 0.01, 0.1, 1.
"msn" is for 1 % of the labels, "msn_few" is MSN's default, for a few images per class.
"""


@dataclass(frozen=True)
class LogisticResult:
    """top1, top5: percent of the test images (0 to 100).  lam: λ of the objective, divided by the images if so set.

    objective, gradient_norm (of all weights): where Newton's method stopped, after `iterations`.  converged: the
    weights are within `fit`'s tolerance of the optimum; if not, the accuracies are not those of the protocol.  classes:
    those of the train images; unseen: test images of other classes, which count as wrong.
    """

    top1: float
    top5: float
    lam: float
    objective: float
    gradient_norm: float
    iterations: int
    converged: bool
    train_images: int
    test_images: int
    classes: int
    unseen: int


@dataclass(frozen=True)
class Fit:
    """The minimum of `fit`: weight (D, C) float64; the rest as in LogisticResult."""

    weight: Tensor
    objective: float
    gradient_norm: float
    iterations: int
    converged: bool


@torch.no_grad()
def logistic(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    setting: Setting = SETTINGS["udi"],
    *,
    max_iterations: int = 100,
    memory_mb: int = 512,
) -> LogisticResult:
    """Classify `test` (T, D) by logistic regression without intercept on `train` (n, D), see `fit`.

    Labels are int64 ids >= 0.  Only classes with train images are learnt.  Runs on the device of `train` in float64;
    `memory_mb` bounds what is allocated beside the inputs, two float64 copies of `train` and some ten of the weights.

    Raises UserError for bad features or labels (as `knn`), fewer than two classes in train, λ <= 0, unknown rows.
    """
    check_sets(train, train_labels, test, test_labels)
    classes = train_labels.unique()
    if len(classes) < 2:
        raise UserError("the train images are all of one class; logistic regression needs at least two")
    if setting.rows not in ROWS:
        raise UserError(f"rows is {setting.rows!r}; it must be one of {', '.join(ROWS)}")
    lam = setting.lam / len(train) if setting.per_image else setting.lam
    place = torch.searchsorted(classes, train_labels)
    fitted = fit(prepared(train, setting.rows), place, lam, max_iterations=max_iterations, memory_mb=memory_mb)
    right = torch.zeros(2, dtype=torch.float64, device=train.device)
    classes, unseen = classes.to(train.device), 0
    size = _rows_at_once(memory_mb, *fitted.weight.shape)
    for x, y in zip(test.split(size), test_labels.split(size), strict=True):
        y = y.to(train.device)
        place = torch.searchsorted(classes, y).clamp(max=len(classes) - 1)
        known = classes[place] == y
        rank = label_rank(prepared(x.to(train.device), setting.rows) @ fitted.weight, place)
        right += torch.stack([((rank < best) & known).sum() for best in (1, min(5, len(classes)))])
        unseen += int((~known).sum())
    top1, top5 = (right * (100 / len(test))).tolist()
    solved = fitted.objective, fitted.gradient_norm, fitted.iterations, fitted.converged
    return LogisticResult(top1, top5, lam, *solved, len(train), len(test), len(classes), unseen)


def prepared(x: Tensor, rows: Rows) -> Tensor:
    """(n, D) -> (n, D) float64; rows of zeros stay zeros."""
    x = x.double()
    if rows == "centred":
        x = x - x.mean(1, keepdim=True)
    return x if rows == "none" else F.normalize(x, dim=1)


@torch.no_grad()
def fit(
    x: Tensor,
    labels: Tensor,
    lam: float,
    *,
    tolerance: float = 1e-6,
    max_iterations: int = 100,
    memory_mb: int = 512,
) -> Fit:
    """The minimum over W (D, C) of f(W) = (1/n) Σ CE(softmax(Wᵀxᵢ), yᵢ) + (λ/2)|W|², for x (n, D), labels 0 ... C - 1.

    f is λ-strongly convex, so that |W - W*| <= |∇f(W)| / λ.  The solver stops at |∇f| <= tolerance λ |W|: the weights
    are then known to about that relative error.  `converged` is False when it ends before, after `max_iterations` or
    where float64 sees no more progress.

    Newton's method from W = 0 (so nothing is drawn); each step is solved by conjugate gradients, the more accurately
    the smaller the gradient, and halved until f falls.  Raises UserError for λ <= 0.
    """
    if not 0 < lam < math.inf:
        raise UserError(f"lambda is {lam}; it must be > 0 and finite (without a penalty there may be no optimum)")
    problem = _Problem(x, labels, lam, memory_mb)
    v = torch.zeros(x.shape[1], problem.classes, dtype=torch.float64, device=x.device)
    value, gradient = problem.evaluate(v)
    start, iterations, converged = gradient.norm(), 0, not gradient.any()
    for _ in progress(range(max_iterations), "logistic regression, at most:", max_iterations):
        if converged:
            break
        before, old_value, old_gradient = v, value, gradient
        step = _newton_step(problem, v, gradient, accuracy=min(0.25, float((gradient.norm() / start).sqrt())))
        slope = (gradient * step).sum()
        hidden = -slope < 1e-9 * value  # what f still falls by is near its round-off: it cannot judge the step
        while True:
            v = before + step
            value, gradient = problem.evaluate(v)
            if hidden or value <= old_value + 1e-4 * slope:
                break
            step, slope = step / 2, slope / 2
        iterations += 1
        # By W: a rotation changes no norm.
        converged = bool((gradient / problem.root).norm() <= tolerance * lam * (problem.root * v).norm())
        if hidden and gradient.norm() >= old_gradient.norm():
            break
    norm = (gradient / problem.root).norm()
    return Fit(problem.basis @ (problem.root * v), float(value), float(norm), iterations, converged)


class _Problem:
    """f over V (D, C) with W = U R V: U the eigenvectors of XᵀX / n, s its eigenvalues, R = diag(s / C + λ)^-½.

    That is the inverse root of f's curvature at V = 0 (but for the softmax's tie between classes), so that conjugate
    gradients need few steps, however unlike the features' variances are.
    """

    def __init__(self, x: Tensor, labels: Tensor, lam: float, memory_mb: int) -> None:
        x = x.double()
        self.classes = int(labels.max()) + 1
        variance, self.basis = torch.linalg.eigh(x.T @ x / len(x))
        self.root = (variance.clamp(min=0) / self.classes + lam).rsqrt()[:, None]  # (D, 1)
        self.penalty = lam * self.root.square()
        self.images, chunk = len(x), _rows_at_once(memory_mb, x.shape[1], self.classes)
        self.rows = (x @ (self.basis * self.root.T)).split(chunk)
        self.labels = labels.to(x.device)[:, None].split(chunk)

    def evaluate(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """f and its gradient by V."""
        value, gradient = v.new_zeros(()), torch.zeros_like(v)
        for rows, own in zip(self.rows, self.labels, strict=True):
            logits = rows @ v
            norm = logits.logsumexp(1, keepdim=True)
            value += (norm - logits.gather(1, own)).sum()
            error = logits.sub_(norm).exp_().scatter_add_(1, own, logits.new_full(own.shape, -1.0))  # softmax - one-hot
            gradient.addmm_(rows.T, error)
        penalty = (self.penalty * v.square()).sum() / 2
        return value / self.images + penalty, gradient.div_(self.images).addcmul_(self.penalty, v)

    def curvature(self, v: Tensor, d: Tensor) -> Tensor:
        """The second derivative of f at V, times a direction d (D, C)."""
        out = torch.zeros_like(v)
        for rows in self.rows:
            p = (rows @ v).softmax(1)
            change = rows @ d
            out.addmm_(rows.T, p.mul_(change.sub_((p * change).sum(1, keepdim=True))))
        return out.div_(self.images).addcmul_(self.penalty, d)


def _newton_step(problem: _Problem, v: Tensor, gradient: Tensor, accuracy: float) -> Tensor:
    """d with |H d + gradient| <= accuracy |gradient|, or after 250 conjugate gradients (also a way down)."""
    d, left = torch.zeros_like(v), -gradient
    direction, square = left, left.square().sum()
    for _ in range(250):
        curved = problem.curvature(v, direction)
        size = square / (direction * curved).sum()
        d, left = d + size * direction, left - size * curved
        before, square = square, left.square().sum()
        if square.sqrt() <= accuracy * gradient.norm():
            break
        direction = left + square / before * direction
    return d


def _rows_at_once(memory_mb: int, width: int, classes: int) -> int:
    """Rows of float64 features and logits (and what is computed of them) that fit in the memory."""
    return max(1, memory_mb * 2**20 // (8 * (3 * width + 4 * classes)))
