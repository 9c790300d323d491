"""Errors that are the user's to mend.  The command line prints their text without a traceback and exits with 2."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input.  The text says what was given, what is allowed and what to do."""


def nearest(name: str, allowed: Iterable[str], n: int = 3) -> str:
    """'; did you mean a, b?' for a mistyped name, or the empty string when nothing is near."""
    close = difflib.get_close_matches(name, list(allowed), n=n, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""
