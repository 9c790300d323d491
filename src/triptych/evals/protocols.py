"""Frozen protocols on images: features of a subject in, an outcome out.  The commands and the suite share them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from triptych.data.sources import Source
from triptych.errors import UserError
from triptych.evals.cka import CKAResult, cka
from triptych.evals.clustering import clustering
from triptych.evals.fewshot import few_shot
from triptych.evals.knn import PRESETS, knn
from triptych.evals.linear import linear
from triptych.evals.linear_augmented import linear_augmented
from triptych.evals.linear_presets import preset_of
from triptych.evals.logistic import SETTINGS
from triptych.evals.lowshot import chosen, from_file, low_shot
from triptych.evals.outcome import Figure, Outcome, about_images
from triptych.evals.selection import Token
from triptych.evals.subject import Subject


@dataclass(frozen=True)
class Pair:
    """Labelled images to learn from and to measure on."""

    train: Source
    test: Source


def of_knn(
    subject: Subject,
    pair: Pair,
    token: Token = "cls",
    *,
    layers: int = 1,
    k: Sequence[int] | None = None,
    preset: str | None = None,
    temperature: float = 0.07,
) -> Outcome:
    """preset: a paper's numbers of neighbours, as far as there are so many images, instead of k."""
    train, y, test, z, about = _sets(subject, pair, token, layers)
    if preset is not None:
        k = [n for n in PRESETS[preset] if n <= len(train)] or [len(train)]
    result = knn(train, y, test, z, k=k, temperature=temperature)
    figures = [Figure(f"top-1 %, k = {n}", value) for n, value in result.top1.items()]
    figures += [Figure(f"top-5 %, k = {n}", value, main=False) for n, value in result.top5.items()]
    return Outcome("knn", on_text(token, layers), about | {"preset": preset}, result, figures)


def of_linear(
    subject: Subject,
    pair: Pair,
    token: Token | None = None,
    *,
    layers: int | None = None,
    preset: str | None = None,
    augmented: bool = False,
    seed: int = 0,
    **settings: Any,
) -> Outcome:
    """token, layers: None = the preset's.  settings: as of `linear`.  augmented: `linear_augmented`, of one encoder."""
    probe = preset_of(preset or "sweep")
    usual = probe.features(subject.models[0].encoder)
    form = {"token": token or usual[0], "layers": (1 if token else usual[1]) if layers is None else layers}
    if augmented:
        if len(subject.models) > 1:
            raise UserError("the probe on augmented images takes one encoder: leave out --with")
        options: dict[str, Any] = form | settings | {"seed": seed}
        options |= {"device": subject.device, "precision": subject.precision, "folder": subject.folder}
        encoder, transform = subject.models[0].encoder, replace(subject.transforms[0], **_form(preset))
        result = linear_augmented(encoder, pair.train, pair.test, transform, probe, **options)
        about = subject.about(**_form(preset)) | about_images(train=pair.train, test=pair.test) | form
    else:
        train, y, test, z, about = _sets(subject, pair, form["token"], form["layers"], _form(preset))
        result = linear(train, y, test, z, preset=probe, seed=seed, **settings)
    note = f"{result.preset}, {result.epochs} epochs; chosen on {result.selected_on}; "
    note += f"augmentation: {result.augmentation}"
    detail = f"rate {result.lr:g}, epoch {result.epoch}"
    figures = [Figure("top-1 %", result.top1, note=note, detail=detail), Figure("top-5 %", result.top5, main=False)]
    remark = "optimistic: the best of all epochs and rates on the test images"
    figures.append(Figure("top-1 %, best on test", result.best_epoch_top1, note=remark, main=False))
    return Outcome("linear", on_text(form["token"], form["layers"]), about | {"seed": seed}, result, figures)


@dataclass(frozen=True)
class Labels:
    """Which train images carry a label: a share of each class, so many of each, or those that a file lists."""

    share: float | None = None
    per_class: int | None = None
    file: str | None = None
    draws: int = 3  # random choices that are averaged over; of a file there is one

    def __post_init__(self) -> None:
        if sum(x is not None for x in (self.share, self.per_class, self.file)) != 1:
            raise UserError("which images carry a label: give a share, a number per class, or a file, and one of them")
        if self.share is not None and not 0 < self.share <= 1:
            raise UserError(f"the share of labels is {self.share}; it must be above 0 and at most 1 (0.01 is 1 %)")
        if self.per_class is not None and self.per_class < 1:
            raise UserError(f"{self.per_class} labels a class: give at least 1")
        if self.file is not None and not Path(self.file).is_file():
            raise UserError(f"--labels {self.file}: no such file; give a text file of one image name per line")
        if self.draws < 1:
            raise UserError(f"{self.draws} draws of labelled images: give at least 1")

    @property
    def name(self) -> str:
        if self.file is not None:
            return f"labels of {self.file}"
        if self.share is not None:
            return f"{100 * self.share:g} % of the labels"
        return f"{self.per_class} label{'' if self.per_class == 1 else 's'} a class"

    def subsets(self, source: Source, indices: Tensor, labels: Tensor, seed: int) -> list[Tensor]:
        """Rows of the features of these images."""
        if self.file is not None:
            return [from_file(self.file, [source.key(i) for i in indices.tolist()])]
        seeds = range(seed, seed + (1 if self.share == 1 else self.draws))  # all labels can be drawn in one way
        return [chosen(labels, share=self.share, per_class=self.per_class, seed=s) for s in seeds]


def labels_asked(
    shares: Sequence[float] | None,
    per_class: Sequence[int] | None,
    files: Sequence[str] | None,
    draws: int = 3,
    default: Sequence[float] = (),
) -> list[Labels]:
    """Everything that was asked for; default: shares where nothing was."""
    few = [Labels(share=s, draws=draws) for s in shares or ()]
    few += [Labels(per_class=n, draws=draws) for n in per_class or ()]
    few += [Labels(file=f, draws=1) for f in files or ()]
    return few or [Labels(share=s, draws=draws) for s in default]


FEW_LABELS = (Labels(per_class=1), Labels(per_class=5), Labels(share=0.01), Labels(share=0.1))


def of_logistic(
    subject: Subject,
    pair: Pair,
    few: Labels,
    token: Token | None = None,
    *,
    layers: int = 1,
    preset: str | None = None,
    lam: float | None = None,
    seed: int = 0,
) -> Outcome:
    """token: None = the preset's.  preset: of `logistic.SETTINGS`, None = "udi"; lam: another strength."""
    name = preset or "udi"
    if name == "msn" and few.per_class:
        name = "msn_few"
    setting = SETTINGS[name] if lam is None else replace(SETTINGS[name], lam=lam)
    token = token or setting.token
    form = _form(name)
    train, y, test, z, about = _sets(subject, pair, token, layers, form)
    rows = few.subsets(pair.train, subject.features(pair.train, token, layers, **form).indices, y, seed)
    result = low_shot(train, y, test, z, rows, setting)
    draws = f"{len(rows)} draws of " if len(rows) > 1 else ""
    images = "-".join(str(n) for n in sorted({len(r) for r in rows}))
    note = f"{draws}{images} images; λ {setting.lam:g}{' / images' if setting.per_image else ''} ({name})"
    note += "" if result.converged else f"; NOT CONVERGED for {subject.name}: not the protocol's number"
    figures = [Figure(f"top-1 %, {few.name}", result.top1, result.top1_ci95, note)]
    about |= {"labels": vars(few), "preset": name, "seed": seed}
    return Outcome("logistic", on_text(token, layers), about, result, figures)


def of_few_shot(
    subject: Subject, source: Source, token: Token = "cls", *, layers: int = 1, seed: int = 0, **settings: Any
) -> Outcome:
    """settings: as of `few_shot`."""
    x, labels, about = _set(subject, source, token, layers)
    result = few_shot(x, labels, seed=seed, **settings)
    what = f"{result.ways}-way {result.shots}-shot, {result.episodes} episodes of {result.queries} queries a class"
    chosen_on = f"θ chosen on {result.selected_on}; yes to all pairs gives {result.f1_all_yes:.2f}"
    figures = [
        Figure("accuracy, %", result.accuracy, result.accuracy_ci95, what),
        Figure("F1, %", result.best_f1, note=chosen_on, detail=f"θ = {result.threshold:g}"),
    ]
    return Outcome("fewshot", on_text(token, layers), about | {"seed": seed}, result, figures)


def of_clustering(
    subject: Subject,
    source: Source,
    token: Token = "cls",
    *,
    layers: int = 1,
    clusters: int | None = None,
    restarts: int = 10,
    seed: int = 0,
) -> Outcome:
    x, labels, about = _set(subject, source, token, layers)
    result = clustering(x, labels, clusters=clusters, restarts=restarts, seed=seed)
    scales = {"accuracy": ("accuracy of matched clusters, %", 1), "nmi": ("NMI, %", 100), "ari": ("ARI, %", 100)}
    scales["fowlkes_mallows"] = ("Fowlkes-Mallows, %", 100)
    figures = []
    for measure, (name, scale) in scales.items():
        value, chance = (scale * getattr(m, measure) for m in (result.metrics, result.shuffled))
        margin = result.margin[measure]
        spread = "" if margin is None else f" ± {scale * margin:.2f}"
        detail = f"mean of all starts {scale * result.mean[measure]:.2f}{spread}, labels shuffled {chance:.2f}"
        note = f"{result.asked_clusters} clusters, the best of {restarts} starts by inertia"
        figures.append(Figure(name, value, None, note, detail, main=measure in ("accuracy", "nmi")))
    return Outcome("clustering", on_text(token, layers), about, result, figures)


def of_cka(subject: Subject, source: Source, tokens: Sequence[Token] | None = None, *, layers: int = 1) -> Outcome:
    """How alike the tokens of one encoder are.  Default: those that are not made of others."""
    tokens = list(tokens or [token for token in subject.tokens() if "+" not in token])
    found = subject.features_of(source, tokens, layers)
    result = cka({token: features.x.to(subject.device) for token, features in found.items()})
    about = subject.about() | about_images(test=source) | {"token": tokens, "layers": layers}
    return Outcome("cka", "", about, result, cka_figures(result))


def cka_figures(result: CKAResult) -> list[Figure]:
    """A figure for each pair."""
    pairs = [(i, j) for i in range(len(result.names)) for j in range(i)]
    named = ((f"{result.names[j]} and {result.names[i]}", result.cka[i][j]) for i, j in pairs)
    same = "one of them is the same for all images"
    return [Figure(name, math.nan if v is None else v, detail=same if v is None else "") for name, v in named]


def on_text(token: Token, layers: int) -> str:
    """The setting of an outcome."""
    return token if layers == 1 else f"{token}, last {layers} blocks"


def _form(preset: str | None) -> dict[str, Any]:
    """How the paper's script sees images, where it is not the usual way: fields of EvalTransform."""
    return {"interpolation": "bilinear"} if preset in ("msn", "msn_few") else {}  # torchvision's default resize


def _set(
    subject: Subject, source: Source, token: Token, layers: int, form: dict[str, Any] | None = None
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Features and labels of one set of images, on the subject's device, and what identifies them."""
    form = form or {}
    features = subject.features(source, token, layers, **form)
    assert features.labels is not None, "the command asked for labelled images"
    about = subject.about(**form) | about_images(test=source) | {"token": token, "layers": layers}
    return features.x.to(subject.device), features.labels.to(subject.device), about


def _sets(
    subject: Subject, pair: Pair, token: Token, layers: int, form: dict[str, Any] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
    """Features and labels of both, on the subject's device, and what identifies them."""
    x, y, about = _set(subject, pair.train, token, layers, form)
    test, z, _ = _set(subject, pair.test, token, layers, form)
    return x, y, test, z, about | about_images(train=pair.train, test=pair.test)
