"""The folder of a run: whose it is, and what a number must be printed with."""

import json
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from triptych import __version__, distributed
from triptych.data.sources import Source
from triptych.errors import UserError
from triptych.recipe import Recipe
from triptych.settings import flat

# Parts of a recipe that may differ when a run goes on: they change no number.
RESUMABLE = ("loader.workers", "loader.max_unreadable", "checkpoint", "health.pictures")


def provenance() -> dict[str, Any]:
    """Versions, commit and hardware: what a number must be printed with."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return {
        "triptych": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hardware": f"{device}, {torch.get_num_threads()} threads",
    }


def cpu_name() -> str:
    """The processor's model, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"CPU {models[0] if models else platform.processor() or platform.machine()}"


def slug(name: str) -> str:
    """For the name of a folder."""
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name)


def commit() -> str | None:
    """The commit of the checkout that this package runs from, with '+' for uncommitted changes; None if installed."""
    here = Path(__file__).parent
    try:
        ask = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=12"]
        top = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "--show-toplevel"], capture_output=True, text=True, check=True
        ).stdout.strip()
        if not (Path(top) / "src" / "triptych").is_dir():
            return None
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def claim_folder(recipe: Recipe, source: Source, out: Path) -> None:
    """Write recipe.yaml and run.json, or check that an existing run is this one.  Raises UserError where it is not."""
    if not distributed.is_main():
        return
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: name a folder, which the run will fill")
    mine = recipe.model_dump(mode="json")
    data = {"name": str(Path(source.name).resolve()) if Path(source.name).exists() else source.name}
    data |= {"images": len(source), "fingerprint": source.fingerprint()}
    file, about = out / "recipe.yaml", out / "run.json"
    if file.exists() and about.exists():
        theirs, now = flat(_read(file, yaml.safe_load)), flat(mine)
        changed = [f"{k}: {v!r} there, {now.get(k)!r} now" for k, v in theirs.items() if now.get(k) != v]
        changed = [line for line in changed if not line.startswith(RESUMABLE)]
        there = _read(about, json.loads)["data"]
        if there["fingerprint"] != data["fingerprint"]:
            changed.append(
                f"data: {there['name']} ({there['images']} images) there, {data['name']} ({len(source)}) now"
            )
        if changed:
            lines = "\n  ".join(changed)
            where = "Give another folder (train: --out, eval finetune: --run), or remove this one"
            raise UserError(f"{out} holds another run:\n  {lines}\n{where}")
        return
    ours = {about, about.with_suffix(".part"), file.with_suffix(".part")}  # of a run that was killed right here
    if out.exists() and set(out.iterdir()) - ours:
        raise UserError(f"{out} is not empty and holds no run: give another folder")
    out.mkdir(parents=True, exist_ok=True)
    for path, text in (
        (about, json.dumps({"data": data, **provenance()}, indent=2) + "\n"),
        (file, yaml.safe_dump(mine, sort_keys=False)),
    ):
        part = path.with_suffix(".part")
        part.write_text(text)
        part.replace(path)


def stored(out: Path, name: str, older: str) -> str | None:
    """A setting of the run that `out` holds; `older` of a run from before it was one; None where there is no run.

    Raises UserError.
    """
    file = out / "recipe.yaml"
    return flat(_read(file, yaml.safe_load)).get(name, older) if file.exists() else None


def _read(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        content = parse(path.read_text())
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} is damaged ({error}): restore it, or give another folder") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: restore it, or give another folder")
    return content
