"""Objects followed through videos by the similarity of patch tokens alone: label propagation on DAVIS.

Jabri et al. 2020 (arXiv 2006.14613), as DINO (arXiv 2104.14294) evaluates: nothing is trained.  See `propagation` for
the procedure and `davis_metrics` for the measures.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from triptych.data.annotated import IGNORE
from triptych.data.davis import Video
from triptych.data.images import UnreadableImage
from triptych.dense.maps import patch_map
from triptych.encoders import Encoder
from triptych.errors import UserError
from triptych.evals.davis_metrics import VideoScores, png, score
from triptych.evals.features import encoder_hash
from triptych.evals.frozen import frozen
from triptych.evals.outcome import Figure
from triptych.evals.propagation import Settings, first_labels, label_map, net_size, propagate
from triptych.precision import fast_precision
from triptych.progress import progress

ABOUT = "triptych.json"
"""In a sequence's folder, beside the PNG files: the encoder and settings that they come from."""


@dataclass(frozen=True)
class VideoResult:
    scores: VideoScores | None  # None: no video has annotations beside its first mask
    settings: Settings
    precision: str  # of the encoder
    sequences: int
    frames: int  # of all sequences, with the first ones
    reused: int  # sequences that were there from before
    folder: str | None  # of the index masks; None: they were not kept


def video(
    encoder: Encoder,
    videos: Sequence[Video],
    settings: Settings | None = None,
    *,
    out: Path | None = None,
    device: torch.device | str = "cpu",
    precision: torch.dtype | None = None,
) -> VideoResult:
    """Propagate the first mask of each video through all its frames, and score what comes out.

    Writes OUT/SEQUENCE/00000.png ... in the layout of DAVIS, at the frames' own size, the first being the given mask,
    so that the official evaluation can read them; None = for the scores only.  A sequence whose files are all there,
    from the same encoder, settings and first mask, is not computed again.  precision: of the encoder, None = what is
    fast.

    Raises UserError for videos without a first mask and folders that hold anything else, before work starts; and as
    `propagate_frames` and `score`.
    """
    settings, precision = settings or Settings(), precision or fast_precision(device)
    if not videos:
        raise UserError("no videos")
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a folder for the masks")
    net_size(1, 1, settings.size, encoder.patch_size)  # raises
    origin = {"encoder": encoder_hash(encoder), "precision": str(precision), **asdict(settings)}
    with _all_readable(), ExitStack() as stack:
        folder = out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        todo = [v for v in videos if not _is_there(folder / v.name, v, origin)]
        stack.enter_context(frozen(encoder, device, precision))
        written = (None for v in todo for _ in _write(encoder, v, folder / v.name, settings, origin, device, precision))
        for _ in progress(written, "frames propagated:", sum(map(len, todo))):
            pass
        scores = score(folder, videos)
    frames, kept = sum(map(len, videos)), None if out is None else str(out)
    said = str(precision).removeprefix("torch.")
    return VideoResult(scores, settings, said, len(videos), frames, len(videos) - len(todo), kept)


def figures(result: VideoResult) -> list[Figure]:
    """Percent; none where nothing could be scored."""
    s = result.scores
    if s is None:
        return []
    note = f"{s.objects} objects in {len(s.sequences)} sequences, {s.frames} frames scored; size {result.settings.size}"
    note += f"; {len(s.left_out)} sequences without later annotations left out" if s.left_out else ""
    floor = Figure("J of the first mask copied, %", s.floor_j, note="the floor: no encoder")
    rows = [Figure("J&F, %", s.jf, note=note), Figure("J, %", s.j.mean), Figure("F, %", s.f.mean), floor]
    for name, of in (("J", s.j), ("F", s.f)):
        rows.append(Figure(f"{name} recall, %", of.recall, main=False))
        rows.append(Figure(f"{name} decay, points", of.decay, main=False))
    return rows


def propagate_frames(
    encoder: Encoder,
    frames: Iterable[np.ndarray],
    first_mask: np.ndarray,
    settings: Settings | None = None,
    *,
    device: torch.device | str = "cpu",
    precision: torch.dtype | None = None,
) -> Iterator[np.ndarray]:
    """The label map (H, W) uint8 of every frame, in order; that of the first frame is `first_mask` itself.

    frames: (H, W, 3) uint8 RGB, all of one size, of which one at a time is asked for.  first_mask: (H, W) uint8, 0 =
    background, 1 ... 254 objects.  precision: of the encoder, None = what is fast.  Who takes the maps one by one calls
    within `frozen(encoder, device, precision)`, so that the encoder is moved to the device once.

    Raises UserError for a mask or frames of other sizes, a mask without objects, features that are not finite.
    """
    settings = settings or Settings()
    _check_first(first_mask, "the first mask")
    height, width = first_mask.shape
    pixels = net_size(height, width, settings.size, encoder.patch_size)
    first, ids = first_labels(first_mask, encoder.grid(*pixels))

    def features() -> Iterator[Tensor]:
        for i, frame in enumerate(frames):
            if frame.shape != (height, width, 3):
                raise UserError(f"frame {i} has shape {frame.shape}; the first mask is {height} x {width}")
            with frozen(encoder, device, precision or fast_precision(device)):
                x = _encoded(encoder, frame, pixels, settings, device)
            yield x

    yield first_mask
    for soft in propagate(features(), first.to(device), settings):
        small = ids[label_map(soft, pixels).cpu().numpy()]
        yield np.array(Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST))


def _put(path: Path, write: Callable[[Path], object]) -> None:
    """A file that is there is whole, wherever the process was stopped."""
    part = path.with_name(f"{path.name}.part")
    write(part)
    part.replace(path)


def _check_first(mask: np.ndarray | None, what: str) -> np.ndarray:
    if mask is None:
        raise UserError(f"{what} is not there: without it there is nothing to propagate")
    if mask.dtype != np.uint8 or mask.ndim != 2 or not np.isin(mask, (0, IGNORE), invert=True).any():
        raise UserError(f"{what} must be (height, width) uint8 with an object: 0 = background, 1 to 254 = objects")
    return mask


def _encoded(
    encoder: Encoder, frame: np.ndarray, pixels: tuple[int, int], settings: Settings, device: torch.device | str
) -> Tensor:
    """(D, h, w) float32 patch tokens of one frame."""
    resized = cv2.resize(frame, pixels[::-1], interpolation=cv2.INTER_LINEAR)
    mean, std = (torch.tensor(x, device=device)[:, None, None] for x in (settings.mean, settings.std))
    image = (torch.from_numpy(resized).to(device).permute(2, 0, 1) / 255 - mean) / std
    x = patch_map(encoder, image[None])[0].float()
    if not x.isfinite().all():
        raise UserError("the encoder's tokens hold NaN or infinity; check its weights")
    return x


@contextmanager
def _all_readable() -> Iterator[None]:
    try:
        yield
    except UnreadableImage as error:
        raise UserError(f"{error}\nA video needs all its frames: what follows is propagated from them") from error


def _write(
    encoder: Encoder,
    source: Video,
    folder: Path,
    settings: Settings,
    origin: dict[str, Any],
    device: torch.device | str,
    precision: torch.dtype,
) -> Iterator[None]:
    """Put down every frame of one video; yields after each."""
    first = _first(source)
    folder.mkdir(parents=True, exist_ok=True)
    about = json.dumps(_about(source, first, origin), indent=1)
    _put(folder / ABOUT, lambda part: part.write_text(about))
    frames = (source.frame(i) for i in range(len(source)))
    masks = propagate_frames(encoder, frames, first, settings, device=device, precision=precision)
    for i, mask in enumerate(masks):
        image = Image.fromarray(mask)
        image.putpalette(bytes(source.palette).ljust(768, b"\0"))  # a short one would cut the ids to fewer bits
        _put(folder / png(i), partial(image.save, format="PNG"))
        yield


def _first(source: Video) -> np.ndarray:
    return _check_first(source.mask(0), f"the mask of the first frame of {source.name}")


def _about(source: Video, first: np.ndarray, origin: dict[str, Any]) -> dict[str, Any]:
    given = hashlib.sha256(repr(first.shape).encode() + first.tobytes()).hexdigest()[:16]
    return json.loads(json.dumps({"frames": len(source), "first mask": given, **origin}))  # tuples as JSON has them


def _is_there(folder: Path, source: Video, origin: dict[str, Any]) -> bool:
    """Are all masks of this video there?  Raises UserError where the folder holds something else."""
    first = _first(source)
    if not folder.exists():
        return False
    about, wanted = folder / ABOUT, _about(source, first, origin)
    if not about.exists():
        if any(folder.glob("*.png")):
            raise UserError(f"{folder} holds masks that Triptych did not write; name another folder")
        return False
    found = json.loads(about.read_text())
    unlike = [name for name in wanted if found.get(name) != wanted[name]]
    if unlike:
        raise UserError(
            f"{folder} holds masks of another {' and '.join(unlike)}; name another folder, or delete this one"
        )
    return all((folder / png(i)).exists() for i in range(len(source)))
