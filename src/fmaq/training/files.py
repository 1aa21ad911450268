"""Texts and JSON in files that are either whole or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fmaq.whole_files import write_bytes

__all__ = ["made_folder", "write_bytes", "write_json", "write_text"]


def made_folder(path: Path) -> Path:
    """A folder for results, made if need be: before the work whose results they are.

    Raises:
        ValueError: it cannot be made, or written into.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the output folder {path}: {error.strerror}; choose another with -o") from None
    if not os.access(path, os.W_OK):
        raise ValueError(f"cannot write into the output folder {path}; choose another with -o")
    return path


def write_text(path: str | Path, text: str) -> None:
    """`write_bytes` of text in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """`write_bytes` of a value as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
