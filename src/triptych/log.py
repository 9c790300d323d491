"""What a run writes while it trains: metrics.jsonl, TensorBoard where it is installed, and a progress line."""

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text


class Metrics:
    """metrics.jsonl: one JSON object per line, steps in order.  Rows from `start` on are dropped first: a resumed run
    writes them again."""

    def __init__(self, folder: Path, start: int):
        self.path = folder / "metrics.jsonl"
        kept = []
        if self.path.exists():
            lines = self.path.read_text().splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < start]
        part = self.path.with_suffix(".part")
        part.write_text("".join(f"{line}\n" for line in kept))
        part.replace(self.path)
        self._file = self.path.open("a")
        self._board = _tensorboard(folder / "tensorboard", start)

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        if self._board is not None:
            for name, value in row.items():
                if isinstance(value, int | float) and name != "step":
                    self._board.add_scalar(name, value, row["step"])

    def flush(self) -> None:
        self._file.flush()
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _tensorboard(folder: Path, start: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # an extra: pip install -e ".[log]"
        return None
    return SummaryWriter(str(folder), purge_step=start or None)


class ProgressLine:
    """One live line on a terminal; a plain line every ten seconds elsewhere."""

    def __init__(self, console: Console, enabled: bool = True):
        self.console, self.enabled, self._last = console, enabled, 0.0
        self._live = Live(Text(""), console=console, refresh_per_second=4, transient=True) if self._is_live else None
        if self._live:
            self._live.start()

    @property
    def _is_live(self) -> bool:
        return self.enabled and self.console.is_terminal

    def show(self, text: str, *, force: bool = False) -> None:
        if not self.enabled:
            return
        if self._live and not force:
            self._live.update(Text(text, no_wrap=True, overflow="ellipsis"))
        elif text and (force or time.monotonic() - self._last > 10):
            self._last = time.monotonic()
            self.console.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        if self._live:
            self._live.stop()


def duration(seconds: float) -> str:
    """'2:03' or '1:02:03'."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"
