"""How data sets with index masks lie on disk: which splits there are, each image's mask, what its values mean."""

import json
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

from triptych.data.regions import IGNORE
from triptych.data.segmented import MaskedImages, Pairs, read_indices, table
from triptych.data.segmented_classes import CAMVID, CITYSCAPES, CITYSCAPES_IDS, VOC
from triptych.data.subsets import HELD_OUT
from triptych.data.tree import Layout, Tree, without_extension
from triptych.errors import UserError
from triptych.progress import progress


class _Meaning(NamedTuple):
    classes: Sequence[str]
    values: dict[int, int]  # value in a mask -> position in classes, or IGNORE


def _meaning(classes: Sequence[str]) -> _Meaning:
    """Values are positions in classes."""
    return _Meaning(classes, {value: value for value in range(len(classes))})


def _pairs(
    tree: Tree,
    images: dict[str, int],
    masks: dict[str, int],
    names: Iterable[str] | None,
    meaning: _Meaning,
    where: str,
) -> Pairs:
    """Of all images and masks, or of those with the given names; raises UserError for what has no partner."""
    wanted = sorted(images.keys() | masks.keys()) if names is None else list(names)
    if alone := [name for name in wanted if name not in images or name not in masks]:
        what = [f"{name} (no {'mask' if name in images else 'image'})" for name in alone[:3]]
        raise UserError(
            f"{tree.path}, {where}: every image needs a mask of the same name; {len(alone)} of {len(wanted)} lack one: "
            f"{', '.join(what)}{' ...' if len(alone) > 3 else ''}"
        )
    if not wanted:
        raise UserError(f"{tree.path} has no images in {where}")
    return Pairs([images[n] for n in wanted], [masks[n] for n in wanted], tuple(meaning.classes), table(meaning.values))


def _listed(tree: Tree, file: str, images: dict[str, int]) -> list[str] | None:
    """Names that a list has, each once; None without the list.

    A line is a name, or the path of an image and then the path of its mask; with or without folders and extension.
    """
    text = tree.text(file)
    if text is None:
        return None
    lines = [line.strip().lstrip("/") for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{file} of {tree.path} is empty: it must name an image on each line")
    return list(dict.fromkeys(_known(line, images) for line in lines))


def _known(line: str, images: dict[str, int]) -> str:
    """The image that a line names; where there is none, its last word without folders."""
    paths = [without_extension(line), without_extension(line.split()[0])]
    names = [*paths, *(path.rpartition("/")[2] for path in paths)]
    return next((name for name in names if name in images), names[-1])


# --- images/ and masks/ ---

_MEASURED = sorted(HELD_OUT, key="val valid validation test".split().index)


def _mask_splits(tree: Tree) -> list[str]:
    """Sub-folders of images/ that are called as splits are; [""] where there are none, for all images."""
    if not tree.has("images", "masks"):
        return []
    return [split for split in ("train", "training", *_MEASURED) if tree.has(f"images/{split}")] or [""]


def _read_masks(tree: Tree, split: str) -> Pairs:
    text = tree.text("classes.json")
    return _read_parts(tree, split, _meaning(_numbered(tree)) if text is None else _named(tree, text))


def _read_parts(tree: Tree, split: str, meaning: _Meaning) -> Pairs:
    inner = f"/{split}" if split else ""
    images, masks = tree.below(f"images{inner}"), tree.below(f"masks{inner}")
    names = _listed(tree, f"{split}.txt", images) if split else None
    return _pairs(tree, images, masks, names, meaning, f"images{inner} and masks{inner}")


def _named(tree: Tree, text: str) -> _Meaning:
    """classes.json: a list of names, {value: name}, or either of them under "classes" beside "ignore_index"."""
    try:
        content = json.loads(text)
        bare = not isinstance(content, dict) or "classes" not in content
        names, ignored = (content, IGNORE) if bare else (content["classes"], int(content.get("ignore_index", IGNORE)))
        named = {int(v): str(n) for v, n in (names.items() if isinstance(names, dict) else enumerate(names))}
        if isinstance(names, str) or not named or not all(0 <= v < IGNORE for v in named) or not 0 <= ignored <= IGNORE:
            raise ValueError("one or more names, for values in 0..254")
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f'classes.json of {tree.path} must be ["name of 0", "name of 1", ...] or {{"value": "name"}}: {error}'
        ) from error
    values = sorted(named)
    numbers = {value: number for number, value in enumerate(values)}
    return _Meaning([named[value] for value in values], numbers | {ignored: IGNORE})


@lru_cache(maxsize=1)  # for the other split of the same tree
def _numbered(tree: Tree) -> tuple[str, ...]:
    """Without names: numbers up to the greatest value of all masks, each of which is read."""
    positions = tree.below("masks").values()
    greatest = 0
    for position in progress(positions, "classes of masks: masks", len(positions)):
        values = read_indices(tree, position)
        greatest = max(greatest, int(values[values != IGNORE].max(initial=0)))
    return tuple(map(str, range(greatest + 1)))


# --- CamVid, as SegNet has it ---

_CAMVID = _Meaning(CAMVID, _meaning(CAMVID).values | {11: IGNORE})  # 11: SegNet's "unlabelled"


def _camvid_splits(tree: Tree) -> list[str]:
    return [s for s in ("train", "val", "test") if tree.has(s, f"{s}annot")] or _mask_splits(tree)


def _read_camvid(tree: Tree, split: str) -> Pairs:
    if not tree.has("images", "masks"):
        images, masks = tree.below(split), tree.below(f"{split}annot")
        return _pairs(tree, images, masks, None, _CAMVID, f"{split} and {split}annot")
    return _read_parts(tree, split, _CAMVID)


# --- Pascal VOC 2012 with the masks of SBD ---

_VOC_LISTS = "ImageSets/Segmentation"


def _voc_splits(tree: Tree) -> list[str]:
    """train_aug where its list is there under any of its names; train and val."""
    if not tree.has("JPEGImages") or not (tree.has("SegmentationClass") or tree.has("SegmentationClassAug")):
        return []
    lists = {split for split in ("train_aug", "trainaug", "aug", "train", "val") if _voc_list(split) in tree.texts()}
    if tree.has("SegmentationClassAug") and lists & {"trainaug", "aug"}:
        lists.add("train_aug")
    return [split for split in ("train_aug", "train", "val") if split in lists]


def _read_voc(tree: Tree, split: str) -> Pairs:
    """train_aug: its list, or train and aug one after the other.  Masks: VOC's own where there is one, else SBD's."""
    images, masks = tree.below("JPEGImages"), tree.below("SegmentationClassAug") | tree.below("SegmentationClass")
    names = _listed(tree, _voc_list(split), images)
    if split == "train_aug" and names is None:
        names = _listed(tree, _voc_list("trainaug"), images)
    if names is None:
        both = [_listed(tree, _voc_list(part), images) or [] for part in ("train", "aug")]
        names = list(dict.fromkeys(both[0] + both[1]))
    return _pairs(tree, images, masks, names, _meaning(VOC), _voc_list(split))


def _voc_list(split: str) -> str:
    return f"{_VOC_LISTS}/{split}.txt"


# --- ADE20K ---

_ADE = {"train": "training", "val": "validation"}


def _ade_splits(tree: Tree) -> list[str]:
    return [split for split, folder in _ADE.items() if tree.has(f"images/{folder}", f"annotations/{folder}")]


def _read_ade(tree: Tree, split: str) -> Pairs:
    folder, text = _ADE[split], tree.text("objectInfo150.txt")
    rows = [line.split("\t") for line in text.splitlines()[1:] if line.strip()] if text else []
    names = [row[-1].strip().partition(",")[0] for row in rows] or [str(number) for number in range(1, 151)]
    if len(names) != 150:
        raise UserError(f"objectInfo150.txt of {tree.path} names {len(names)} classes, and ADE20K has 150")
    meaning = _Meaning(names, {0: IGNORE} | {value: value - 1 for value in range(1, 151)})
    images, masks = tree.below(f"images/{folder}"), tree.below(f"annotations/{folder}")
    return _pairs(tree, images, masks, None, meaning, f"images/{folder} and annotations/{folder}")


# --- Cityscapes ---


def _city_splits(tree: Tree) -> list[str]:
    return [split for split in ("train", "val", "test") if tree.has(f"leftImg8bit/{split}", f"gtFine/{split}")]


def _read_city(tree: Tree, split: str) -> Pairs:
    """labelTrainIds where there are any, else labelIds through the official table."""
    images = _ending(tree.below(f"leftImg8bit/{split}"), "_leftImg8bit")
    found = tree.below(f"gtFine/{split}")
    masks, meaning = _ending(found, "_gtFine_labelTrainIds"), _meaning(CITYSCAPES)
    if not masks:
        masks = _ending(found, "_gtFine_labelIds")
        ids = {value: number for number, value in enumerate(CITYSCAPES_IDS)}
        meaning = _Meaning(CITYSCAPES, dict.fromkeys(range(34), IGNORE) | ids)
    return _pairs(tree, images, masks, None, meaning, f"leftImg8bit/{split} and gtFine/{split}")


def _ending(found: dict[str, int], end: str) -> dict[str, int]:
    return {name.removesuffix(end): position for name, position in found.items() if name.endswith(end)}


# --- the table ---


def _masked(read: Callable[[Tree, str], Pairs], name: str, tree: Tree, split: str) -> MaskedImages:
    return MaskedImages(name, tree, read(tree, split))


LAYOUTS: dict[str, Layout[MaskedImages]] = {
    "masks": Layout(
        "images and index masks of the same names: PATH/images, PATH/masks, PATH/classes.json",
        "images/ and masks/, both with or without folders train/ and val/; classes.json with the names of classes",
        _mask_splits,
        partial(_masked, _read_masks),
    ),
    "camvid": Layout(
        "CamVid as SegNet has it, 11 classes",
        "train/ and trainannot/, val/ and valannot/; or images/SPLIT/, masks/SPLIT/ and SPLIT.txt",
        _camvid_splits,
        partial(_masked, _read_camvid),
    ),
    "voc": Layout(
        "Pascal VOC 2012, 21 classes; learns from train_aug where SegmentationClassAug is there",
        "JPEGImages/, SegmentationClass/ (SegmentationClassAug/) and ImageSets/Segmentation/SPLIT.txt",
        _voc_splits,
        partial(_masked, _read_voc),
    ),
    "ade20k": Layout(
        "ADEChallengeData2016, 150 classes",
        "images/training/ and annotations/training/, images/validation/ and annotations/validation/",
        _ade_splits,
        partial(_masked, _read_ade),
    ),
    "cityscapes": Layout(
        "Cityscapes with fine annotations, 19 classes",
        "leftImg8bit/SPLIT/CITY/*_leftImg8bit.png and gtFine/SPLIT/CITY/*_gtFine_labelTrainIds.png or *_labelIds.png",
        _city_splits,
        partial(_masked, _read_city),
    ),
}
"""In the order in which a path is looked at."""
