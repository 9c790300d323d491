"""`triptych quickstart`: the whole path on a small drawn data set, without a download or a GPU."""

import copy
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from triptych.data import scenes
from triptych.data.sources import Source, open_source
from triptych.encoders.load import Weights, load_encoder
from triptych.errors import UserError
from triptych.evals.features import extract, labels_of
from triptych.evals.knn import knn
from triptych.evals.transform import EvalTransform
from triptych.export import export
from triptych.health import feature_health
from triptych.pictures import token_sheet
from triptych.recipes.udi import udi_quickstart
from triptych.report.page import report
from triptych.train import train

TRAIN, TEST, CLIPS, SIZE, K = 2000, 400, 8, 64, 10


def quickstart(out: Path, console: Console | None = None) -> None:
    """Everything lands under the new folder `out`.  Exits with 1 where training did not beat the untrained encoder."""
    console, began = console or Console(), time.monotonic()
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: give a new folder with --out")
    console.print(f"drawing {TRAIN} training and {TEST} test scenes of {len(scenes.CLASSES)} classes")
    scenes.write(out / "data", train=TRAIN, test=TEST, clips=CLIPS, size=SIZE)
    sources = open_source(out / "data" / "train"), open_source(out / "data" / "test")
    result = train(udi_quickstart(), sources[0], out / "run", console)
    measured = {}
    stages: list[tuple[Weights, str]] = [("untrained", "before training"), ("teacher", "after training")]
    for weights, name in stages:
        loaded = load_encoder(str(out / "run"), weights=weights)
        for token in ("cls", "cls_plus"):
            measured[name, token] = _measure(loaded, sources, token)
    exported = load_encoder(str(out / "run"))
    _picture(exported, sources[1]).save(out / "tokens.png")
    difference = export(copy.deepcopy(exported), out / "encoder")
    table = Table("", f"{K}-NN top-1 %, class", f"{K}-NN top-1 %, class+", "feature rank (RankMe)")
    for name in ("before training", "after training"):
        accuracy, rank = measured[name, "cls"]
        table.add_row(name, f"{accuracy:.1f}", f"{measured[name, 'cls_plus'][0]:.1f}", f"{rank:.1f}")
    console.print(table)
    console.print(f"trained at {result.images_per_second:.0f} images/s; {time.monotonic() - began:.0f} s in all")
    page = report([out / "run"], out=out / "report.html", results=[], sample=200)
    console.print(f"report: {page} (for a browser)", highlight=False)
    console.print(f"picture: {out}/tokens.png\nencoder: {out}/encoder (timm gives the same tokens to {difference:.1g})")
    before, after = (measured[name, "cls"][0] for name in ("before training", "after training"))
    if after <= before:
        console.print(f"training did NOT beat the untrained encoder: {after:.1f} against {before:.1f} %")
        sys.exit(1)


def _measure(loaded, sources: tuple[Source, Source], token) -> tuple[float, float]:
    """-> k-NN top-1 in percent, RankMe of the test features"""
    transform = EvalTransform.of(loaded.size, loaded.mean, loaded.std)
    sets = []
    for source in sources:
        features, indices = extract(loaded.encoder, source, transform, token=token)
        sets.append((features, labels_of(source, indices)))
    (train_x, train_y), (test_x, test_y) = sets
    return knn(train_x, train_y, test_x, test_y, k=[K]).top1[K], feature_health(test_x)["rankme"]


def _picture(loaded, source: Source):
    """The token sheet of one test scene per class, at twice the training size for a finer token grid."""
    transform = EvalTransform(2 * loaded.size, 2 * loaded.size, loaded.mean, loaded.std)
    first = [next(i for i in range(len(source)) if source.label(i) == c) for c in range(6)]
    pixels = torch.stack([transform.pixels(source.image(i).convert("RGB")) for i in first])
    mean, std = (torch.tensor(x)[:, None, None] for x in (loaded.mean, loaded.std))
    return token_sheet(loaded.encoder, pixels, (pixels / 255 - mean) / std)
