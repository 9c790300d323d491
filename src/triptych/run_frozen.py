"""`triptych eval knn` and the other protocols on features of frozen encoders."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor

from triptych.data.sources import Source, open_source, splits
from triptych.errors import UserError
from triptych.evals import protocols
from triptych.evals.cka import cka
from triptych.evals.fewshot import check_episodes
from triptych.evals.knn import check_votes
from triptych.evals.linear import changed
from triptych.evals.linear_presets import Norm, preset_of
from triptych.evals.outcome import Outcome, about_images
from triptych.evals.protocols import Labels, Pair
from triptych.evals.selection import Token
from triptych.evals.subject import Subject
from triptych.evaluation import check_file_options, for_model, labelled_pair, report, subject_of, writable


@dataclass(frozen=True)
class Asked:
    """What every protocol on labelled images is asked with; see cli_eval."""

    data: str
    test: str | None = None
    out: Path = Path("results.jsonl")
    token: Sequence[Token] = ("cls",)  # none: the preset's
    layers: int | None = None  # None: the preset's, or the last one
    encoder: dict[str, Any] = field(default_factory=dict)  # as of `subject_of`

    @contextmanager
    def opened(self, model: str) -> Iterator[tuple[Subject, Pair]]:
        """Everything that may refuse comes first."""
        writable(self.out)
        pair = Pair(*labelled_pair(self.data, self.test))
        with subject_of(model, **self.encoder) as subject:
            subject.check(self.token, self.blocks)
            if len(self.token) > 1:
                for source in (pair.train, pair.test):
                    subject.features_of(source, self.token, self.blocks)  # one pass for all tokens
            yield subject, pair

    @contextmanager
    def images(self, model: str) -> Iterator[tuple[Subject, Source]]:
        """Where nothing is learned from other images: the data's own held-out part, or `test`."""
        writable(self.out)
        own = splits(self.data) if self.test is None else None
        source = own[1] if own else open_source(self.test or self.data)
        if not source.classes:
            raise UserError(f"{source.name} has no labels: put the images of each class in a sub-folder of its own")
        with subject_of(model, **self.encoder) as subject:
            subject.check(self.token, self.blocks)
            subject.features_of(source, self.token, self.blocks)  # one pass for all tokens
            yield subject, source

    @property
    def blocks(self) -> int:
        return 1 if self.layers is None else self.layers


def show(outcome: Outcome, out: Path) -> dict:
    """Print an outcome's figures and append its line."""
    models = outcome.about["model"]
    name = " + ".join(models) if isinstance(models, list) else models
    table = Table("", "", title=f"{outcome.protocol}, {name}, {outcome.setting}")
    for figure in outcome.figures:
        about = "; ".join(part for part in (figure.note, figure.detail) if part)
        table.add_row(figure.name, figure.text() + (f" ({about})" if about else ""))
    return report(outcome.protocol, asdict(outcome.result), outcome.about, table, out)


def eval_knn(
    model: str, asked: Asked, *, k: Sequence[int] | None = None, preset: str | None = None, temperature: float = 0.07
) -> list[dict]:
    if k and preset:
        raise UserError(f"--k and --preset {preset}: give one of them")
    check_votes(k, temperature)
    options: dict[str, Any] = {"layers": asked.blocks, "k": k, "preset": preset, "temperature": temperature}
    with asked.opened(model) as (subject, pair):
        return [show(protocols.of_knn(subject, pair, token, **options), asked.out) for token in asked.token]


def eval_linear(
    model: str,
    asked: Asked,
    *,
    preset: str = "sweep",
    epochs: int | None = None,
    batch: int | None = None,
    lrs: Sequence[float] | None = None,
    norm: Norm | None = None,
    **options: Any,
) -> list[dict]:
    changes: dict[str, Any] = {"epochs": epochs, "batch": batch, "lrs": lrs, "norm": norm}
    changed(preset_of(preset), **changes)  # refuses what is out of range
    options |= {"preset": preset, **changes}
    with asked.opened(model) as (subject, pair):
        tokens = asked.token or [None]
        found = (protocols.of_linear(subject, pair, t, layers=asked.layers, **options) for t in tokens)
        return [show(outcome, asked.out) for outcome in found]


def eval_logistic(
    model: str, asked: Asked, few: Sequence[Labels], *, lam: float | None = None, **options: Any
) -> list[dict]:
    if lam is not None and not 0 < lam < math.inf:
        raise UserError(f"--lam {lam}: give a finite number above 0")
    options["lam"] = lam
    with asked.opened(model) as (subject, pair):
        tokens, options = asked.token or [None], options | {"layers": asked.blocks}
        found = (protocols.of_logistic(subject, pair, labels, t, **options) for t in tokens for labels in few)
        return [show(outcome, asked.out) for outcome in found]


def eval_few_shot(model: str, asked: Asked, **options: Any) -> list[dict]:
    check_episodes(*(options[name] for name in ("ways", "shots", "queries", "episodes")))
    with asked.images(model) as (subject, source):
        found = (protocols.of_few_shot(subject, source, t, layers=asked.blocks, **options) for t in asked.token)
        return [show(outcome, asked.out) for outcome in found]


def eval_clustering(model: str, asked: Asked, *, clusters: int | None, restarts: int, **options: Any) -> list[dict]:
    if restarts < 1 or (clusters is not None and clusters < 2):
        raise UserError(f"--clusters {clusters} --restarts {restarts}: give at least 2 clusters and 1 start")
    options |= {"clusters": clusters, "restarts": restarts}
    with asked.images(model) as (subject, source):
        found = (protocols.of_clustering(subject, source, t, layers=asked.blocks, **options) for t in asked.token)
        return [show(outcome, asked.out) for outcome in found]


def eval_cka(models: Sequence[str], asked: Asked, *, unbiased: bool) -> dict:
    """Of every token of every encoder, on the same images."""
    features: dict[str, Tensor] = {}
    about: dict[str, Any] = {}
    check_file_options(models, asked.encoder)
    for model in models:
        with replace(asked, encoder=for_model(model, asked.encoder)).images(model) as (subject, source):
            for token, found in subject.features_of(source, asked.token, asked.blocks).items():
                features[f"{subject.name}, {token}"] = found.x.to(subject.device)
            mine = subject.about() | {"model": subject.name}
            about = {key: [*about.get(key, []), mine[key]] for key in mine} | about_images(test=source)
    result = cka(features, unbiased=unbiased)
    about |= {"token": list(asked.token), "layers": asked.blocks}
    return show(Outcome("cka", f"{len(features)} features", about, result, protocols.cka_figures(result)), asked.out)
