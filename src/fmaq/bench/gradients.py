"""Gradients through the accumulation: against the emulated forward, a training step, and memory."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from fmaq import kernels
from fmaq.bench.costs import MEBIBYTE, peak_memory
from fmaq.bench.gemm import PAPER, _small, _work
from fmaq.bench.networks import training_step
from fmaq.bench.rows import Case, Operation, Row, comparing
from fmaq.emulation import Policy, attach
from fmaq.numerics.reference import ESTIMATORS

SIZE, LARGE = 512, 2048
WIDTHS = (784, 1024, 1024, 10)
BATCH = 64


def cases() -> list[Case]:
    """Both gradients of a product by every estimator; a step of an MLP; and the memory of a large product's."""
    backward = [_backward(estimator) for estimator in ESTIMATORS if estimator != "identity"]
    return [*backward, _step("immediate/diff"), _memory("immediate/diff"), _memory("recursive/diff")]


def _backward(estimator: str) -> Case:
    def prepare() -> tuple[Operation, Operation]:
        a, b, grad = _small(SIZE), _small(SIZE + 1)[:, :SIZE, :SIZE].contiguous(), torch.ones(1, SIZE, SIZE)

        def ours() -> object:
            return kernels.matmul_gradients(a, b, grad, PAPER, estimator)

        return ours, lambda: kernels.matmul(a, b, PAPER)

    target = 5.0 if estimator.startswith("immediate") else 7.0
    row = Row("gradients", _work(SIZE, SIZE, SIZE), estimator, target, against="emulated forward", macs=SIZE**3)
    return Case(row, comparing(prepare))


def _step(estimator: str) -> Case:
    """A training step of the MLP of `fmaq reproduce mlp-fashion`, against that with `identity`."""

    def prepare() -> tuple[Operation, Operation]:
        x, classes = torch.rand(BATCH, WIDTHS[0]), torch.arange(BATCH) % WIDTHS[-1]
        return _training(estimator, x, classes), _training("identity", x, classes)

    work = f"MLP {'-'.join(map(str, WIDTHS))}, batch {BATCH}"
    return Case(Row("gradients", work, f"step, {estimator}", 3.0, against="identity"), comparing(prepare))


def _training(estimator: str, x: torch.Tensor, classes: torch.Tensor) -> Operation:
    first, second, third, last = WIDTHS
    model = nn.Sequential(
        nn.Linear(first, second), nn.ReLU(), nn.Linear(second, third), nn.ReLU(), nn.Linear(third, last)
    )
    return training_step(attach(model, Policy(accumulator=PAPER, estimator=estimator)), x, classes)


def _memory(estimator: str) -> Case:
    def measure(row: Row, rounds: int) -> Row:
        small, a, b = _small(64), _small(LARGE), _small(LARGE)
        grad = torch.ones(1, LARGE, LARGE)
        kernels.matmul_gradients(small, small, small, PAPER, estimator)  # the code is there
        extra = peak_memory(lambda: kernels.matmul_gradients(a, b, grad, PAPER, estimator))
        return replace(row, value=max(0.0, extra - 2 * a.nbytes / MEBIBYTE))

    row = Row("gradients", _work(LARGE, LARGE, LARGE), f"{estimator}, beyond operands and results", 128.0, unit="MiB")
    return Case(row, measure)
