"""Where results that may be made anew are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(part: str) -> Path:
    """`FMAQ_CACHE`, else the user's own folder for caches; of it, the folder of a part of fmaq. It need not exist."""
    chosen = os.environ.get("FMAQ_CACHE")
    if chosen:
        return Path(chosen) / part
    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or os.path.expanduser("~/.cache")
    return Path(home) / "fmaq" / part
