"""Texts and JSON in files that are either whole or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fmaq.emulation.whole_files import write_bytes

__all__ = ["write_bytes", "write_json", "write_text"]


def write_text(path: str | Path, text: str) -> None:
    """`write_bytes` of text in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """`write_bytes` of a value as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
