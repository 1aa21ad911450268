"""The operators of `torch.ops.fmaq`: torch's own check of each, and the descriptions they are called with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.library import opcheck

import fmaq
from fmaq.ops.operators import described, summation
from ops_cases import ACCUMULATORS, values

RNG = np.random.default_rng(7)
ACC = summation("M5E4b8 product=M5E4b9 chunk=4")
NOISY = summation("M3E5b16 rounding=stochastic seed=18446744073709551615")
LOOKING = summation("M4E3b3 product=M4E3b4 chunk=3", "recursive/diff")
BACKWARD = summation("M5E4b8", backward="M4E4b8 rounding=stochastic seed=3")
A, B = values(RNG, (2, 3, 9)), values(RNG, (2, 9, 4))
X, WEIGHT = values(RNG, (2, 4, 5, 6)), values(RNG, (6, 2, 3, 2))
WHERE = ([2, 1], [1, 0], [1, 2], 2)
OFFSET = torch.tensor([0, 3, -2, 1])

CASES = {
    **{f"matmul {name}": ("matmul", A, B, *how) for name, how in {"": ACC, "noisy": NOISY, "diff": LOOKING}.items()},
    "matmul with accumulated gradients": ("matmul", A, B, *BACKWARD),
    "matmul of views": ("matmul", A.mT.contiguous().mT, B.flip(2)[:, :, ::2], *ACC),
    "matmul without rows": ("matmul", A[:, :0], B, *ACC),
    "convolution": ("convolution", X, WEIGHT, *WHERE, *ACC),
    "convolution diff": ("convolution", X, WEIGHT, *WHERE, *LOOKING),
    "convolution with accumulated gradients": ("convolution", X, WEIGHT, *WHERE, *BACKWARD),
    "convolution, channels last": ("convolution", X.to(memory_format=torch.channels_last), WEIGHT, *WHERE, *ACC),
    "quantize": ("quantize", A, "M4E3", None, None),
    "quantize by channel": ("quantize", A.mT, "M2E3", 1, None),
    "quantize to integers": ("quantize", A[:, :, ::2], "int4", None, torch.tensor(1.5)),
    "quantize in static ranges": ("quantize", X.to(memory_format=torch.channels_last), "int8", 1, torch.ones(4)),
    "integer codes": ("integer_codes", A, 8, None, None),
    "integer codes by channel": ("integer_codes", A.mT, 4, -1, None),
    "powers of two": ("powers_of_two", OFFSET, -1),
    "token powers": ("token_powers", X, [-1, -3]),
    "times powers": ("times_powers", B.expand(3, 2, 9, 4), 2.0**OFFSET),
}
DIFFERENTIABLE = {"matmul": 2, "convolution": 2, "quantize": 1, "integer_codes": 1, "times_powers": 1}
"""How many of the operators' arguments have a gradient."""


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("has_gradient", [False, True])
def test_torch_finds_no_fault(name, has_gradient) -> None:
    operator, *given = CASES[name]
    for i in range(DIFFERENTIABLE.get(operator, 0) if has_gradient else 0):
        given[i] = given[i].clone(memory_format=torch.preserve_format).requires_grad_()
    opcheck(getattr(torch.ops.fmaq, operator).default, tuple(given))


@pytest.mark.parametrize("of", [(True, True), (True, False), (False, True)])
def test_torch_finds_no_fault_in_gradients(of) -> None:
    how = LOOKING.accumulator, LOOKING.seed
    y = torch.ones(2, 3, 4)
    opcheck(torch.ops.fmaq.matmul_gradients.default, (A, B, y, *how, LOOKING.estimator, *of))
    y = torch.ops.fmaq.convolution(X, WEIGHT, *WHERE, *LOOKING)
    opcheck(torch.ops.fmaq.convolution_gradients.default, (X, WEIGHT, y, *how, *WHERE, LOOKING.estimator, *of))


@pytest.mark.parametrize("acc", ACCUMULATORS, ids=str)
def test_a_description_says_all(acc) -> None:
    name, seed, *_ = summation(acc)
    assert described(name, seed) == acc


def test_a_seed_beyond_63_bits_is_kept() -> None:
    assert described(NOISY.accumulator, NOISY.seed).seed == 2**64 - 1
    assert -(2**63) <= NOISY.seed < 2**63


def test_the_operator_is_the_function() -> None:
    expected = fmaq.matmul(A, B, "M5E4b8 product=M5E4b9 chunk=4")
    assert torch.equal(torch.ops.fmaq.matmul(A, B, "M5E4b8 product=M5E4b9 chunk=4", 0), expected)


def test_autocast_leaves_products_in_float32() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.ops.fmaq.matmul(A.bfloat16(), B.bfloat16(), *ACC)
    assert found.dtype == torch.float32
    assert torch.equal(found, fmaq.matmul(A.bfloat16(), B.bfloat16(), ACC.accumulator))


def test_a_batch_of_a_batch() -> None:
    found = torch.vmap(lambda a: torch.ops.fmaq.matmul(a, B, *ACC))(torch.stack([A, 2 * A]))
    assert torch.equal(found[1], fmaq.matmul(2 * A, B, ACC.accumulator))
