"""What ends a command on purpose.  The command line prints the text without a traceback."""

import difflib
import signal
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input (exit code 2).  The text says what was given, what is allowed and what to do."""


class NonFinite(RuntimeError):
    """A loss term or the weights are NaN or infinite.  The last checkpoint is from before it."""


class Interrupted(RuntimeError):
    """SIGTERM or Ctrl-C; the run was saved."""

    def __init__(self, signal_number: int, step: int):
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after step {step}; saved")
        self.exit_code = 128 + signal_number


def nearest(name: str, allowed: Iterable[str], n: int = 3) -> str:
    """'; did you mean a, b?' for a mistyped name, or the empty string when nothing is near."""
    close = difflib.get_close_matches(name, list(allowed), n=n, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""
