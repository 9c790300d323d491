"""All frozen protocols over encoders and sets of images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from triptych.data.annotated import Annotated, Segmented
from triptych.data.davis import AnnotatedFrames, Video
from triptych.data.retrieval_sets import RetrievalSet
from triptych.data.sources import Source
from triptych.errors import UserError, nearest
from triptych.evals import dense_protocols as dense
from triptych.evals import protocols as of
from triptych.evals.click import ClickSettings
from triptych.evals.knn import PRESETS as KNN
from triptych.evals.linear_presets import PRESETS as LINEAR
from triptych.evals.logistic import SETTINGS as LOGISTIC
from triptych.evals.outcome import Outcome
from triptych.evals.propagation import Settings
from triptych.evals.protocols import Pair
from triptych.evals.retrieval import PRESETS as RETRIEVAL
from triptych.evals.retrieval_protocols import of_retrieval
from triptych.evals.subject import Subject

ON_PAIRS = ("knn", "linear", "logistic", "fewshot", "clustering", "cka")
ON_MASKS = ("click", "similarity", "probe")
PROTOCOLS = (*ON_PAIRS, "retrieval", *ON_MASKS, "video")
PAPERS = ("dino", "ibot", "udi", "mte", "mmc", "mae", "msn")


@dataclass(frozen=True)
class Plan:
    """What is measured.  Raises UserError for a protocol that is none."""

    protocols: Sequence[str] = PROTOCOLS
    preset: str | None = None  # a paper, whose settings are taken wherever it has some
    seed: int = 0
    dense_size: int = 480  # pixels, for what is measured on patches

    def __post_init__(self) -> None:
        for name in self.protocols:
            if name not in PROTOCOLS:
                known = ", ".join(PROTOCOLS)
                raise UserError(f"{name!r} is no frozen protocol{nearest(name, PROTOCOLS)}; there are {known}")

        if self.preset is not None and self.preset not in PAPERS:
            raise UserError(f"no preset {self.preset!r}{nearest(self.preset, PAPERS)}; there are {', '.join(PAPERS)}")

    def read(self, pair: Pair) -> list[Source]:
        """Of which of these images several protocols read all tokens: these are extracted in one pass."""
        if "knn" in self.protocols:
            return [pair.train, pair.test]
        return [pair.test] if "cka" in self.protocols else []

    def of(self, presets: Mapping[str, Any]) -> str | None:
        """The preset, where a protocol has it."""
        return self.preset if self.preset in presets else None


Job = tuple[str, Callable[[], Outcome]]
"""A protocol's name, and what measures it; that may raise UserError where the images do not suit the protocol."""


def on_pair(subject: Subject, pair: Pair, plan: Plan) -> list[Job]:
    """On labelled images to learn from and to measure on."""
    jobs: list[Job] = []
    if "knn" in plan.protocols:
        jobs += [("knn", partial(of.of_knn, subject, pair, t, preset=plan.of(KNN))) for t in subject.tokens()]
    if "linear" in plan.protocols:
        jobs.append(("linear", partial(of.of_linear, subject, pair, preset=plan.of(LINEAR), seed=plan.seed)))
    if "logistic" in plan.protocols:
        options = {"preset": plan.of(LOGISTIC), "seed": plan.seed}
        jobs += [("logistic", partial(of.of_logistic, subject, pair, few, **options)) for few in of.FEW_LABELS]
    return jobs + on_images(subject, pair.test, plan)


def on_images(subject: Subject, source: Source, plan: Plan) -> list[Job]:
    """On labelled images alone: nothing is learned from others."""
    jobs: list[Job] = []
    if "fewshot" in plan.protocols:
        jobs.append(("fewshot", partial(of.of_few_shot, subject, source, seed=plan.seed)))
    if "clustering" in plan.protocols:
        jobs.append(("clustering", partial(of.of_clustering, subject, source, seed=plan.seed)))
    if "cka" in plan.protocols and len(subject.tokens()) > 1:
        jobs.append(("cka", partial(of.of_cka, subject, source)))
    return jobs


def on_retrieval(subject: Subject, images: RetrievalSet, plan: Plan) -> list[Job]:
    """On a set with its own ground truth: revisited sets as the preset's paper describes them, or as DINO does."""
    chosen = RETRIEVAL.get(plan.preset or "", RETRIEVAL["dino"]).get(images.name)
    form = {} if chosen is None else {"size": chosen.size, "scales": chosen.scales}
    job = partial(of_retrieval, subject, images, seed=plan.seed, **form)
    return [("retrieval", job)] if "retrieval" in plan.protocols else []


Parts = tuple[Segmented, Segmented] | UserError
"""(to learn from, to measure on), or why there are none."""


def on_masks(subject: Subject, source: Annotated, pair: Parts, plan: Plan) -> list[Job]:
    """On images with masks; pair: for the probe."""
    jobs: list[Job] = []
    size, seed = plan.dense_size, plan.seed
    if "click" in plan.protocols:
        jobs.append(("click", partial(dense.of_click, subject, source, ClickSettings(size=size), seed=seed)))
    if "similarity" in plan.protocols:
        # A frame of a video may have one object: all else is then what is different.
        options = {"size": size, "seed": seed, "background": isinstance(source, AnnotatedFrames)}
        jobs.append(("similarity", partial(dense.of_similarity, subject, source, **options)))
    if "probe" in plan.protocols:
        jobs.append(("probe", partial(_probe, subject, pair, seed)))
    return jobs


def _probe(subject: Subject, pair: Parts, seed: int) -> Outcome:
    if isinstance(pair, UserError):
        raise pair
    return dense.of_patch_probe(subject, *pair, seed=seed)


def on_videos(subject: Subject, name: str, videos: Sequence[Video], plan: Plan) -> list[Job]:
    """On videos whose objects have masks."""
    job = partial(dense.of_video, subject, name, videos, Settings(size=plan.dense_size))
    return [("video", job)] if "video" in plan.protocols else []
