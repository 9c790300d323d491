"""`triptych show`: a model and images or a video from the command line, a picture or a video in a file."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from triptych.data.sources import Source, open_source
from triptych.data.subsets import Subset
from triptych.encoders.load import Weights, load_method
from triptych.errors import UserError
from triptych.evals.frozen import frozen
from triptych.evaluation import console, device, load_one, say, subject_of
from triptych.methods.udi import SRS
from triptych.progress import progress, reporting
from triptych.show import kinds
from triptych.show.inputs import SAMPLE, Film, Fit, Picture, Place, open_film, open_images, order, pictures, rgb, spread
from triptych.show.kinds import Kind, Sample, Viewer
from triptych.show.neighbours import check_k, nearest_images
from triptych.show.patches import correspondences
from triptych.show.saving import FILM, check_out, save_film, save_picture
from triptych.show.sheet import Panel, Tile, resized, sheet, side_for
from triptych.show.tiles import matches_tile

SIZE = 480  # pixels, as in the papers
SEVERAL = 240  # pixels of a tile's longer side where there are several images
FILM_WIDTH, RATE = 1280, 24  # pixels; frames per second of a folder
STRIP = 8  # frames of a video in a picture
THUMBNAIL = 224  # pixels of a gallery's image


def default_out(kind: str, inputs: Sequence[str], fps: float | None = None) -> Path:
    """KIND.png, of a video KIND.mp4.  Raises UserError for no inputs."""
    if not inputs:
        raise UserError(f"show {kind}: give image files, or one folder, archive, data set or video, after the model")
    return Path(f"{kind}{'.png' if open_film(inputs, fps) is None else FILM}")


@dataclass(frozen=True)
class Asked:
    """What every kind of picture is asked with; see cli_show."""

    inputs: Sequence[str]
    out: Path
    size: int | None = None
    square: bool = False
    images: int = 16
    fps: float | None = None
    seed: int = 0
    weights: Weights = "teacher"
    file: dict[str, Any] = field(default_factory=dict)  # arch, heads, origin, partial of `load_encoder`

    def film(self) -> Film | None:
        """The video among the inputs.  Raises UserError, also for an --out that does not fit."""
        film = open_film(self.inputs, self.fps)
        if film is None and self.out.suffix.lower() == FILM:
            film = open_film(self.inputs, RATE)
        check_out(self.out, film=film is not None)
        return film

    def stills(self, kind: str) -> tuple[Source, bool]:
        """`open_images` for kinds that have no videos.  Raises UserError, also for a named file that is no image."""
        if self.film() is not None:
            raise UserError(f"show {kind} takes images, not a video: give single frames")
        source, named = open_images(self.inputs)
        for i in range(len(source)) if named else ():
            rgb(source, i)  # what was named must be readable
        return source, named

    def fit(self, viewer: Viewer) -> Fit:
        return Fit(self.size or SIZE, viewer.encoder.patch_size, self.square)

    @contextmanager
    def viewer(self, model: str) -> Iterator[tuple[Viewer, str]]:
        """The encoder on its device, and its name."""
        loaded = load_one(model, weights=self.weights, **self.file)
        with frozen(loaded.encoder, device()), reporting(console):
            yield Viewer(loaded.encoder, loaded.mean, loaded.std), loaded.name


def maps(kind: str, model: str, asked: Asked, **options: Any) -> None:
    """One picture or video of a kind that `kinds` has; options as there, but `at` as a user writes it."""
    film = asked.film()
    source, named = open_images(asked.inputs) if film is None else (None, False)
    if "at" in options:
        options["place"] = Place.read(options.pop("at"))
    if kind == "srs":
        options["module"] = srs_of(model, asked.weights)
    with asked.viewer(model) as (viewer, name):
        fit = asked.fit(viewer)

        def make(sample: Sample) -> Kind:
            if kind == "pca" or (kind == "clusters" and film is not None):
                options["sample"] = sample
            if kind == "click":
                options["first"] = film is not None
            return getattr(kinds, kind)(viewer, **options)

        if film is not None:
            _film(film, fit, asked.out, make, name)
        else:
            assert source is not None
            _stills(source, named, fit, asked, make, name)


def srs_of(run: str, weights: Weights) -> SRS:
    """The sampling module of a run of UDI, alone or inside MTE.  Raises UserError for other runs."""
    recipe, method, _ = load_method(run, weights)
    base: Any = getattr(method, "base", method)
    srs: SRS | None = getattr(getattr(base, "student" if weights == "student" else "teacher", None), "srs", None)
    if srs is None:
        raise UserError(
            f"{run} is a run of {recipe.method.name}: only UDI samples patches (SRS); show attention instead"
        )
    return srs.to(device()).eval()


def _stills(source: Source, named: bool, fit: Fit, asked: Asked, make: Callable[[Sample], Kind], name: str) -> None:
    def every() -> Iterator[Picture]:
        return pictures(source, fit, named=named, count=asked.images, seed=asked.seed)

    kind, total = make(lambda: spread(every(), SAMPLE)), len(source) if named else min(asked.images, len(source))
    rows = _rows(kind, progress(every(), "pictures:", total), SEVERAL if total > 1 else None)
    _save(rows, kind, name, fit, asked.out)
    if total < len(source):
        say(f"{total} of {len(source)} images of {source.name}, drawn by seed {asked.seed}")


def _film(film: Film, fit: Fit, out: Path, make: Callable[[Sample], Kind], name: str) -> None:
    """A video of sheets, or a strip of some frames."""

    def every() -> Iterator[Picture]:
        shape = None
        for i, pixels in enumerate(film):
            if shape not in (None, pixels.shape) and not fit.square:
                raise UserError(f"frame {i} of {film.name} is {pixels.shape[:2]}, not as the first one: give --square")
            shape = pixels.shape
            yield fit(f"{film.name}, frame {i}", pixels)

    kind = make(lambda: spread(every(), SAMPLE))
    if out.suffix.lower() != FILM:
        chosen = spread(every(), STRIP)
        _save(_rows(kind, progress(chosen, "frames:", len(chosen)), SEVERAL), kind, name, fit, out)
        return

    def sheets() -> Iterator[np.ndarray]:
        for picture in progress(every(), "frames:", len(film)):
            rows = _rows(kind, [picture], None, FILM_WIDTH)
            yield np.asarray(sheet(rows, about=_about(kind, name, fit), scale=kind.scale, width=FILM_WIDTH))

    codec = save_film(sheets(), film.rate, out)
    say(f"video: {out} ({codec}, {film.rate:g} frames a second)")


def _rows(kind: Kind, seen: Iterator[Picture] | list[Picture], most: int | None, width: int | None = None):
    """The panels of all pictures, each no larger than it will be shown.  most: None = as the encoder sees it."""
    rows: list[Panel] = []
    for picture in seen:
        new = kind.panels(picture)
        side = side_for(new[0], most or max(picture.pixels.shape[:2]), *([width] if width else []))
        rows += [resized(panel, side) for panel in new]
    return rows


def _about(kind: Kind, name: str, fit: Fit) -> str:
    shape = f"{fit.size} x {fit.size} px" if fit.square else f"longer side {fit.size} px"
    return f"{kind.about} {name}, {shape}, patches of {fit.patch} px."


def _save(rows: list[Panel], kind: Kind, name: str, fit: Fit, out: Path) -> None:
    save_picture(sheet(rows, about=_about(kind, name, fit), scale=kind.scale), out)
    say(f"picture: {out}")


def neighbours(model: str, asked: Asked, *, gallery: str, k: int, token: str) -> None:
    """Images of a gallery that are most like each input."""
    (source, named), bank = asked.stills("neighbours"), open_source(gallery)
    check_k(k, len(bank))
    chosen = range(len(source)) if named else order(source, asked.images, asked.seed)[: asked.images]
    queries = Subset(source, list(chosen), "")
    with subject_of(model, weights=asked.weights, size=asked.size, **asked.file) as subject:
        subject.check([token])
        asking, known = subject.features(queries, token), subject.features(bank, token)
        found = nearest_images(known.x, asking.x.to(subject.device), k)
        about = f"Cosine of {token}. {subject.name}, {subject.transforms[0].size} px. Gallery: {bank.name}."
    rows = []
    near = known.indices[found.indices.cpu()].tolist()
    for query, indices, cosines in zip(asking.indices.tolist(), near, found.cosine.tolist(), strict=True):
        tiles = [Tile("query", _thumbnail(queries, query))]
        for rank, (i, cosine) in enumerate(zip(indices, cosines, strict=True), 1):
            tiles.append(Tile(str(rank), _thumbnail(bank, i), f"{cosine:.2f}  {bank.key(i)}"))
        rows.append(Panel(queries.key(query), tiles))
    rows = [resized(row, side_for(row, THUMBNAIL)) for row in rows]
    save_picture(sheet(rows, about=about), asked.out)
    say(f"picture: {asked.out}")


def _thumbnail(source: Source, index: int) -> np.ndarray:
    """(H, W, 3) uint8 with a longer side of at most THUMBNAIL."""
    image = Image.fromarray(rgb(source, index))
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return np.asarray(image)


def correspondence(model: str, asked: Asked, *, top: int) -> None:
    """Lines between patches of two images that are each other's most similar one."""
    source, named = asked.stills("correspondence")
    if not named or len(source) != 2:
        raise UserError(f"show correspondence takes two image files, {len(asked.inputs)} inputs were given")
    with asked.viewer(model) as (viewer, name):
        fit = asked.fit(viewer)
        a, b = (fit(source.key(i), rgb(source, i)) for i in range(2))
        found = correspondences(viewer.encoder, viewer.images(a)[0], viewer.images(b)[0], top)
        places = found.first.cpu().numpy(), found.second.cpu().numpy()
        drawn = matches_tile(a.pixels, b.pixels, (viewer.grid(a), viewer.grid(b)), places)
    shown = len(found.similarity)
    about = f"{shown} of the {found.mutual} pairs of patches that are each other's nearest, the most similar ones"
    kind = Kind(lambda _: [], f"{about}: cosine {found.similarity[-1]:.2f} to {found.similarity[0]:.2f}.")
    _save([Panel(f"{a.name}  and  {b.name}", [Tile("", drawn)])], kind, name, fit, asked.out)


def reconstruction(run: str, asked: Asked, *, blocks: Sequence[int], norm: bool) -> None:
    """As `triptych eval reconstruction`."""
    from triptych.run_evals import eval_reconstruction

    source, named = asked.stills("reconstruction")
    count = len(source) if named else asked.images
    eval_reconstruction(run, source, asked.out, images=count, blocks=blocks, norm=norm, seed=asked.seed)
