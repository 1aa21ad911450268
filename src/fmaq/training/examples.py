"""What a task runs on: labelled examples, windows of tokens, or scored pairs of texts, in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = Tensor | dict[str, Tensor]

IGNORED = -100
"""The class of a token that does not count."""


def _pick(inputs: Inputs, index: Any) -> Inputs:
    return {k: v[index] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[index]


def to_device(inputs: Inputs, device: str | torch.device) -> Inputs:
    """The same inputs on another device."""
    return {k: v.to(device) for k, v in inputs.items()} if isinstance(inputs, dict) else inputs.to(device)


def digest(*parts: Inputs) -> str:
    """A hash of the contents of tensors, with their names, types and shapes."""
    state = hashlib.sha256()
    for part in parts:
        for name, tensor in part.items() if isinstance(part, dict) else [("", part)]:
            state.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            state.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()[:16]


def _check_tensor(what: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} must be tensors, got a {type(value).__name__}; torch.as_tensor makes one of an array")


def _whole(what: str, value: Any) -> Tensor:
    """Classes or tokens as int64; floats must be whole numbers."""
    _check_tensor(what, value)
    if value.is_floating_point() and bool((wrong := value != value.round()).any()):
        raise ValueError(f"{what} must be whole numbers, got {float(value[wrong][0]):g}")
    return value.long()


@dataclass
class Examples:
    """Inputs with a class each, or a class for each of their tokens.

    Args:
        inputs: a tensor (N, ...), or tensors by name, the model's keyword arguments.
        targets: (N,) or (N, tokens) classes, int64; `IGNORED` is that of a token that does not count.
    """

    inputs: Inputs
    targets: Tensor

    def __post_init__(self) -> None:
        for tensor in self.inputs.values() if isinstance(self.inputs, dict) else [self.inputs]:
            _check_tensor("inputs", tensor)
            if len(tensor) != len(self.targets):
                raise ValueError(f"{len(tensor)} inputs but {len(self.targets)} targets; each input needs one target")
        self.targets = _whole("targets", self.targets)

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, index: Any) -> tuple[Inputs, Tensor]:
        """The inputs and targets that a slice or a tensor of indices picks."""
        return _pick(self.inputs, index), self.targets[index]

    def first(self, count: int) -> Examples:
        """The first `count`."""
        return Examples(*self.batch(slice(0, count)))

    def counted(self) -> Tensor:
        """For each example, how many of its targets count."""
        return (self.targets != IGNORED).view(len(self), -1).sum(1)

    def digest(self) -> str:
        """A hash of the contents."""
        return digest(self.inputs, self.targets)


@dataclass
class Windows:
    """Windows of tokens (N, length), int64: a language model predicts each token but the first from those before it."""

    tokens: Tensor

    def __post_init__(self) -> None:
        self.tokens = _whole("tokens", self.tokens)
        if self.tokens.dim() != 2 or self.tokens.shape[1] < 2:
            raise ValueError(f"tokens must be (windows, at least 2 tokens), got the shape {tuple(self.tokens.shape)}")

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, index: Any) -> tuple[Inputs, Tensor]:
        """The windows that a slice or a tensor of indices picks, as inputs and as targets."""
        return {"input_ids": self.tokens[index]}, self.tokens[index]

    def first(self, count: int) -> Windows:
        """The first `count`."""
        return Windows(self.tokens[:count])

    def counted(self) -> Tensor:
        """For each window, how many of its tokens are predicted."""
        return torch.full((len(self),), self.tokens.shape[1] - 1)

    def digest(self) -> str:
        """A hash of the contents."""
        return digest(self.tokens)


@dataclass
class Pairs:
    """Texts, and how alike people found some pairs of them.

    Args:
        inputs: tokenised texts, tensors (N, length) by name.
        first, second: (P,) indices of texts.
        scores: (P,) judgements, not all equal: nothing correlates with those.
    """

    inputs: dict[str, Tensor]
    first: Tensor
    second: Tensor
    scores: Tensor

    def __post_init__(self) -> None:
        sizes = [len(self.first), len(self.second), len(self.scores)]
        if len(set(sizes)) > 1:
            raise ValueError(f"{sizes[0]} first texts, {sizes[1]} second and {sizes[2]} scores; a pair has one of each")
        if not sizes[0] and len(self):
            raise ValueError(f"there are no pairs of the {len(self)} texts to compare")
        if sizes[0] and bool((self.scores == self.scores[0]).all()):
            raise ValueError(
                f"the scores of {sizes[0]} pairs are all {float(self.scores[0]):g}: nothing correlates with it"
            )
        for name, index in (("first", self.first), ("second", self.second)):
            wrong = index[(index < 0) | (index >= len(self))]
            if len(wrong):
                raise ValueError(f"{name} names the text {int(wrong[0])}, but the texts are 0 to {len(self) - 1}")

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values()), ()))

    def digest(self) -> str:
        """A hash of the contents."""
        return digest(self.inputs, self.first, self.second, self.scores)


def as_examples(data: Any) -> Any:
    """Data in one of this module's forms, from a pair (inputs, classes) of tensors or a torch data set of such pairs.

    Anything else comes back as it is: a task of the user's own may take anything.
    """
    if isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[1], Tensor):
        inputs = dict(data[0]) if isinstance(data[0], Mapping) else data[0]
        return Examples(inputs, data[1])
    if isinstance(data, torch.utils.data.Dataset):
        items = [data[i] for i in range(len(data))]  # type: ignore[arg-type]
        inputs, targets = torch.utils.data.default_collate(items)
        return Examples(inputs, targets)
    return data


def first_inputs(data: Any, count: int) -> Inputs:
    """The first inputs of `Examples`, `Windows` or `Pairs`, as a model takes them.

    Raises:
        TypeError: the data are in a form of the user's own.
    """
    if isinstance(data, Examples | Windows):
        return data.batch(slice(0, count))[0]
    if isinstance(data, Pairs):
        return _pick(data.inputs, slice(0, count))
    raise TypeError(
        f"cannot take inputs from data of type {type(data).__name__}; known are Examples, Windows and Pairs"
    )
