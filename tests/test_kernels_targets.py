"""Targets: which there are, how one is chosen, and that each one's instructions are generated."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from fmaq.kernels import available_targets, current_target, matmul, use_target
from fmaq.kernels.choose import choose
from fmaq.kernels.compile import assembly
from fmaq.kernels.gemm import Gemm
from fmaq.kernels.parameters import Tile
from fmaq.kernels.ranges import Range
from fmaq.kernels.targets import TARGETS
from fmaq.numerics import Accumulator

# Of a kernel of the paper's accumulator: its step and its control register.
INSTRUCTIONS = {
    "avx512": ("vfmadd", "vmulps", r"vp?and|vpternlog", "zmm", "ldmxcsr"),
    "avx2": ("vfmadd", "vmulps", r"vp?and|blend", "ymm", "ldmxcsr"),
    "sse2": ("mulpd", "addpd", "xmm", "ldmxcsr"),
    "neon": (r"fmla\s+v\d+\.4s", r"fmul\s+v\d+\.4s", r"msr\s+FPCR", r"mrs\s+x\d+, FPCR"),
}


def kernel_assembly(name: str, acc: Accumulator) -> str:
    target = TARGETS[name]
    usual = Range(4.0, 2.0**-10, 24, False)
    choice = choose(acc, target, usual, usual, 64, use_bounds=True)
    return assembly(Gemm(choice.arithmetic, acc.chunk, target, Tile(*target.tile)).build(), target)


def test_sums_too_long_for_32_bit_counters_are_counted_in_64():
    usual, longest = Range(4.0, 2.0**-10, 24, False), 2**28
    chosen = [
        choose(Accumulator.paper12, TARGETS["avx512"], usual, usual, depth, True, is_counting=True).arithmetic
        for depth in (longest, longest + 1)
    ]
    assert [arithmetic.element_bytes for arithmetic in chosen] == [4, 8]
    for target in TARGETS.values():
        assert target.tile[0] * target.tile[1] * longest < 2**32


@pytest.mark.parametrize("name", TARGETS)
def test_code_is_generated_for_every_target(name):
    code = kernel_assembly(name, Accumulator.paper12)
    for instruction in INSTRUCTIONS[name]:
        assert re.search(instruction, code, re.IGNORECASE), f"no {instruction} for {name}"


@pytest.mark.parametrize(
    ("acc", "instruction"),
    [
        ("M7E4b10 rounding=nearest_even", r"fadd\s+v\d+\.2d"),
        ("I16f4w rounding=odd", r"fadd\s+v\d+\.2d"),
        ("M7E4b10 product=M7E4b12 rounding=nearest_even", r"fmla\s+v\d+\.4s"),
        ("M7E4b10 rounding=stochastic", r"fmla\s+v\d+\.4s"),
        ("I16f4 product=I16f4", r"fcvtzs\s+v\d+\.4s"),
    ],
)
def test_every_arithmetic_is_generated_for_aarch64(acc, instruction):
    code = kernel_assembly("neon", Accumulator(acc))
    assert re.search(instruction, code)
    assert re.search(r"msr\s+FPCR", code, re.IGNORECASE)


def test_code_without_a_fused_multiply_add_has_none():
    assert "fmadd" not in kernel_assembly("sse2", Accumulator.paper12)


def test_targets_are_used_inside_a_block_only():
    usual = current_target()
    assert usual == available_targets()[0]
    for target in available_targets():
        with use_target(target.name) as used:
            assert used == current_target() == target
        assert current_target() == usual


def test_an_unknown_target_is_refused_by_name():
    with (
        pytest.raises(ValueError, match="target 'avx1024' does not run on this machine; it runs"),
        use_target("avx1024"),
    ):
        pass


def test_the_environment_chooses_a_target():
    slowest = available_targets()[-1].name
    program = "from fmaq.kernels import current_target; print(current_target().name)"
    environment = os.environ | {"FMAQ_TARGET": slowest}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == slowest


def test_all_targets_run_here_and_agree():
    a, b = (torch.from_numpy(np.random.default_rng(0).normal(0, 9, (1, 24, 24)).astype(np.float32)) for _ in "ab")
    products = []
    for target in available_targets():
        with use_target(target.name):
            products.append(matmul(a, b, Accumulator.paper12))
    assert products
    assert all(torch.equal(p, products[0]) for p in products)
