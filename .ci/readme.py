"""Run README's commands, one after the other, in a copy of the tracked files: what a fresh clone has, and no more.

Every line of README's `sh` blocks is run, in quick form where it would take long. Blocks behind a comment `<!-- needs
... -->` want data that are not in the packages: of their commands only the recipes' presence is checked. Stops at the
first command that fails.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAMP = ".installed"
"""What the Makefile touches when it has installed everything."""

BLOCK = re.compile(r"(?:<!-- needs (?P<needs>.*?) -->\n)?^```sh\n(?P<lines>.*?)^```$", re.MULTILINE | re.DOTALL)

QUICK = {
    "make demo": "make demo DEMO_ARGS=--quick",
    "make test": "make test PYTEST_ARGS=tests/test_formats.py",
    "fmaq calibrate examples/digits/recipe.yaml": "fmaq calibrate examples/digits/recipe.yaml --batches 1",
    "fmaq bench": "fmaq bench -s start --rounds 1",
}
"""What is run in place of the commands that take more than half a minute."""


def commands(text: str) -> Iterator[tuple[str, str | None]]:
    """The commands of a page's `sh` blocks, and what each needs beside the packages, or None."""
    for block in BLOCK.finditer(text):
        for line in block["lines"].splitlines():
            if words := shlex.split(line, comments=True):
                yield shlex.join(words), block["needs"]


def copy_of_tracked_files(folder: Path) -> None:
    """The files that git knows, as they are now."""
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], check=True, capture_output=True, text=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def borrowed_environment(folder: Path) -> None:
    """The environment of this tree, with a stamp of its own, so that make installs nothing into what is borrowed."""
    folder.mkdir()
    for path in (ROOT / ".venv").iterdir():
        if path.name != STAMP:
            (folder / path.name).symlink_to(path.resolve())
    (folder / STAMP).touch()


def main() -> int:
    """Run them all; 1 if one fails."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_of_tracked_files(folder)
        borrowed_environment(folder / ".venv")
        environment = os.environ | {
            "PATH": f"{folder / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(folder / "src"),
        }
        for command, needs in commands((ROOT / "README.md").read_text(encoding="utf-8")):
            if needs is not None:
                missing = [
                    word for word in shlex.split(command) if word.endswith(".yaml") and not (folder / word).exists()
                ]
                print(f"{'MISSING' if missing else 'not run'}  {command}  (needs {needs})", flush=True)
                if missing:
                    return 1
                continue
            start = time.monotonic()
            run = QUICK.get(command, command)
            done = subprocess.run(
                run,
                shell=True,
                cwd=folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            print(
                f"{'ok' if done.returncode == 0 else 'FAILED':<7} {time.monotonic() - start:4.0f} s  {run}", flush=True
            )
            if done.returncode != 0:
                print(done.stdout)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
