"""Weights that are promised not to change: what emulation does to them is done once, for decoding above all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fmaq import kernels


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Quantize, scale and measure the weights of an attached model once, in a `with` block and without gradients.

    A forward otherwise reads every weight a few times before it multiplies: to quantize it, to find its range, and to
    notice a change. Where few tokens share a weight, as in `model.generate`, that takes longer than the products. The
    results have the same bits. Memory for up to two more copies of the weights is taken until the block ends.

    The promise: inside, weights are changed only in ways that torch counts (an optimizer's step, `load_state_dict`, any
    in-place operation: these are noticed), and not through `.data`, NumPy or another library.

        with fmaq.frozen(model), torch.no_grad():
            model.generate(tokens, max_new_tokens=100)

    Raises:
        TypeError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"frozen takes a torch.nn.Module, got {type(model).__name__}")
    with kernels.freezing([*model.parameters(), *model.buffers()]):
        yield
