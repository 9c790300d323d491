"""Linear probe as the papers train it: the frozen encoder sees every train image freshly augmented in every epoch."""

import math
import random
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from triptych.data.batches import Batches
from triptych.data.crops import Crop
from triptych.data.loader import LoaderConfig, ViewDataset, ViewsConfig, make_loader
from triptych.data.sources import Source
from triptych.data.subsets import Subset
from triptych.data.views import ViewSpec
from triptych.data.workers import close, next_of
from triptych.encoders import Encoder
from triptych.errors import UserError
from triptych.evals.features import cached, labels_of
from triptych.evals.frozen import fast_batch, frozen
from triptych.evals.knn import check_sets
from triptych.evals.linear import LinearResult, Select, changed, check_choice, held_out, result_of
from triptych.evals.linear_presets import LinearPreset, Norm, preset_of
from triptych.evals.probe import Probe
from triptych.evals.selection import Token, check_token, select
from triptych.evals.transform import EvalTransform
from triptych.precision import fast_precision
from triptych.progress import progress
from triptych.schedules import Progress


def linear_augmented(
    encoder: Encoder,
    train: Source,
    test: Source,
    transform: EvalTransform,
    preset: str | LinearPreset,
    *,
    token: Token | None = None,
    layers: int | None = None,
    epochs: int | None = None,
    batch: int | None = None,
    lrs: Sequence[float] | None = None,
    norm: Norm | None = None,
    select: Select = "held_out",
    seed: int = 0,
    device: torch.device | str = "cpu",
    precision: torch.dtype | None = None,
    workers: int | None = None,
    folder: Path | None = None,
) -> LinearResult:
    """`linear` with the preset's augmentation of the train images; costs `epochs` passes of the encoder over them.

    transform: of the test images and of those held out; its size, mean and std are the train images' too.
    token, layers, epochs, batch, lrs, norm: instead of the preset's.
    select: as in `linear`; for "held_out" with several rates a second probe learns beside the reported one, from the
    same views but for those of a tenth of the images, on which it is judged.

    Batches are cut down to the size of the set, and to one that splits into the parts that the device takes at once;
    what is left of an epoch waits for the next.  BatchNorm has the batch's statistics in training, and running ones
    (momentum 0.1) for the test.  The encoder computes in `precision` (None = what is fast on the device), the probe in
    float32; a seed fixes the result.  workers: processes that augment, None = what the machine has.  folder: where
    features of the test and held-out images are kept, None = the usual cache.  An image that cannot be read is left out
    of the test, and in training replaced by the next one.

    Raises UserError as `linear`; for images without labels, sets of unlike classes, a token that the encoder lacks.
    """
    chosen = changed(preset_of(preset), epochs=epochs, batch=batch, lrs=lrs, norm=norm)
    device = torch.device(device)
    usual = chosen.features(encoder)
    form = {"token": token or usual[0], "layers": (1 if token else usual[1]) if layers is None else layers}
    precision = precision or fast_precision(device)
    check_token(encoder, form["token"])
    labels = labels_of(train, torch.arange(len(train)))
    if train.classes is None or train.classes != test.classes:
        raise UserError(f"{train.name} and {test.name} do not have the same classes: labels would not fit")
    check_choice(labels, select)
    held = held_out(labels, seed) if select == "held_out" and len(chosen.lrs) > 1 else None

    def plain(source: Source) -> tuple[Tensor, Tensor]:
        extraction = {"device": device, "precision": precision, "workers": workers, "folder": folder}
        x, indices = cached(encoder, source, transform, **form, **extraction)
        return x.to(device), labels_of(source, indices).to(device)

    sets = [plain(test)]
    if held is not None:
        tenth = f" [held-out tenth, seed {seed}]"
        sets.append(plain(Subset(train, held.nonzero()[:, 0].tolist(), tenth)))
    for x, y in sets:
        check_sets(x, y, x, y)
    views = _Views(
        train, transform, chosen, Plan.of(chosen, len(train), fast_batch(device, transform.size)), seed, workers, held
    )
    with frozen(encoder, device, precision):
        scores, judge = _train(encoder, views, sets, len(train.classes), device, **form)
    return result_of(
        chosen,
        select,
        scores,
        judge,
        augmentation=chosen.augmentation.about,
        batch=views.plan.batch,
        train_images=len(train),
        test_images=len(sets[0][0]),
        classes=len(train.classes),
    )


@dataclass(frozen=True)
class Plan:
    """How an epoch is cut up."""

    batch: int  # images of a step of the probe ...
    parts: int  # ... in so many calls of the encoder
    steps_per_epoch: int
    epochs: int

    @classmethod
    def of(cls, preset: LinearPreset, images: int, at_once: int) -> "Plan":
        """at_once: images that a call of the encoder takes."""
        whole = min(preset.batch, images)
        parts = -(-whole // at_once)
        batch = whole // parts * parts
        return cls(batch, parts, images // batch, preset.epochs)

    def clock(self, step: int) -> Progress:
        return Progress(step, self.epochs * self.steps_per_epoch, self.steps_per_epoch)


@dataclass(frozen=True)
class _Views:
    """Augmented train images."""

    source: Source
    transform: EvalTransform
    preset: LinearPreset
    plan: Plan
    seed: int
    workers: int | None
    held: Tensor | None  # (M,) bool: images that the judged probe must not see

    def parts(self, device: torch.device, patch_size: int) -> Generator[tuple[Tensor, Tensor, Tensor], None, None]:
        """Of each call of the encoder: normalised images (b, 3, S, S) and labels (b,) on the device, and which of them
        the judged probe may learn from, (b,) bool on the CPU."""
        a, config = self.preset.augmentation, self._config()
        spec = ViewSpec(global_crops=1, local_crops=False, labels=True)
        dataset = (_ClippedCrops if a.clipped else ViewDataset)(self.source, config, spec, patch_size, self.seed)
        order = Batches(len(self.source), self.plan.batch, self.plan.epochs, self.seed, self.plan.parts)
        loader = iter(make_loader(dataset, order, LoaderConfig(workers=self.workers), pin=device.type == "cuda"))
        mean, std = (torch.tensor(x, device=device) for x in (config.mean, config.std))
        erase = RandomErasing(a.erase, mode="pixel", device=device)  # type: ignore[arg-type]
        try:
            for rows in progress(order, f"linear probe on augmented {self.source.name}, part", len(order)):
                given, unreadable = next_of(loader)
                views = given.on_device(device, mean, std)
                free = torch.ones(len(rows), dtype=torch.bool)
                if self.held is not None:  # an image that replaces an unreadable one may be one that is held out
                    free = ~self.held[[index for _, index in rows]] & (not unreadable)
                assert views.labels is not None
                yield erase(views.global_crops[0].images), views.labels, free
        finally:
            close(loader)

    def _config(self) -> ViewsConfig:
        a, t = self.preset.augmentation, self.transform
        sizes = {"global_crops": 1, "local_crops": 0, "global_size": t.size, "global_scale": a.scale}
        return ViewsConfig(**sizes, interpolation=a.interpolation, colour=a.colour, mean=t.mean, std=t.std)


def _train(
    encoder: Encoder,
    views: _Views,
    sets: list[tuple[Tensor, Tensor]],
    classes: int,
    device: torch.device,
    *,
    token: Token,
    layers: int,
) -> tuple[Tensor, Tensor | None]:
    """The probe, and a judged one where there are held-out features beside the test's.

    -> test top-1 and top-5 in percent (epochs, 2, R), and the judged one's top-1 (R,), on the CPU.
    """
    plan, preset = views.plan, views.preset
    schedule, scale = preset.schedule, preset.scale(plan.batch)
    probes = [Probe(preset, x.shape[1], classes, torch.Generator().manual_seed(views.seed), device) for x, _ in sets]
    found, scores, step = [], [], 0
    with _seeded(views.seed, device), closing(views.parts(device, encoder.patch_size)) as parts:
        for images, labels, free in parts:
            found.append((select(encoder, images, token, layers).float(), labels, free))
            if len(found) < plan.parts:
                continue
            x, y, rows = map(torch.cat, zip(*found, strict=True))
            mine = rows.nonzero()[:, 0]
            with torch.autocast(device.type, enabled=False):
                rate = scale * schedule(plan.clock(step))
                probes[0].step(x, y, rate)
                if len(sets) > 1 and len(mine) > 1:  # a BatchNorm needs two
                    mine = mine.to(device, non_blocking=True)
                    probes[1].step(x[mine], y[mine], rate)
                found, step = [], step + 1
                if step % plan.steps_per_epoch == 0:
                    scores.append(probes[0].score(*sets[0]))
    for probe in probes:
        probe.check()
    with torch.autocast(device.type, enabled=False):
        judge = probes[1].score(*sets[1])[0].cpu() if len(sets) > 1 else None
    return torch.stack(scores).cpu(), judge


class _ClippedCrops(ViewDataset):
    def _crops(self, height: int, width: int, rng: np.random.Generator):
        crop = clipped_crop(height, width, self.config.global_scale, rng)
        yield (crop, bool(rng.random() < self.config.flip)), "global_1"


def clipped_crop(height: int, width: int, scale: tuple[float, float], rng: np.random.Generator) -> Crop:
    """`random_crop` of a single draw, cut to the image's height and width where it is larger (MAE's linear probe)."""
    area = height * width * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    w, h = (max(1, round(math.sqrt(x))) for x in (area * aspect, area / aspect))
    w, h = min(w, width), min(h, height)
    return Crop(int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """timm's erasing draws from Python's and torch's own generators: seeded here, and afterwards as they were."""
    state = random.getstate()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(state)
