"""Features of any images in a file, in one pass that can be stopped at any time and goes on.

While it works the features lie in OUT.part/, and OUT.json says whose they are and how far it is.  OUT comes into being
whole, at the end, when OUT.json stays as its description.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from triptych import __version__
from triptych.data.sources import Source
from triptych.data.subsets import Subset
from triptych.embed_files import Kept, check_out, outputs, write
from triptych.encoders import Encoder
from triptych.errors import Interrupted, UserError
from triptych.evals.features import encoder_hash
from triptych.evals.frozen import fast_batch, frozen
from triptych.evals.selection import Token, check_token, select_all
from triptych.evals.transform import EvalTransform, grouped_batches
from triptych.precision import fast_precision
from triptych.progress import progress
from triptych.train import stop_signals

NAMES = ("model", "data")  # of the description: may differ when a stopped process is gone on with


@dataclass(frozen=True)
class EmbedResult:
    """What was written."""

    files: tuple[Path, ...]  # of features, and of their rows where those are not in it
    images: int  # rows
    unreadable: tuple[str, ...]  # keys of the images that have no row
    width: dict[Token, int]  # numbers per image


@dataclass
class Reached:
    """How far it is: all that a process needs to go on with another's work."""

    seen: int = 0  # images of the source, from the first, that are dealt with
    rows: int = 0  # those of them that have features
    unreadable: list[int] = field(default_factory=list)  # the others
    width: dict[Token, int] = field(default_factory=dict)


def embed(
    encoder: Encoder,
    source: Source,
    transform: EvalTransform,
    out: Path,
    *,
    tokens: Sequence[Token] = ("cls",),
    layers: int = 1,
    device: torch.device | str = "cpu",
    precision: torch.dtype | None = None,
    batch: int | None = None,
    workers: int | None = None,
    half: bool = False,
    model: str | None = None,
) -> EmbedResult:
    """Features of every image of `source`, labelled or not, in its order; images that cannot be read have no row.

    out: FILE.npy of shape (rows, D), or FILE.TOKEN.npy each of several tokens, with FILE.rows.csv, whose lines (index,
    file, label, class) are its rows; FILE.parquet, with those columns and a list for each token; or FILE.csv, with
    those columns and one for each number.  float32, with `half` float16.  Beside it FILE.npy.json ... tells encoder,
    images, options and the files that cannot be read.  batch, precision: None = what is fast on the device.  model: a
    name for the description.

    Memory does not grow with the set.  Stopped by SIGTERM or Ctrl-C (raises Interrupted) or killed, the same call goes
    on from there and ends, on the same hardware, with the same bytes as one that was never stopped; another call does
    nothing.  Raises UserError for a wrong file name, a token that the encoder does not have, a missing package,
    features that are not finite, images of which none can be read, and where `out` is of anything else.
    """
    out, device = Path(out), torch.device(device)
    check(encoder, out, tokens, layers)
    batch, precision = batch or fast_batch(device, transform.size), precision or fast_precision(device)
    about = {
        "triptych": __version__,
        "model": model,
        "encoder": encoder_hash(encoder),
        **encoder.beside_weights(),
        "data": source.name,
        "images": len(source),
        "fingerprint": source.fingerprint(),
        "classes": source.classes,
        "transform": vars(transform),
        "tokens": tokens,
        "layers": layers,
        "dtype": "float16" if half else "float32",
        "precision": str(precision).removeprefix("torch."),
        "device": device.type,
        "batch": batch,
    }
    note = Note(out, json.loads(json.dumps(about)))
    reached = note.read()
    if not note.written:
        with frozen(encoder, device, precision), Kept(note.folder, tokens, about["dtype"]) as kept:
            if not kept.holds(reached.rows, reached.width):
                reached = Reached()
            _fill(encoder, source, transform, kept, note, reached, layers=layers, device=device, workers=workers)
        write(out, note.folder, source, reached.unreadable, tokens)
    if not note.complete:
        note.save(reached, complete=True, left_out=[source.key(i) for i in reached.unreadable])
        shutil.rmtree(note.folder, ignore_errors=True)
    unreadable = tuple(source.key(i) for i in reached.unreadable)
    return EmbedResult(tuple(outputs(out, tokens)), reached.rows, unreadable, reached.width)


def check(encoder: Encoder, out: Path, tokens: Sequence[Token], layers: int) -> None:
    """Raises UserError for what `embed` cannot do, before any work."""
    check_out(out)
    if not tokens or len(set(tokens)) < len(tokens):
        raise UserError(f"tokens {' '.join(tokens) or '(none)'}: name at least one, and each once")
    for token in tokens:
        check_token(encoder, token)
    if not 1 <= layers <= encoder.depth:
        raise UserError(f"layers {layers}: this encoder has {encoder.depth} blocks")


def _fill(
    encoder: Encoder,
    source: Source,
    transform: EvalTransform,
    kept: Kept,
    note: "Note",
    reached: Reached,
    *,
    layers: int,
    device: torch.device,
    workers: int | None,
) -> None:
    """The features that are still missing.

    A process goes on where a batch began, so that all batches, and thereby all bits, are those of one never stopped.
    """
    first, batch = reached.seen, note.about["batch"]
    rest = Subset(source, range(first, len(source)), f" from image {first} on" if first else "")
    loaded = grouped_batches(rest, transform, batch=batch, device=device, workers=workers) if len(rest) else ()
    loaded = islice(loaded, -(-len(rest) // batch))  # and not to its end, an error where none of the rest can be read
    with stop_signals() as stop:
        for groups in progress(loaded, f"features of {rest.name}:", len(rest), each=batch):
            index = [first + i for group, _ in groups for i in group]
            parts = [select_all(encoder, images, kept.tokens, layers) for _, images in groups]
            if parts:
                order = sorted(range(len(index)), key=index.__getitem__)  # of images that are not of one size
                features = {token: torch.cat([part[token] for part in parts])[order] for token in kept.tokens}
                reached.width = {token: x.shape[1] for token, x in features.items()}
                kept.put(reached.rows, features, f"images {source.key(min(index))} to {source.key(max(index))}")
            end = min(reached.seen + batch, len(source))
            reached.unreadable += sorted(set(range(reached.seen, end)) - set(index))
            reached.seen, reached.rows = end, reached.rows + len(index)
            if stop or kept.due():
                kept.save(reached.rows)
                note.save(reached)
            if stop and end < len(source):
                raise Interrupted(stop[0], end)
    if not reached.rows:
        raise UserError(f"no image of {source.name} can be read")
    kept.save(reached.rows, whole=True)
    note.save(reached)


class Note:
    """OUT.json: what lies or will lie in OUT, and how far it is."""

    def __init__(self, out: Path, about: dict[str, Any]) -> None:
        self.out, self.about = out, about
        self.written = self.complete = False  # are the files there, and is all done?
        self.path, self.folder = out.with_name(f"{out.name}.json"), out.with_name(f"{out.name}.part")

    def read(self) -> Reached:
        """Where to go on, or a new beginning.  Raises UserError where OUT is of anything else."""
        files = outputs(self.out, self.about["tokens"])
        if not self.path.exists():
            if taken := [file for file in files if file.exists()]:
                raise UserError(f"{taken[0]} exists, without {self.path.name} that tells what it is: name another file")
            return Reached()
        try:
            found = json.loads(self.path.read_text())
            reached, complete = Reached(**found["progress"]), found["complete"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} is damaged ({error}): delete it, or name another file") from error
        if unlike := [key for key in self.about if key not in NAMES and found.get(key) != self.about[key]]:
            which = "; ".join(f"{key} {_short(found.get(key))} there, {_short(self.about[key])} now" for key in unlike)
            raise UserError(
                f"{self.path} is of other features ({which}): name another file, or delete {self.path.name} and what "
                "it describes"
            )
        self.written = reached.seen == self.about["images"] and all(file.exists() for file in files)
        self.complete = complete and self.written
        return reached

    def save(self, reached: Reached, *, complete: bool = False, **more: Any) -> None:
        """Whole or not at all, whatever happens meanwhile."""
        text = json.dumps({**self.about, "complete": complete, "progress": asdict(reached), **more}, indent=1)
        part = self.path.with_name(f"{self.path.name}.part")
        part.write_text(f"{text}\n")
        part.replace(self.path)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
