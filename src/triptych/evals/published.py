"""What the papers report: never measured here, shown apart from what was, for the sets that they name.

From the UDI, MTE and MMC papers and UDI's README; "over" names the base that MTE wraps.
"""

from dataclasses import dataclass

from triptych.data.sources import Source
from triptych.data.subsets import IMAGENET100


@dataclass(frozen=True)
class Published:
    protocol: str  # as in EVALS
    data: str  # as `known_set` names it
    figure: str
    encoder: str
    value: float  # percent


def rows(protocol: str, data: str, figures: tuple[str, ...], table: str) -> list[Published]:
    """Lines of "ENCODER | value value ...", a value per figure; - where a paper has none."""
    rows = []
    for line in table.strip().splitlines():
        encoder, _, values = (part.strip() for part in line.rpartition("|"))
        named = zip(figures, values.split(), strict=True)
        rows += [Published(protocol, data, figure, encoder, float(v)) for figure, v in named if v != "-"]
    return rows


_NEAR = rows(
    "knn",
    "imagenet",
    ("top-1 %, k = 10",),
    """
    BYOL ViT-S/16 100 ep | 56.1
    MTE over BYOL ViT-S/16 100 ep | 65.5
    MTE over MoCo v3 ViT-S/16 300 ep | 67.9
    DINO ViT-S/16 100 ep | 61.2
    MTE over DINO ViT-S/16 100 ep | 66.6
    iBOT ViT-S/16 100 ep | 65.2
    MTE over iBOT ViT-S/16 100 ep | 68.8
    HSSL ViT-S/16 100 ep | 67.3
    MTE over HSSL ViT-S/16 100 ep | 69.3
    DINO ViT-S/16 300 ep | 67.9
    MTE over DINO ViT-S/16 300 ep | 70.8
    iBOT ViT-S/16 300 ep | 70.3
    MTE over iBOT ViT-S/16 300 ep | 72.4
    iBOT ViT-S/16 multi-crop 100 ep | 71.5
    MTE over iBOT ViT-S/16 multi-crop 100 ep | 74.1
    iBOT ViT-B/16 multi-crop 100 ep | 74.0
    MTE over iBOT ViT-B/16 multi-crop 100 ep | 76.0
    """,
) + rows(
    "knn",
    "imagenet",
    ("top-1 %, k of its script",),
    """
    UDI ViT-S/16 100 ep | 74.9
    UDI ViT-S/16 300 ep | 75.6
    """,
)
_LINEAR = rows(
    "linear",
    "imagenet",
    ("top-1 %, best on test",),
    """
    BYOL ViT-S/16 100 ep | 65.1
    MTE over BYOL ViT-S/16 100 ep | 70.7
    MoCo v3 ViT-S/16 300 ep | 72.5
    MTE over MoCo v3 ViT-S/16 300 ep | 73.3
    DINO ViT-S/16 100 ep | 67.8
    MTE over DINO ViT-S/16 100 ep | 70.6
    iBOT ViT-S/16 100 ep | 71.3
    MTE over iBOT ViT-S/16 100 ep | 73.1
    HSSL ViT-S/16 100 ep | 72.6
    MTE over HSSL ViT-S/16 100 ep | 73.6
    DINO ViT-S/16 300 ep | 72.5
    MTE over DINO ViT-S/16 300 ep | 73.7
    iBOT ViT-S/16 300 ep | 74.8
    MTE over iBOT ViT-S/16 300 ep | 75.4
    iBOT ViT-S/16 multi-crop 100 ep | 74.4
    MTE over iBOT ViT-S/16 multi-crop 100 ep | 76.7
    UDI ViT-S/16 100 ep | 76.3
    UDI ViT-S/16 300 ep | 77.6
    iBOT ViT-B/16 multi-crop 100 ep | 77.8
    MTE over iBOT ViT-B/16 multi-crop 100 ep | 78.9
    """,
)
_LOW_SHOT = """
    UDI ViT-S/16 | 66.7 74.1
    UDI ViT-S/16, class+ | 66.1 73.8
    DINO ViT-S/16 | 64.5 72.2
    iBOT ViT-S/16 | 65.9 73.4
    MSN ViT-S/16 | 67.2 -
"""
_LOW_SHOT_TUNED = """
    UDI ViT-S/16 | 65.8 76.4
    UDI ViT-S/16, class+ | 65.2 76.2
    iBOT ViT-S/16 | 61.9 75.1
    DINO ViT-S/16 | 60.3 74.3
"""
_RETRIEVAL = """
    iBOT ViT-B/16 | 34.2 13.4 61.9 35.2
    DINO ViT-B/16 | 32.8 10.7 60.4 34.2
    MC-SSL ViT-B/16 | 27.4 11.4 52.6 29.9
    SiT ViT-B/16 | 29.3 8.3 51.1 21.3
    MMC ViT-B/16 | 26.1 8.9 53.4 28.6
"""
_FEW_SHOT = """
    SiT ViT-B/16 | 50.9 45.4 80.9 67.8
    DINO ViT-B/16 | 40.9 39.2 83.7 73.0
    iBOT ViT-B/16 | 39.9 37.7 84.6 73.4
    MAE ViT-B/16 | 27.2 34.7 24.4 33.5
    MC-SSL ViT-B/16 | 30.8 33.7 80.8 70.1
    MMC ViT-B/16 | 47.4 42.9 69.7 62.1
"""
_TRANSFER = """
    UDI ViT-S/16 | 99.1 90.8 74.1 78.9 98.6 94.1
    iBOT ViT-S/16 | 99.1 90.7 73.7 78.5 98.6 94.0
    DINO ViT-S/16 | 99.0 90.5 72.0 78.2 98.5 93.1
"""
_TRANSFER_SETS = ("cifar10", "cifar100", "inat18", "inat19", "flowers102", "stanford-cars")


def columns(protocol: str, columns: tuple[tuple[str, str], ...], table: str) -> list[Published]:
    """As `rows`, a (data, figure) per value."""
    found = rows(protocol, "", tuple(map("\0".join, columns)), table)
    split = [(p, p.figure.partition("\0")) for p in found]
    return [Published(p.protocol, data, figure, p.encoder, p.value) for p, (data, _, figure) in split]


PUBLISHED: tuple[Published, ...] = (
    *_NEAR,
    *_LINEAR,
    *rows("logistic", "imagenet", ("top-1 %, 1 % of the labels", "top-1 %, 10 % of the labels"), _LOW_SHOT),
    *rows("finetune", "imagenet", ("top-1 %, 1 % of the labels", "top-1 %, 10 % of the labels"), _LOW_SHOT_TUNED),
    *columns(
        "retrieval",
        tuple((d, f"mAP {level}, %") for d in ("roxford5k", "rparis6k") for level in ("medium", "hard")),
        _RETRIEVAL,
    ),
    *columns(
        "fewshot",
        tuple((d, f) for d in ("cifar10", "oxford-iiit-pet") for f in ("accuracy, %", "F1, %")),
        _FEW_SHOT,
    ),
    *columns("finetune", tuple((d, "top-1 %") for d in _TRANSFER_SETS), _TRANSFER),
)

_CIFAR10 = {"airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"}


def known_set(source: Source) -> str:
    """The name under which papers report on these classes; else the source's own, without split and folder."""
    classes = set(source.classes or ())
    if len(classes) == 1000 and classes >= set(IMAGENET100):
        return "imagenet"
    if classes == set(IMAGENET100):
        return "imagenet100"
    if classes == _CIFAR10:
        return "cifar10"
    return source.name.split(" [")[0].partition("@")[0].partition(":")[0].lower()


def published(data: str, protocols: set[str]) -> list[Published]:
    """What papers report on this set under these protocols."""
    return [row for row in PUBLISHED if row.data == data and row.protocol in protocols]
