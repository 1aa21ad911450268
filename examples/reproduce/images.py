"""Fashion-MNIST and MNIST digits as the packages that `make fetch` unpacks have them: (N, 1, 28, 28) in [0, 1]."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fmaq.training.examples import Examples

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "examples"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package puts its files, if it is installed."""


def fashion(train: int = 60000, test: int = 10000) -> tuple[Examples, Examples]:
    """The first `train` of the 60,000 training images of Fashion-MNIST, and the first `test` of its 10,000 test images.

    Raises:
        FileNotFoundError: the images are neither fetched nor installed.
    """
    folder = next((f for f in (CACHE / "fashion-mnist", INSTALLED) if (f / "t10k-images-idx3-ubyte.gz").exists()), None)
    if folder is None:
        raise FileNotFoundError(
            "Fashion-MNIST is neither fetched nor installed; run `make fetch`, or install dataset-fashion-mnist"
        )
    return _fashion(folder, "train", train), _fashion(folder, "t10k", test)


def _fashion(folder: Path, split: str, count: int) -> Examples:
    images = _idx(folder / f"{split}-images-idx3-ubyte.gz", 16).view(-1, 1, 28, 28)
    labels = _idx(folder / f"{split}-labels-idx1-ubyte.gz", 8)
    return Examples(images[:count].float() / 255, labels[:count])


def _idx(path: Path, header: int) -> Tensor:
    """The bytes of a compressed IDX file behind its header."""
    content = gzip.decompress(path.read_bytes())
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).copy())


def digits(train: int = 8000, test: int = 2000, split_seed: int = 0) -> tuple[Examples, Examples]:
    """MNIST digits: of the 10,000 that the npm package has, the first `train` and the last `test` of a seeded shuffle.

    The package has no split of its own, nor says which of MNIST's 70,000 images these are.

    Raises:
        FileNotFoundError: the images are not fetched.
        ValueError: there are fewer than `train` + `test`.
    """
    files = [CACHE / "mnist" / f"{digit}.json" for digit in range(10)]
    if missing := [path for path in files if not path.exists()]:
        raise FileNotFoundError(f"{missing[0]} is missing; run `make fetch`, which downloads what the examples need")
    by_class = [torch.tensor(json.loads(path.read_text())["data"]).view(-1, 1, 28, 28) for path in files]
    x, y = torch.cat(by_class), torch.cat([torch.full((len(part),), digit) for digit, part in enumerate(by_class)])
    if train + test > len(y):
        raise ValueError(f"there are {len(y)} digits, fewer than {train} to train on and {test} to test on")
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(split_seed))
    return Examples(x[order[:train]], y[order[:train]]), Examples(x[order[-test:]], y[order[-test:]])
