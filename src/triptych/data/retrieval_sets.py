"""Sets for image retrieval: revisited Oxford and Paris, ground truths in JSON, labelled folders."""

import builtins
import io
import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from triptych.data.archives import Zip
from triptych.data.images import UnreadableImage
from triptych.data.sources import Source, load_rgb, open_source, splits
from triptych.data.stored import Stored
from triptych.data.stores import Files, Store, exists
from triptych.data.subsets import digest
from triptych.errors import UserError


class Wanted(NamedTuple):
    """What one query ought to find: positions in the gallery, int64, in any order."""

    positive: np.ndarray  # (P,)
    junk: np.ndarray  # (J,) neither right nor wrong: taken out of the ranking.  Counts where both hold an image


Truth = Mapping[str, Sequence[Wanted]]
"""For each way to judge ("easy", "medium" and "hard" of the revisited sets; else one): what each query wants."""


@dataclass(frozen=True)
class RetrievalSet:
    name: str
    gallery: Source
    queries: Source
    truth: Truth


def open_retrieval(
    data: str | Path, queries: str | Path | None = None, *, crop_queries: bool = False
) -> list[RetrievalSet]:
    """The sets that `data` names; several only of a JSON file with several groups of queries.

    A folder with gnd_NAME.pkl and jpg/ (or that .pkl file): `revisited`.  A .json file: `from_json`.  Else anything
    with labels: `labelled`, with `queries` of their own where given.  Raises UserError.
    """
    path = Path(data).expanduser()
    pickles = sorted(path.glob("gnd_*.pkl")) if path.is_dir() else [path] if path.suffix == ".pkl" else []
    is_json = path.suffix.lower() == ".json"
    if queries is not None and (pickles or is_json):
        raise UserError(f"{path} names its queries itself; leave {queries} out")
    if crop_queries and not pickles:
        raise UserError(f"{path} has no boxes to crop queries to: only the revisited Oxford and Paris have")
    if len(pickles) > 1:
        raise UserError(f"{path} holds {len(pickles)} ground truths; give one: {', '.join(p.name for p in pickles)}")
    if pickles:
        return [revisited(pickles[0], crop_queries=crop_queries)]
    return from_json(path) if is_json else [labelled(data, queries)]


# --- revisited Oxford and Paris (Radenović et al. 2018) ---


def revisited(file: Path, *, crop_queries: bool = False) -> RetrievalSet:
    """NAME/gnd_NAME.pkl and NAME/jpg/*.jpg, as published.

    easy: hard images are junk too; medium: easy and hard ones are wanted; hard: easy ones are junk too.
    crop_queries: to the box of the queried building, the benchmark's rule; DINO and iBOT do not crop.
    """
    truth = _unpickled(file)
    try:
        gallery, queries = (_listed(file, [(None, f"jpg/{n}.jpg") for n in truth[k]]) for k in ("imlist", "qimlist"))
        boxes = [np.asarray(of["bbx"], dtype=np.float64) for of in truth["gnd"]]
        wanted = [{k: _positions(of[k], len(gallery)) for k in ("easy", "hard", "junk")} for of in truth["gnd"]]
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{file} is no ground truth of a revisited set: imlist, qimlist, gnd ({error!r})") from error
    if len(wanted) != len(queries) or any(box.shape != (4,) or not np.isfinite(box).all() for box in boxes):
        raise UserError(
            f"{file}: {len(queries)} queries, {len(wanted)} truths; each needs one, with a box of 4 numbers"
        )
    return RetrievalSet(
        file.stem.removeprefix("gnd_"),
        gallery,
        Cropped(queries, boxes) if crop_queries else queries,
        {
            "easy": [Wanted(of["easy"], np.append(of["junk"], of["hard"])) for of in wanted],
            "medium": [Wanted(np.append(of["easy"], of["hard"]), of["junk"]) for of in wanted],
            "hard": [Wanted(of["hard"], np.append(of["junk"], of["easy"])) for of in wanted],
        },
    )


class _PlainUnpickler(pickle.Unpickler):
    """Containers, text, numbers and numpy arrays; a pickle of anything else could run any program."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("builtins", "__builtin__") and name in _CONTAINERS:
            return getattr(builtins, name)
        known = module.replace("numpy._core", "numpy.core"), name
        if known not in _PLAIN:
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        return _PLAIN[known]


_CONTAINERS = ("list", "dict", "set", "frozenset", "tuple", "bytes", "bytearray")
_PLAIN = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    # Taken from what numpy itself would write: it moved them between its versions.
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy.core.multiarray", "scalar"): np.float64(0).__reduce__()[0],
    ("numpy.core.numeric", "_frombuffer"): np.empty(0).__reduce_ex__(5)[0],
    ("_codecs", "encode"): lambda text, _: text.encode("latin1"),  # how old protocols write bytes
}


def _unpickled(file: Path) -> Any:
    try:
        return _PlainUnpickler(io.BytesIO(file.read_bytes()), encoding="latin1").load()
    except Exception as error:  # of any kind: damaged pickles raise nearly everything
        raise UserError(
            f"cannot read {file} ({error}): only lists, dictionaries and numpy arrays are accepted, as published at "
            "http://cmp.felk.cvut.cz/revisitop"
        ) from error


class Cropped:
    """Images of another source, each cropped to a box (left, top, right, bottom; pixels, rounded as by Pillow)."""

    classes = None

    def __init__(self, source: Source, boxes: Sequence[np.ndarray]) -> None:
        self.source, self.boxes, self.name = source, boxes, f"{source.name} [cropped]"

    def __len__(self) -> int:
        return len(self.source)

    def image(self, index: int) -> Image.Image:
        whole = load_rgb(self.source, index)
        left, top, right, bottom = (round(float(x)) for x in self.boxes[index])
        box = max(left, 0), max(top, 0), min(right, whole.width), min(bottom, whole.height)
        if box[0] >= box[2] or box[1] >= box[3]:
            raise UnreadableImage(self.key(index), f"its box {left, top, right, bottom} lies outside of it")
        return whole.crop(box)

    def stored(self, index: int) -> np.ndarray:
        return np.array(self.image(index))

    def label(self, index: int) -> int | None:
        return None

    def key(self, index: int) -> str:
        return self.source.key(index)

    def fingerprint(self) -> str:
        return digest([self.source.fingerprint(), *(str(box.tolist()) for box in self.boxes)])


# --- a ground truth in JSON ---


def from_json(file: Path) -> list[RetrievalSet]:
    """One set for each group of queries of a JSON file:

        {"gallery_zip": "test.zip",
         "gallery": ["a/1.jpg", ...],
         "queries": [{"file": "a/2.jpg", "zip": "test.zip", "positive": [0, 7], "junk": [3]}, ...]}

    positive, junk: 0-based positions in "gallery".  Files are relative to the JSON file's folder, or lie in the .zip
    file beside it that "gallery_zip" or a query's "zip" names; these and "junk" may be left out.  Several groups have
    keys NAME_queries each.  Other keys are not looked at.
    """
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        groups = {k.removesuffix("queries").rstrip("_"): v for k, v in about.items() if k.endswith("queries")}
        gallery = _listed(file, [(about.get("gallery_zip"), name) for name in about["gallery"]])
        sets = [
            RetrievalSet(
                f"{file.parent.name}/{file.name}" + (f" [{group}]" if group else ""),
                gallery,
                _listed(file, [(q.get("zip"), q["file"]) for q in queries], f" [{group or 'queries'}]"),
                {
                    "all": [
                        Wanted(_positions(q["positive"], len(gallery)), _positions(q.get("junk", ()), len(gallery)))
                        for q in queries
                    ]
                },
            )
            for group, queries in groups.items()
        ]
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{file} is no ground truth: it needs "gallery", "queries", "positive" ({error!r})') from error
    if not sets:
        raise UserError(f'{file} has no queries: a list "queries", or several called NAME_queries')
    return sets


def _positions(given: Any, images: int) -> np.ndarray:
    found = np.asarray(given)
    if found.size and (found.ndim != 1 or found.dtype.kind not in "iu" or found.min() < 0 or found.max() >= images):
        raise UserError(f"ground truth {str(given)[:60]}: give positions in the gallery, 0 to {images - 1}")
    return found.astype(np.int64).reshape(-1)


def _listed(file: Path, entries: Sequence[tuple[str | None, str]], suffix: str = "") -> Stored:
    """The images that a ground truth names, in its order, without labels."""
    name = f"{file.parent.name}/{file.name}{suffix}"
    return Stored(name, _Named(name, file.parent, entries), range(len(entries)), None, None)


class _Named:
    """A store of files of a folder and members of .zip files that lie there."""

    def __init__(self, name: str, folder: Path, entries: Sequence[tuple[str | None, str]]) -> None:
        """entries: (.zip file or None, path within it or the folder).  Raises UserError where some do not exist."""
        archives = {zip_file: self._archive(folder / zip_file) for zip_file in {z for z, _ in entries if z}}
        places = {zip_file: {key: i for i, key in enumerate(store.keys)} for zip_file, store in archives.items()}
        missing = [p for z, p in entries if (p not in places[z] if z else not exists(folder / p))]
        if not entries:
            raise UserError(f"{name} names no images")
        if missing:
            raise UserError(
                f"{name}: {len(missing)} of {len(entries)} images are not there: {', '.join(missing[:3])}\n"
                f"Paths count from {folder.absolute()}, or within the .zip file that is named for them"
            )
        self.keys: Sequence[str] = [path for _, path in entries]
        files = Files(folder, self.keys)
        self._places: list[tuple[Store, int]] = [
            (archives[z], places[z][path]) if z else (files, i) for i, (z, path) in enumerate(entries)
        ]

    @staticmethod
    def _archive(path: Path) -> Zip:
        if not exists(path):
            raise UserError(f"{path} does not exist; a .zip file lies beside the ground truth that names it")
        return Zip(path)

    def image(self, position: int) -> Image.Image:
        store, place = self._places[position]
        return store.image(place)

    def encoded(self, position: int) -> bytes | None:
        store, place = self._places[position]
        return store.encoded(place)

    def size(self, position: int) -> int:
        store, place = self._places[position]
        return store.size(place)


# --- labels as ground truth ---


def labelled(data: str | Path, queries: str | Path | None = None) -> RetrievalSet:
    """Images of a query's class are wanted.

    Queries: as given, or the held-out part of `data`, and the rest is the gallery; of data without one every image asks
    for all the others (leave one out: the query itself is junk).
    """
    pair = (open_source(data), open_source(queries)) if queries is not None else splits(data)
    gallery, asked = pair or (open_source(data),) * 2
    for source in (gallery, asked):
        if not source.classes:
            raise UserError(f"{source.name} has no labels: put the images of each class in a sub-folder of its own")
    if gallery.classes != asked.classes:
        raise UserError(f"{gallery.name} and {asked.name} do not have the same classes: labels would not fit")
    labels, asked_for = ([source.label(i) for i in range(len(source))] for source in (gallery, asked))
    if None in labels or None in asked_for:
        raise UserError(f"some images of {gallery.name} or {asked.name} have no label: leave them out")
    # Shared by the queries of a class.
    of_class = [np.flatnonzero(np.array(labels) == c) for c in range(len(gallery.classes or ()))]
    wanted = [
        Wanted(of_class[int(label or 0)], np.array([] if pair else [i], np.int64)) for i, label in enumerate(asked_for)
    ]
    return RetrievalSet(asked.name if pair else f"{asked.name} [leave one out]", gallery, asked, {"all": wanted})
