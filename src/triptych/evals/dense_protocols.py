"""Protocols on patch tokens of frozen encoders: a subject in, an outcome out; shared by commands and suite."""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from triptych.data.annotated import Annotated, Segmented
from triptych.data.davis import Video
from triptych.data.subsets import digest
from triptych.encoders.load import Loaded
from triptych.errors import UserError
from triptych.evals import click as clicks
from triptych.evals import object_similarity as similarities
from triptych.evals import video as videos_
from triptych.evals.class_maps import figures as map_figures
from triptych.evals.click import ClickSettings, click
from triptych.evals.outcome import Outcome, about_images
from triptych.evals.patch_probe import patch_probe
from triptych.evals.subject import Subject


def of_click(
    subject: Subject, source: Annotated, settings: ClickSettings, *, images: int | None = None, seed: int = 0
) -> Outcome:
    """Zero-shot segmentation from one clicked patch."""
    model = _only(subject)
    result = click(model.encoder, source, settings, images=images, seed=seed, **_look(subject, model))
    _told(subject, source, result.unreadable)
    setting = f"{settings.size} px, {settings.unit}, {settings.prompt} click"
    return Outcome("click", setting, _about(subject, result, test=source), result, clicks.figures(result))


def of_similarity(subject: Subject, source: Annotated, *, seed: int = 0, **settings: Any) -> Outcome:
    """settings: as of `object_similarity`."""
    model = _only(subject)
    result = similarities.object_similarity(model.encoder, source, seed=seed, **settings, **_look(subject, model))
    _told(subject, source, result.unreadable)
    about = _about(subject, result, test=source)
    setting = f"{result.size} px, pairs within one {result.pairs}"
    return Outcome("similarity", setting, about, result, similarities.figures(result))


def of_video(
    subject: Subject, name: str, videos: Sequence[Video], settings: videos_.Settings, *, out: Path | None = None
) -> Outcome:
    """name: of the set.  out: folder of the index masks; None = for the scores only."""
    options: dict[str, Any] = {"out": out, "device": subject.device, "precision": subject.precision}
    result = videos_.video(_only(subject).encoder, videos, settings, **options)
    images = {"name": name, "fingerprint": digest(video.fingerprint() for video in videos)}
    about = _about(subject, result) | {"test": images}
    return Outcome("video", f"{settings.size} px", about, result, videos_.figures(result))


def of_patch_probe(subject: Subject, train: Segmented, test: Segmented, *, seed: int = 0, **settings: Any) -> Outcome:
    """settings: as of `patch_probe`."""
    model = _only(subject)
    result = patch_probe(model, train, test, device=subject.device, seed=seed, **settings)
    _told(subject, test, result.unreadable)
    about = _about(subject, result, train=train, test=test)
    note = f"{result.patches} patches of {result.probed_images} images"
    note += "" if result.converged else "; NOT CONVERGED"
    figures = [replace(figure, note="; ".join(filter(None, (figure.note, note)))) for figure in map_figures(result)]
    return Outcome("probe", f"{result.size} px", about, result, figures)


def _told(subject: Subject, source: Annotated, unreadable: int) -> None:
    if unreadable:
        subject.say(f"{unreadable} images of {source.name} cannot be read: left out")


def _only(subject: Subject) -> Loaded:
    if len(subject.models) > 1:
        raise UserError(f"{subject.name}: protocols on patches take one encoder")
    return subject.models[0]


def _look(subject: Subject, model: Loaded) -> dict[str, Any]:
    """How images are normalised, and where the encoder runs."""
    return {"mean": model.mean, "std": model.std, "device": subject.device, "precision": subject.precision}


def _about(subject: Subject, result: Any, **sources: Any) -> dict[str, Any]:
    """What identifies the encoder and the images, but for what the result says."""
    image = {"size", "resize", "shape", "interpolation"}  # of other protocols
    said = image | {field.name for field in fields(result)}
    about = {key: value for key, value in subject.about().items() if key not in said}
    return about | about_images(**sources)
