"""Parts of a source; those of ImageNet that papers train on."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from triptych.errors import UserError

if TYPE_CHECKING:
    from triptych.data.sources import Source

HELD_OUT = ("test", "val", "valid", "validation")  # names of folders to measure on, best first
# Tian et al. 2019 (CMC), as in danielchyeh/ImageNet-100-Pytorch (MIT), which MMC names.
IMAGENET100 = tuple(
    """
    n01558993 n01692333 n01729322 n01735189 n01749939 n01773797 n01820546 n01855672 n01978455
    n01980166 n01983481 n02009229 n02018207 n02085620 n02086240 n02086910 n02087046 n02089867
    n02089973 n02090622 n02091831 n02093428 n02099849 n02100583 n02104029 n02105505 n02106550
    n02107142 n02108089 n02109047 n02113799 n02113978 n02114855 n02116738 n02119022 n02123045
    n02138441 n02172182 n02231487 n02259212 n02326432 n02396427 n02483362 n02488291 n02701002
    n02788148 n02804414 n02859443 n02869837 n02877765 n02974003 n03017168 n03032252 n03062245
    n03085013 n03259280 n03379051 n03424325 n03492542 n03494278 n03530642 n03584829 n03594734
    n03637318 n03642806 n03764736 n03775546 n03777754 n03785016 n03787032 n03794056 n03837869
    n03891251 n03903868 n03930630 n03947888 n04026417 n04067472 n04099969 n04111531 n04127249
    n04136333 n04229816 n04238763 n04336792 n04418357 n04429376 n04435653 n04485082 n04493381
    n04517823 n04589890 n04592741 n07714571 n07715103 n07753275 n07831146 n07836838 n13037406
    n13040303
    """.split()
)
SUBSETS: dict[str, tuple[str, ...]] = {"imagenet100": IMAGENET100}


class Subset:
    """Chosen images of another source, in the order of `indices`; its name is the source's name with a suffix.

    classes: those that count, in their order, where not all of the source's do.
    """

    def __init__(
        self, source: "Source", indices: Sequence[int], suffix: str, classes: tuple[str, ...] | None = None
    ) -> None:
        self.source = source
        self.indices = np.asarray(indices, dtype=np.int64)
        self.name = source.name + suffix
        self.classes = classes or source.classes
        self._numbers = {(source.classes or ()).index(name): i for i, name in enumerate(classes or ())}

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, index: int) -> Image.Image:
        return self.source.image(int(self.indices[index]))

    def stored(self, index: int) -> bytes | np.ndarray | None:
        return getattr(self.source, "stored", lambda _: None)(int(self.indices[index]))

    def label(self, index: int) -> int | None:
        label = self.source.label(int(self.indices[index]))
        return label if label is None or not self._numbers else self._numbers[label]

    def key(self, index: int) -> str:
        return self.source.key(int(self.indices[index]))

    def fingerprint(self) -> str:
        return digest([self.source.fingerprint(), *map(str, self.indices)])


def positions(source: "Source", classes: tuple[str, ...]) -> list[int]:
    """Where the images of these classes are.  Raises UserError where the source lacks some of them."""
    missing = [name for name in classes if name not in (source.classes or ())]
    if missing:
        raise UserError(
            f"{source.name} lacks {len(missing)} of {len(classes)} classes: {', '.join(missing[:5])}"
            f"{' ...' if len(missing) > 5 else ''}; give ImageNet, with a folder for each class (n01558993 ...) "
            "in train/ and val/"
        )
    wanted, names = set(classes), source.classes or ()
    labels = [source.label(i) for i in range(len(source))]
    return [i for i, label in enumerate(labels) if label is not None and names[label] in wanted]


def of_list(source: "Source", file: str) -> Subset:
    """The images that a text file names, as SimCLR's 1percent.txt does, in its order; classes stay those of the source.

    Lines and errors are those of `lowshot.from_file`.
    """
    from triptych.evals.lowshot import from_file  # here, because it brings torch along

    rows = from_file(Path(file).expanduser(), [source.key(i) for i in range(len(source))])
    return Subset(source, rows.tolist(), f" [{Path(file).name}]")


def digest(rows: Iterable[str]) -> str:
    """16 hex digits over lines of text; file names that are no UTF-8 count with their raw bytes."""
    digest = hashlib.blake2b(digest_size=8)
    for row in rows:
        digest.update(f"{row}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
