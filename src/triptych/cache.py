"""Where things that can be made again are kept."""

import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """$TRIPTYCH_CACHE (or ~/.cache/triptych) / kind."""
    return Path(os.environ.get("TRIPTYCH_CACHE") or "~/.cache/triptych").expanduser() / kind
