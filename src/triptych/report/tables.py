"""Results of evaluations (lines of results.jsonl) that are of a run's encoder, side by side."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROVENANCE = ("triptych", "commit", "torch", "python", "hardware")
ENCODER = ("model", "encoder", "heads", "positions")
# Numbers that say how something was measured, not what came out.
SETTINGS = (
    "seed size resize layers k epochs epoch batch batches images classes clusters asked_clusters restarts temperature "
    "train_images test_images gallery_images query_images ways shots queries episodes left_out skipped copies "
    "originals distractor_images whitening_images top held_out iterations prototypes views lam draws threshold"
).split()

# Words, switches and numbers that came out, or say where: they may differ between encoders that are compared.
NO_SETTING = {*PROVENANCE, *ENCODER, "protocol", "token", "test", "train", "gallery", "queries", "run", "folder"}
NO_SETTING |= {"detections", "floor_class", "converged", "removal_is_exact", "lam", "epoch", "threshold", "left_out"}

# protocol -> (path of the number, "*" = every key; what it is; key of half its 95 % interval; factor)
_CLUSTERS: list[tuple[str, str, str | None, float]] = [
    ("metrics.accuracy", "accuracy of matched clusters, %", None, 1),
    ("metrics.nmi", "NMI, %", None, 100),
    ("metrics.ari", "ARI, %", None, 100),
]
_MAPS: list[tuple[str, str, str | None, float]] = [
    ("miou", "mIoU %", None, 1),
    ("pixel_accuracy", "pixel accuracy, %", None, 1),
    ("floor_miou", "mIoU %, most frequent class everywhere (floor)", None, 1),
]
_AP = (("ap", "AP"), ("ap50", "AP50"), ("ap75", "AP75"))
FIGURES: dict[str, list[tuple[str, str, str | None, float]]] = {
    "knn": [("top1.*", "top-1 %, k = {}", None, 1)],
    "linear": [("top1", "top-1 %", None, 1)],
    "logistic": [("top1", "top-1 %", "top1_ci95", 1)],
    "fewshot": [("accuracy", "accuracy, %", "accuracy_ci95", 1), ("best_f1", "F1, %", None, 1)],
    "clustering": _CLUSTERS,
    "prototypes": _CLUSTERS,
    "retrieval": [("scores.*.mean_ap", "mAP %, {}", None, 1)],
    "copy": [("mean_ap", "mAP %", None, 1)],
    "finetune": [("top1", "top-1 %", None, 1), ("average_top1", "top-1 %, average of weights", None, 1)],
    "classify": [("top1.*", "top-1 %, {}", None, 1)],
    "tokens": [("knn.*", "k-NN top-1 %, {}", None, 1)],
    "click": [("best", "mIoU %, at its best threshold", None, 1), ("floor", "mIoU %, all ones (floor)", None, 1)],
    "similarity": [
        ("overlap", "overlap of the cosines", "margin_overlap", 1),
        ("mean_in", "mean cosine within objects", "margin_in", 1),
        ("mean_out", "mean cosine between objects", "margin_out", 1),
    ],
    "video": [
        ("scores.jf", "J&F, %", None, 1),
        ("scores.j.mean", "J, %", None, 1),
        ("scores.f.mean", "F, %", None, 1),
        ("scores.floor_j", "J of the first mask copied, % (floor)", None, 1),
    ],
    "probe": _MAPS,
    "segmentation": _MAPS,
    "detection": [(f"{of}.{ap}", f"{of} {name}, %", None, 1) for of in ("box", "mask") for ap, name in _AP],
}


@dataclass(frozen=True)
class Result:
    """A line of a results file."""

    fields: dict[str, Any]
    run: int  # position among the report's runs
    which: str  # "teacher, step 2364", "untrained"
    order: int  # in which lines were read: later ones are newer

    @property
    def protocol(self) -> str:
        return str(self.fields.get("protocol", "?"))

    @property
    def images(self) -> str:
        """The name of the images that were measured on."""
        for part in ("test", "val", "queries", "gallery", "data", "train"):
            found = self.fields.get(part)
            if isinstance(found, dict) and "name" in found:
                return str(found["name"])
            if part == "data" and isinstance(found, str):
                return found
        return str(self.fields.get("set", "not told"))


@dataclass(frozen=True)
class Cell:
    value: float
    margin: float | None

    def text(self) -> str:
        return f"{self.value:.2f}" + (f" ± {self.margin:.2f}" if self.margin is not None else "")


Key = tuple[str, str, str]  # protocol, setting, figure
Column = tuple[int, str]  # run, which weights


def read_results(paths: Iterable[Path]) -> tuple[list[dict[str, Any]], int]:
    """-> objects in the order of the files; lines that are none"""
    lines, broken = [], 0
    for path in paths:
        for line in path.read_text(errors="replace").splitlines():
            try:
                found = json.loads(line) if line.strip() else {}
            except ValueError:
                found = None
            if isinstance(found, dict):
                lines += [found] if found else []
            else:
                broken += 1
    return lines, broken


def of_runs(lines: Sequence[dict[str, Any]], folders: Sequence[Path], hashes: Sequence[dict[str, str]]) -> list[Result]:
    """The lines of these runs' encoders, newest first.  hashes: for each run, encoder's hash -> which weights."""
    found = []
    for order, fields in enumerate(lines):
        for run, folder in enumerate(folders):
            which = _which(fields, folder, hashes[run])
            if which:
                found.append(Result(fields, run, which, order))
                break
    return found[::-1]


def _which(fields: dict[str, Any], folder: Path, hashes: dict[str, str]) -> str | None:
    """By the hash of an encoder, else by the path of the run; None where it is another's."""
    models, encoders = (_list(fields.get(key)) for key in ("model", "encoder"))
    here = folder.resolve()
    for i, model in enumerate(models):
        told = re.fullmatch(r"(.*?)(?:@(\d+))?(?: \((\w+)\))?", str(model), re.DOTALL)
        assert told is not None
        path, step, weights = told.groups()
        of_folder = _same(path, here)
        known = hashes.get(str(encoders[i])) if i < len(encoders) else None
        if of_folder or known:
            more = f" with {len(models) - 1} more" if len(models) > 1 else ""
            named = ", ".join(x for x in (weights or "teacher", step and f"step {step}") if x)
            return (named if of_folder or known is None else known) + more
    return "fine-tuned" if _same(str(fields.get("run", "")), here) else None


def _same(path: str, here: Path) -> bool:
    try:
        return bool(path) and Path(path).resolve() == here
    except (OSError, ValueError):  # a hostile name
        return False


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def side_by_side(results: Sequence[Result]) -> tuple[list[Column], dict[Key, dict[Column, Cell]]]:
    """Of results on one set of images, newest first: columns, and a row per figure in the order in which they were
    measured.  A newer line hides an older one."""
    rows: dict[Key, dict[Column, Cell]] = {}
    columns: dict[Column, None] = {}
    by_protocol: dict[str, list[Result]] = {}
    for result in reversed(results):
        by_protocol.setdefault(result.protocol, []).append(result)
    for protocol, of_protocol in by_protocol.items():
        varied = _varied(of_protocol)
        for result in of_protocol:
            column = result.run, result.which
            setting = _setting(result.fields, varied)
            for name, cell in figures(result.fields).items():
                columns[column] = None
                rows.setdefault((protocol, setting, name), {})[column] = cell
    return sorted(columns, key=lambda c: (c[0], "untrained" in c[1], c[1])), rows


def _varied(results: Sequence[Result]) -> list[str]:
    """Settings in which these lines differ."""
    found: dict[str, set[str]] = {}
    for result in results:
        for key, value in _settings(result.fields).items():
            found.setdefault(key, set()).add(json.dumps(value, sort_keys=True, default=str))
    return [key for key, values in found.items() if len(values) > 1]


def _settings(fields: dict[str, Any]) -> dict[str, Any]:
    """What decides how was measured: words and switches, the known numbers, `labels`, and the images to learn from."""
    nested, train = fields.get("settings"), fields.get("train")
    given = fields | (nested if isinstance(nested, dict) else {})
    found = {
        key: value
        for key, value in given.items()
        if key not in NO_SETTING
        and (key == "labels" or isinstance(value, str | bool) or (key in SETTINGS and isinstance(value, int | float)))
    }
    return found | ({"train": train.get("name")} if isinstance(train, dict) else {})


def _setting(fields: dict[str, Any], varied: Sequence[str]) -> str:
    token = fields.get("token")
    parts = [token] if isinstance(token, str) else []  # of several tokens the figures say which
    for key in varied:
        value = _settings(fields).get(key)
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items() if v is not None and k != "draws")
        if value is not None:
            parts.append(f"{key.replace('_', ' ')} {value}" if key != "labels" else f"labels: {value}")
    return "; ".join(parts)


def figures(fields: dict[str, Any]) -> dict[str, Cell]:
    """The numbers of a line that belong in a table."""
    protocol = str(fields.get("protocol"))
    if protocol == "cka":
        return _pairs(fields)
    found: dict[str, Cell] = {}
    for path, name, margin, scale in FIGURES.get(protocol, ()):
        for key, value in _at(fields, path.split(".")):
            half = fields.get(margin) if margin else None
            found[name.format(key)] = Cell(scale * value, half if _is_number(half) else None)
    return found if protocol in FIGURES else _all_numbers(fields)


def _pairs(fields: dict[str, Any]) -> dict[str, Cell]:
    names, values = _list(fields.get("names")), _list(fields.get("cka"))
    found = {}
    for i, row in enumerate(values):
        for j, value in enumerate(_list(row)[:i]):
            if _is_number(value) and i < len(names):
                found[f"{names[j]} and {names[i]}"] = Cell(value, None)
    return found


def _all_numbers(fields: dict[str, Any]) -> dict[str, Cell]:
    """Of a protocol that this table does not know: every number, also in small mappings, that is no setting."""
    found = {}
    left = {*PROVENANCE, *ENCODER, *SETTINGS}
    for key, value in fields.items():
        if key in left:
            continue
        if _is_number(value):
            found[key.replace("_", " ")] = Cell(value, None)
        elif isinstance(value, dict) and len(value) <= 20:
            found |= {f"{key.replace('_', ' ')}, {k}": Cell(v, None) for k, v in value.items() if _is_number(v)}
    return found


def _at(nested: Any, path: Sequence[str], key: str = "") -> list[tuple[str, float]]:
    """Numbers at a path, each with the key that a star stood for."""
    if not path:
        return [(key, nested)] if _is_number(nested) else []
    if not isinstance(nested, dict):
        return []
    if path[0] == "*":
        return [pair for k, v in nested.items() for pair in _at(v, path[1:], str(k))]
    return _at(nested.get(path[0]), path[1:], key)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
