"""Products of indexed tensors (einsum, tensordot, bilinear ...), each as one batched matrix product of two operands.

An index of both operands that the result keeps is a batch; one that it drops is summed, in the order of the first
operand's indices; more operands are taken from left to right.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

BatchedProduct = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(B, M, K) times (B, K, N) is (B, M, N); then the two tensors that these are views of."""


class CannotContract(ValueError):
    """The expression is not a chain of matrix products; the message says why."""


def einsum(equation: str, operands: Sequence[Tensor], product: BatchedProduct) -> Tensor:
    """`torch.einsum` of two or more operands.

    Raises:
        CannotContract: an index is repeated in an operand, or summed over one alone, or the operands do not fit.
    """
    inputs, output = parse_equation(equation, [x.dim() for x in operands])
    labels, result = inputs[0], operands[0]
    for position in range(1, len(operands)):
        later = set(output).union(*inputs[position + 1 :])
        other = inputs[position]
        kept = [c for c in dict.fromkeys(labels + other) if c in later]
        last = position == len(operands) - 1
        target = output if last else "".join(kept)
        result = contract(labels, result, other, operands[position], target, product)
        labels = target
    return result


def macs(equation: str, operands: Sequence[Tensor]) -> int | None:
    """Multiply-accumulates of an einsum of two operands; None where it is no chain of matrix products."""
    try:
        inputs, _ = parse_equation(equation, [x.dim() for x in operands])
    except CannotContract:
        return None
    sizes: dict[str, int] = {}
    for labels, x in zip(inputs, operands, strict=True):
        sizes |= {c: max(size, sizes.get(c, 1)) for c, size in zip(labels, x.shape, strict=True)}
    return math.prod(list(sizes.values()))


def parse_equation(equation: str, dims: Sequence[int]) -> tuple[list[str], str]:
    """The indices of each operand and of the result, a letter a dimension; an ellipsis becomes free letters."""
    left, arrow, output = equation.replace(" ", "").partition("->")
    inputs = left.split(",")
    if len(inputs) != len(dims):
        raise CannotContract(f"equation {equation!r} has {len(inputs)} operands, and {len(dims)} are given")
    free = [c for c in string.ascii_letters if c not in equation]
    spans = [dim - len(term.replace("...", "")) for term, dim in zip(inputs, dims, strict=True)]
    width = max([0, *[span for term, span in zip(inputs, spans, strict=True) if "..." in term]])
    if min(spans) < 0 or width > len(free):
        raise CannotContract(f"equation {equation!r} does not fit operands of {list(dims)} dimensions")
    ellipsis = "".join(free[:width])
    if not arrow:
        once = sorted(c for c in set(left) - set(".,") if left.count(c) == 1)
        output = "..." * ("..." in left) + "".join(once)
    inputs = [term.replace("...", ellipsis[width - span :]) for term, span in zip(inputs, spans, strict=True)]
    output = output.replace("...", ellipsis)
    for term, dim in zip(inputs, dims, strict=True):
        if len(term) != dim:
            raise CannotContract(f"equation {equation!r} does not fit operands of {list(dims)} dimensions")
        if len(set(term)) < len(term):
            raise CannotContract("an index is repeated in one operand")
    return inputs, output


def contract(a_labels: str, a: Tensor, b_labels: str, b: Tensor, output: str, product: BatchedProduct) -> Tensor:
    """Σ over the indices that `output` lacks, as one batched product; an index of size 1 is broadcast.

    Raises:
        CannotContract: an index is summed over one operand alone, or the sizes do not fit.
    """
    alone = (set(a_labels) ^ set(b_labels)) - set(output)
    if alone:
        raise CannotContract("an index is summed over one operand alone")
    whole_a, whole_b = a, b
    a, b = _broadcast(a_labels, a, b_labels, b)
    sizes = dict(zip(a_labels + b_labels, (*a.shape, *b.shape), strict=True))
    batch = [c for c in a_labels if c in b_labels and c in output]
    summed = [c for c in a_labels if c in b_labels and c not in output]
    rows = [c for c in a_labels if c not in b_labels]
    columns = [c for c in b_labels if c not in a_labels]

    def size(labels: list[str]) -> int:
        return int(torch.Size([sizes[c] for c in labels]).numel())

    left = a.permute([a_labels.index(c) for c in batch + rows + summed]).reshape(size(batch), size(rows), size(summed))
    right = b.permute([b_labels.index(c) for c in batch + summed + columns])
    right = right.reshape(size(batch), size(summed), size(columns))
    order = batch + rows + columns
    result = product(left, right, whole_a, whole_b).reshape([sizes[c] for c in order])
    return result.permute([order.index(c) for c in output])


def _broadcast(a_labels: str, a: Tensor, b_labels: str, b: Tensor) -> tuple[Tensor, Tensor]:
    a_sizes, b_sizes = dict(zip(a_labels, a.shape, strict=True)), dict(zip(b_labels, b.shape, strict=True))
    for c in set(a_sizes) & set(b_sizes):
        if a_sizes[c] != b_sizes[c]:
            if 1 not in (a_sizes[c], b_sizes[c]):
                raise CannotContract(f"sizes {a_sizes[c]} and {b_sizes[c]} of one index do not fit")
            a_sizes[c] = b_sizes[c] = max(a_sizes[c], b_sizes[c])
    return a.expand([a_sizes[c] for c in a_labels]), b.expand([b_sizes[c] for c in b_labels])
