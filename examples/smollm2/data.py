"""News texts to measure a language model on: the background corpus of Lee, Pincombe & Welsh 2005."""

from pathlib import Path
from typing import Any

import torch

from fmaq.training.examples import Windows

FILE = Path(__file__).resolve().parents[2] / ".cache" / "examples" / "lee" / "lee_background.cor"


def lee_background(
    tokenizer: Any, windows: int = 12, window: int = 512, train: int = 0
) -> tuple[Windows | None, Windows]:
    """Windows of `window` tokens of the corpus: the first `windows` to measure on, the `train` behind to train on.

    Raises:
        FileNotFoundError: the corpus has not been fetched.
    """
    if not FILE.exists():
        raise FileNotFoundError(f"{FILE} is missing; run `make fetch`, which downloads what the examples need")
    tokens = torch.tensor(tokenizer(FILE.read_text(encoding="latin-1"))["input_ids"])
    every = tokens[: (windows + train) * window].view(windows + train, window)
    return Windows(every[windows:]) if train else None, Windows(every[:windows])
