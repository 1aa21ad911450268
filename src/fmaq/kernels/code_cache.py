"""Machine code on disk: a kernel is compiled once on a machine, and not once in every process.

A file is found by a hash of all that its code depends on, and checked by a hash of the code. One that is missing,
spoilt or not to be written costs a compilation, and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from fmaq.cache_folder import cache_folder
from fmaq.whole_files import write_bytes

PART = "kernels"
LIMIT = 256 << 20  # bytes of all files; when there are more, the half that was used last stays
SELDOM = 64  # files are counted when about one in so many is written


def key_of(*parts: bytes) -> str:
    """The name of the code that follows from these."""
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little") + part)
    return hashed.hexdigest()


def find(key: str) -> bytes | None:
    """The code of that name, or None."""
    path = cache_folder(PART) / key
    try:
        content = path.read_bytes()
        os.utime(path)
    except OSError:
        return None
    digest, code = content[:32], content[32:]
    return code if hashlib.sha256(code).digest() == digest else None


def keep(key: str, code: bytes) -> None:
    """Write code under a name, whole or not at all."""
    where = cache_folder(PART)
    with contextlib.suppress(OSError):
        write_bytes(where / key, hashlib.sha256(code).digest() + code)
        if int(key, 16) % SELDOM == 0:
            prune(where)


def prune(where: Path, limit: int = LIMIT) -> None:
    """Remove what was used longest ago, if all files take more than `limit` bytes together, until they take half."""
    found = []
    for path in where.iterdir():
        with contextlib.suppress(OSError):  # another process removed it
            status = path.stat()
            found.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in found)
    if total <= limit:
        return
    for _, size, path in sorted(found):
        if total <= limit // 2:
            break
        with contextlib.suppress(OSError):
            path.unlink()
        total -= size
