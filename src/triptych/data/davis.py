"""Videos with masks of objects, of each frame or of the first alone, as DAVIS has them (Pont-Tuset et al. 2017)."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from triptych.data.images import UnreadableImage, to_rgb
from triptych.data.regions import IGNORE, Region
from triptych.data.segmented import check_size, numbers_of, read_indices
from triptych.data.stored import reason
from triptych.data.subsets import digest
from triptych.data.tree import Tree
from triptych.errors import UserError
from triptych.progress import progress


def _bits(number: int) -> tuple[int, int, int]:
    """The colour of an object in DAVIS and VOC: its bits, from the lowest, spread over red, green and blue."""
    colour = [0, 0, 0]
    for bit in range(8):
        colour[bit % 3] |= (number >> bit & 1) << (7 - bit // 3)
    return colour[0], colour[1], colour[2]


DAVIS_PALETTE = [value for number in range(256) for value in _bits(number)]
"""256 colours as Pillow's putpalette takes them: red, green, blue of 0, of 1 ..."""


@dataclass(frozen=True)
class Video:
    """Frames in order, and their masks: all of one size.  Both are read when they are asked for."""

    name: str
    tree: Tree
    frames: tuple[int, ...]  # positions in the tree
    masks: tuple[int | None, ...]  # by frame; None = not annotated
    single: bool = False  # all objects are one (DAVIS-2016)

    def __len__(self) -> int:
        return len(self.frames)

    def key(self, i: int) -> str:
        return self.tree.keys[self.frames[i]]

    def image(self, i: int) -> Image.Image:
        """Upright RGB; raises UnreadableImage."""
        try:
            return to_rgb(self.tree.image(self.frames[i]))
        except Exception as error:  # of any kind: each of Pillow's decoders raises its own
            raise UnreadableImage(self.key(i), reason(error)) from error

    def frame(self, i: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB; raises UnreadableImage, and UserError for another size than the first frame's."""
        pixels = np.asarray(self.image(i))
        if pixels.shape[:2] != self.size:
            raise UserError(
                f"{self.key(i)} is {pixels.shape[1]} x {pixels.shape[0]} pixels, the first frame of {self.name} "
                f"{self.size[1]} x {self.size[0]}: all frames of a video must be of one size"
            )
        return pixels

    def mask(self, i: int) -> np.ndarray | None:
        """(H, W) uint8: 0 background, then numbers of objects; None where the frame is not annotated.

        255 is object 1 where the first mask has no other number (DAVIS-2016's form); else it stays: void, IGNORE.
        Raises UnreadableImage, and UserError for another size than the first frame's.
        """
        position = self.masks[i]
        if position is None:
            return None
        values = read_indices(self.tree, position)
        check_size(self.key(i), self.size, self.tree.keys[position], values)
        return (values > 0).astype(np.uint8) if self.single or self._of_2016 else values.astype(np.uint8)

    @cached_property
    def _of_2016(self) -> bool:
        """Is 255 the object?"""
        first = next((position for position in self.masks if position is not None), None)
        numbers = numbers_of(read_indices(self.tree, first)) if first is not None else []
        return IGNORE in numbers and set(numbers) <= {0, IGNORE}

    @cached_property
    def size(self) -> tuple[int, int]:
        """(height, width) of the first frame, in pixels."""
        width, height = self.image(0).size
        return height, width

    @cached_property
    def palette(self) -> list[int]:
        """256 colours of the first annotation (red, green, blue of 0, of 1 ...); DAVIS's where it has none."""
        first = next((position for position in self.masks if position is not None), None)
        found = self.tree.image(first).getpalette() if first is not None else None
        return [*found, *DAVIS_PALETTE[len(found) :]] if found else DAVIS_PALETTE

    def fingerprint(self) -> str:
        """Of names and sizes (bytes) of frames and masks."""
        files = [*self.frames, *(position for position in self.masks if position is not None)]
        return digest([*(f"{self.tree.keys[p]}\0{self.tree.size(p)}" for p in files), str(self.single)])


class AnnotatedFrames:
    """Annotated frames of videos as an `Annotated` source: one region for each object that is in the frame.

    A category is one object of one sequence: classes are "bear/1", "bike-packing/1", "bike-packing/2" ...
    """

    def __init__(self, name: str, videos: list[Video]) -> None:
        """Reads every mask, to know the objects."""
        self.name, self._videos = name, videos
        frames = [(v, i) for v, video in enumerate(videos) for i in range(len(video)) if video.masks[i] is not None]
        self._frames = np.array(frames, np.int64).reshape(-1, 2)
        objects: set[tuple[int, int]] = set()
        for v, i in progress(frames, "objects of videos: frames", len(frames)):
            mask = videos[v].mask(i)
            assert mask is not None  # chosen so
            objects |= {(v, number) for number in numbers_of(mask) if number not in (0, IGNORE)}
        self._category = {of: position for position, of in enumerate(sorted(objects))}
        self.classes = tuple(f"{videos[v].name}/{number}" for v, number in self._category)

    def __len__(self) -> int:
        return len(self._frames)

    def image(self, index: int) -> Image.Image:
        video, i = self._at(index)
        return video.image(i)

    def label(self, index: int) -> None:
        return None

    def key(self, index: int) -> str:
        video, i = self._at(index)
        return video.key(i)

    def regions(self, index: int) -> list[Region]:
        (video, i), v = self._at(index), int(self._frames[index, 0])
        mask = video.mask(i)
        assert mask is not None  # only annotated frames are here
        return [Region(mask == n, self._category[v, n]) for n in numbers_of(mask) if n not in (0, IGNORE)]

    def fingerprint(self) -> str:
        return digest(video.fingerprint() for video in self._videos)

    def _at(self, index: int) -> tuple[Video, int]:
        v, i = self._frames[index]
        return self._videos[v], int(i)


# --- what lies in a folder ---

_OF_2016 = ("2016", "480p", "1080p")  # folders of its lists, in the release of 2017 and in its own


def davis_splits(tree: Tree) -> list[str]:
    """Lists of sequences, as YEAR/SPLIT or SPLIT: validation first, 2017 before others; [""] without lists.

    Empty where the folder is of another layout.
    """
    if not tree.has("JPEGImages", "Annotations") or tree.has("SegmentationClass"):
        return []
    lists = [name[len("ImageSets/") : -len(".txt")] for name in tree.texts() if _is_list(name)]
    years = ["2017", "", "2016"]  # any other, such as DAVIS-2016's own "480p", comes last

    def order(name: str) -> tuple[bool, int, str]:
        year, _, split = name.rpartition("/")
        return split != "val", years.index(year) if year in years else len(years), name

    return sorted(lists, key=order) or [""]


def _is_list(name: str) -> bool:
    return name.startswith("ImageSets/") and name.endswith(".txt") and name.count("/") <= 2


def read_videos(tree: Tree, split: str) -> list[Video]:
    """Raises UserError for sequences that are missing, and for those whose first frame has no annotation."""
    size = _resolution(tree)
    frames, masks = (_by_sequence(tree.below(f"{folder}{size}")) for folder in ("JPEGImages", "Annotations"))
    names = _sequences(tree, split) if split else sorted(frames)
    if missing := [name for name in names if name not in frames or name not in masks]:
        raise UserError(
            f"{tree.path} lacks {len(missing)} of {len(names)} sequences of {split or 'JPEGImages'}: "
            f"{', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}; each needs JPEGImages{size}/NAME/ and "
            f"Annotations{size}/NAME/"
        )
    single = split.rpartition("/")[0] in _OF_2016
    videos = []
    for name in names:
        stems = sorted(frames[name])
        if lost := sorted(masks[name].keys() - frames[name].keys()):
            raise UserError(f"{tree.path} lacks frames of {name} that have an annotation: {', '.join(lost[:3])}")
        if stems[0] not in masks[name]:
            raise UserError(f"{tree.path}: the first frame {stems[0]} of {name} has no annotation in Annotations{size}")
        _check_gaps(name, stems)
        positions = tuple(frames[name][stem] for stem in stems)
        videos.append(Video(name, tree, positions, tuple(masks[name].get(stem) for stem in stems), single))
    return videos


def _check_gaps(name: str, stems: list[str]) -> None:
    """Raises UserError where numbers of frames are missing between others (every fifth frame, say, is none)."""
    if not all(stem.isdecimal() for stem in stems) or len(stems) < 3:
        return
    steps = np.diff(sorted(map(int, stems)))
    if len(wide := np.flatnonzero(steps != steps.min())):
        before = sorted(stems, key=int)[wide[0]]
        raise UserError(f"{name} lacks frames after {before}: a video needs all its frames; load it again")


def _resolution(tree: Tree) -> str:
    """The folder between JPEGImages and sequences, "/480p" where it is there; "" for none."""
    for size in ("/480p", "/1080p", "/Full-Resolution"):
        if tree.has(f"JPEGImages{size}", f"Annotations{size}"):
            return size
    return ""


def _by_sequence(found: dict[str, int]) -> dict[str, dict[str, int]]:
    """Positions of frames by number, by sequence."""
    result: dict[str, dict[str, int]] = {}
    for path, position in found.items():
        sequence, _, stem = path.rpartition("/")
        result.setdefault(sequence, {})[stem] = position
    return result


def _sequences(tree: Tree, split: str) -> list[str]:
    """Names of a list, each once; DAVIS-2016's own lists have a frame and its mask on each line."""
    lines = [line.split()[0] for line in (tree.text(f"ImageSets/{split}.txt") or "").splitlines() if line.strip()]
    if not lines:
        raise UserError(f"ImageSets/{split}.txt of {tree.path} is empty: it must name a sequence on each line")
    return list(dict.fromkeys(line.split("/")[-2] if "/" in line else line for line in lines))
