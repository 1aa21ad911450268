"""Files that are either whole or not there: written beside, flushed to the disk, then renamed into place."""

from __future__ import annotations

import os
import threading
from pathlib import Path


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file atomically, making its folder: a crash leaves the old content or the new, never a part.

    Raises:
        OSError: it cannot be written; IsADirectoryError where there is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
