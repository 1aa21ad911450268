"""Which lanes an accumulator is computed in, and that the fast ones equal the reference, bit for bit, on every target.

The tables say so for accumulators that calibrate, recipes and the documents make, so that none falls back unnoticed.
"""

from __future__ import annotations

import re

import llvmlite.binding as llvm
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fmaq.kernels import available_targets, matmul, use_target
from fmaq.kernels.arithmetic64 import General64
from fmaq.kernels.choose import Choice, choose
from fmaq.kernels.compile import optimize
from fmaq.kernels.gemm import Gemm
from fmaq.kernels.parameters import Tile
from fmaq.kernels.products import count_events
from fmaq.kernels.ranges import Range, measure
from fmaq.kernels.targets import TARGETS, Target
from fmaq.numerics import FLOAT32, Accumulator, FixedFormat, FloatFormat, reference
from strategies import examples, machines
from test_kernels_matmul import assert_equal, expected

FLOATS = {
    "paper12": "Float32",
    "paper12 underflow=False": "Float32",
    "M5E4b10h": "Float32",
    "M5E4b10h underflow=False": "Float32",
    "M7E4b10h product=M7E4b12h": "Float32",
    "M5E4b10h product=M5E4b12 product_rounding=toward_zero": "Float32",
    "paper12 rounding=nearest_away": "Rounded32",
    "paper12 rounding=nearest_away underflow=False": "Rounded32",
    "M7E4b10 rounding=nearest_away": "Rounded32",
    "M7E4b10 product=M6E4b12h rounding=nearest_away": "Rounded32",
    "M7E4b10 product=M6E4b14h rounding=nearest_away": "Rounded32",
    "M7E4b10 product=M7E4b9 rounding=nearest_away": "Rounded32",
    "M7E4b10 product=M7E4b2 rounding=nearest_away": "Rounded32",
    "M7E4b10 product=M6E4b12h rounding=stochastic": "Rounded32",
    "paper12 rounding=nearest_even": "Rounded32",
    "paper12 rounding=nearest_even underflow=False": "Rounded32",
    # The outer level's bias, next to the inner one, and far to either side.
    "paper12 outer=M10E5b16": "Float32 FloatLevel32",
    "M5E4b10h product=M5E4b12h outer=M10E5b28": "Float32 FloatLevel32",
    "M5E4b10h outer=M10E5b3": "Float32 FloatLevel32",
    "M5E4b10 outer=M10E5b16h": "Float32 FloatLevel32",
    "M5E4b10h product=M5E4b12h underflow=False outer=M10E5b16": "Float32 FloatLevel32",
    "paper12 outer=(M9E5b16h chunk=2)": "Float32 FloatLevel32 FloatLevel32",
    "paper12 outer=(M10E5b16 rounding=nearest_even chunk=2)": "Float32 FloatLevel32 FloatLevel32",
    "paper12 outer=(M4E5b16 rounding=nearest_even chunk=None)": "Float32 FloatLevel32",
    "paper12 outer=(M10E5b16 rounding=half_up chunk=None)": "Float32 FloatLevel32",
    "paper12 outer=(M10E5b16 rounding=floor chunk=2 outer=fp32)": "Float32 FloatLevel32 Single32",
    "paper12 outer=(M6E5b16 rounding=odd chunk=2 outer=fp32)": "Float32 FloatLevel32 Single32",
    "paper12 outer=(M9E5b15 rounding=stochastic chunk=None)": "Float32 FloatLevel32",
    "paper12 rounding=nearest_away outer=M10E5b28": "Rounded32 FloatLevel32",
    "paper12 rounding=nearest_away outer=(M10E5b2 rounding=nearest_even chunk=None)": "Rounded32 FloatLevel32",
    "paper12 rounding=nearest_even outer=(M10E5b16 rounding=toward_zero chunk=None)": "Rounded32 FloatLevel32",
    "paper12 rounding=nearest_even outer=M10E5b16": "Rounded32 FloatLevel32",
    "paper12 outer=fp32": "Float32 Single32",
    "paper12 underflow=False outer=fp32": "Float32 Single32",
    "paper12 rounding=nearest_away outer=fp32": "Rounded32 Single32",
    "paper12 rounding=nearest_even outer=fp32": "Rounded32 Single32",
    "M5E4b10h product=M5E4b12h outer=(M10E5b16 rounding=nearest_even chunk=2 outer=fp32)": (
        "Float32 FloatLevel32 Single32"
    ),
}
"""Of which events are counted in the same lanes."""

FIXED = {
    "I16f8 product=I16f8 rounding=half_up": "Fixed32",
    "I16f8w product=I16f8 rounding=nearest_even": "Fixed32",
    "I16f8 product=I16f8 rounding=floor": "Fixed32",
    "I16f8 product=I16f8 rounding=nearest_away": "Fixed32",
    "I16f8 product=I16f8 rounding=odd": "Fixed32",
    "I16f8 product=I18f10": "Fixed32",
    "I16f8 product=I18f10w rounding=nearest_even": "Fixed32",
    "I16f8w product=I14f5 rounding=half_up": "Fixed32",
    "I16f8 rounding=half_up": "Fixed32",
    "I12f4": "Fixed32",
    "I12f4w rounding=nearest_even": "Fixed32",
    "I32f8 product=I16f8": "Fixed32",
    "I16f8w product=I16f8w rounding=half_up outer=I24f8": "Fixed32 FixedLevel32",
    "I16f8 product=I16f8 rounding=half_up outer=I14f6": "Fixed32 FixedLevel32",
    "I16f8 product=I16f8 rounding=nearest_even outer=I14f6w": "Fixed32 FixedLevel32",
    "I10f6 product=I10f6 rounding=half_up outer=M10E5b16": "Fixed32 FloatLevel32",
    "I10f6 product=I10f6 rounding=half_up outer=M10E5b30": "Fixed32 FloatLevel32",
    "I10f6 product=I10f6 rounding=half_up outer=M4E5b4": "Fixed32 FloatLevel32",
    "I10f6 product=I10f6 rounding=floor outer=M10E5b16": "Fixed32 FloatLevel32",
    "I16f6w product=I16f6w rounding=nearest_even outer=M10E5b16": "Fixed32 FloatLevel32",
    "I24f14 product=I20f14 rounding=nearest_even outer=M10E5b16": "Fixed32 FloatLevel32",
    "I24f14 product=I20f14 rounding=half_up outer=M10E5b16": "Fixed32 FloatLevel32",
    "I12f6 product=I12f6 outer=M10E5b16h": "Fixed32 FloatLevel32",
    "I10f6 product=I10f6 rounding=half_up outer=fp32": "Fixed32 Single32",
    "I12f6 product=I12f6 rounding=nearest_even outer=(I20f8 chunk=2 outer=fp32)": "Fixed32 FixedLevel32 Single32",
    "I10f6 product=I10f6 rounding=half_up outer=(M10E5b16 rounding=nearest_even chunk=4 outer=fp32)": (
        "Fixed32 FloatLevel32 Single32"
    ),
}

WHOLE = {
    "I16f0": "Whole32",
    "I32f0": "Whole32",
    "I32f0w": "Whole32",
    "I16f0 product=I16f0 outer=fp32": "Whole32 Single32",
    "I24f0 outer=M10E5b0": "Whole32 FloatLevel32",
    "I16f0w outer=I32f0": "Whole32 FixedLevel32",
    "I20f0 outer=(I24f0w chunk=2 outer=fp32)": "Whole32 FixedLevel32 Single32",
}

GENERAL = (
    "paper12 rounding=odd",
    "paper12 rounding=floor",
    "paper12 rounding=half_up",
    "M7E4b10 rounding=nearest_even",
    "M12E5b16 product=M12E5b18 rounding=nearest_even",
    "paper12 outer=I24f8",
    "paper12 outer=(M20E5b16 rounding=stochastic chunk=None)",
    "M7E4b10 product=I8f6",
    "I16f8 product=M7E4b12",
    "I16f8 product=I18f10 rounding=odd",
)
"""What no fast arithmetic is written for, or none is exact."""

FUSED = [t.name for t in available_targets() if t.fused]


def lanes(choice: Choice) -> str:
    """The arithmetic and its levels, by name."""
    return " ".join(type(each).__name__ for each in (choice.arithmetic, *choice.arithmetic.levels))


def drawn(kind: str, scale: float, depth: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, 19, depth) and (1, depth, 37) of a type's values, as float32."""
    rng = np.random.default_rng(3)
    a, b = (torch.from_numpy(rng.normal(0, scale, s)) for s in ((1, 19, depth), (1, depth, 37)))
    if kind == "int8":
        return a.mul(30).round().clip(-127, 127).float(), b.mul(30).round().clip(-127, 127).float()
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn}[kind]
    return a.to(dtype).float(), b.to(dtype).float()


def measured(kind: str, scale: float) -> list[Range]:
    return [measure(x, available_targets()[0]) for x in drawn(kind, scale)]


def chosen(acc: Accumulator, target: Target, a: torch.Tensor, b: torch.Tensor, is_counting: bool = False) -> Choice:
    return choose(acc, target, measure(a, target), measure(b, target), a.shape[2], True, is_counting)


@pytest.mark.parametrize("target", FUSED)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float8", "int8"])
@pytest.mark.parametrize("scale", [0.05, 4.0])
def test_every_accumulator_has_its_lanes(target, kind, scale):
    """Whether or not sums may saturate."""
    a, b = drawn(kind, scale)
    tables = [*FLOATS.items(), *(WHOLE if kind == "int8" else FIXED).items()]
    with use_target(target) as used:
        found = {name: lanes(chosen(Accumulator(name), used, a, b)) for name, _ in tables}
        counted = {name: lanes(chosen(Accumulator(name), used, a, b, True)) for name in FLOATS}
    if kind == "float8":  # whose products may need no rounding
        found = {name: of.replace("Rounded32", "Float32") for name, of in found.items()}
        counted = {name: of.replace("Rounded32", "Float32") for name, of in counted.items()}
        tables = [(name, of.replace("Rounded32", "Float32")) for name, of in tables]
    assert found == dict(tables)
    assert counted == {name: of for name, of in tables if name in FLOATS}


def test_what_is_left_in_the_general_path():
    target = available_targets()[0]
    found = {name: choose(Accumulator(name), target, *measured("float32", 1.0), 50, True) for name in GENERAL}
    assert [name for name, choice in found.items() if not isinstance(choice.arithmetic, General64)] == []


@pytest.mark.parametrize(
    ("target", "name"),
    [
        *((target, name) for target in FUSED for name in (*FLOATS, *WHOLE)),
        *((target.name, name) for target in available_targets() for name in FIXED),
    ],
)
def test_they_equal_the_reference(target, name):
    acc = Accumulator(name)
    for kind, scale in (("int8", 1.0),) if name in WHOLE else (("float32", 0.05), ("float8", 4.0)):
        a, b = drawn(kind, scale)
        with use_target(target):
            found = matmul(a, b, acc)
        np.testing.assert_array_equal(found.numpy(), expected(a, b, acc))


@pytest.mark.parametrize("name", FLOATS)
def test_events_equal_the_reference(name):
    """Of rows that underflow, and of rows that overflow."""
    acc, (small, b), (large, _) = Accumulator(name), drawn("float32", 0.1, 35), drawn("float8", 4.0, 35)
    a = torch.cat([small[:, :9], 8 * large[:, :9]], 1)
    counted = reference.count_events(a[0].numpy(), b[0].numpy(), acc)
    wanted = [counted[f"{prefix}{event}"] for prefix in ("", "merge_") for event in reference.EVENTS]
    assert count_events(a, b, acc) == wanted


@st.composite
def fixed_sums(draw: st.DrawFn) -> Accumulator:
    """Fixed formats of near units for products, sums and levels: in int32 lanes, if the products are small."""
    fraction = draw(st.integers(-2, 8))
    rounding = st.sampled_from(["toward_zero", "nearest_even", "nearest_away", "half_up", "floor", "odd"])

    def format(least: int = 2, most: int = 28) -> FixedFormat:
        unit = fraction + draw(st.sampled_from([0, 0, 0, 2, -3]))
        return FixedFormat(draw(st.integers(least, most)), unit, draw(st.sampled_from(["saturate", "wrap"])))

    outer = draw(st.one_of(st.sampled_from([None, FLOAT32]), outers(format)))
    product = draw(st.sampled_from([None, format(4, 24), format(4, 24), format(4, 24)]))
    own = draw(rounding) if product is not None and draw(st.booleans()) else None
    chunk = draw(st.sampled_from([1, 3, 16, None]))
    return Accumulator(format(), product, chunk, draw(rounding), product_rounding=own, outer=outer)


@st.composite
def outers(draw: st.DrawFn, fixed) -> object:
    """A level of either kind and any rounding, perhaps another one above it."""
    mantissa, exponent = draw(st.integers(0, 21)), draw(st.integers(3, 5))
    bias = draw(st.integers(2**exponent - 16, 2**exponent + 4))
    format = FloatFormat(mantissa, exponent, bias, half_unit=draw(st.sampled_from([False, False, True])))
    format = fixed() if draw(st.booleans()) else format
    roundings = ["toward_zero", "nearest_even", "nearest_away", "half_up", "floor", "odd", "stochastic"]
    return Accumulator(
        format,
        chunk=draw(st.sampled_from([1, 2, None])),
        rounding="toward_zero" if format.half_unit else draw(st.sampled_from(roundings)),
        random_bits=draw(st.integers(1, 8)),
        outer=draw(st.one_of(st.sampled_from([None, FLOAT32]), outers(fixed))),
    )


@examples(120)
@given(data=st.data(), acc=fixed_sums(), machine=machines, seed=st.integers(0, 2**32 - 1))
def test_products_are_rounded_into_fixed_point(data, acc, machine, seed):
    """Ties, and numbers next to them, of either sign; some far out of range."""
    rng = np.random.default_rng(seed)
    largest = data.draw(st.sampled_from([2.0, 20.0, 600.0, 1e5])) * 2.0**-acc.format.fraction
    halves = rng.integers(-64, 65, (1, 11, 37)) * 2.0 ** (-acc.format.fraction - 1)
    a = np.where(rng.random((1, 11, 37)) < 0.5, halves, rng.uniform(-largest, largest, (1, 11, 37)))
    b = rng.choice([1.0, -1.0, 0.5, 3.0, 1 + 2.0**-23, 1 - 2.0**-23, 2.0**-40, 0.0], (1, 37, 35))
    assert_equal(torch.from_numpy(a.astype(np.float32)), torch.from_numpy(b.astype(np.float32)), acc, machine)


@examples(60)
@given(data=st.data(), machine=machines, seed=st.integers(0, 2**32 - 1))
def test_merges_of_floats_round_as_their_level_says(data, machine, seed):
    """However the processor rounds meanwhile: sums far apart, ties, and what lies next to them."""
    inner = data.draw(st.sampled_from(["M3E4b8", "M5E4b10 product=M5E4b12", "M4E4b9h product=M4E4b11h"]))
    rounding = "toward_zero" if "h" in inner else data.draw(st.sampled_from(["toward_zero", "nearest_away"]))
    if "product" in inner and "h" not in inner:
        rounding = data.draw(st.sampled_from([rounding, "nearest_even"]))
    level = data.draw(outers(lambda: FloatFormat(10, 5, 16)))
    underflow = data.draw(st.booleans())
    acc = Accumulator(f"{inner} rounding={rounding} chunk=3 underflow={underflow} outer=({level})")
    rng = np.random.default_rng(seed)
    a = np.ldexp(rng.integers(-9, 10, (1, 9, 37)), rng.integers(-9, 4, (1, 9, 37)))
    b = np.ldexp(rng.integers(-9, 10, (1, 37, 35)), rng.integers(-9, 1, (1, 37, 35)))
    assert_equal(torch.from_numpy(a.astype(np.float32)), torch.from_numpy(b.astype(np.float32)), acc, machine)


@pytest.mark.parametrize("target", FUSED)
@pytest.mark.parametrize(
    "name",
    [
        "paper12 underflow=False outer=fp32",
        "M7E4b10h product=M7E4b12h chunk=2 underflow=False outer=fp32",
        "M5E4b10 chunk=3 rounding=nearest_away underflow=False outer=fp32",
    ],
)
def test_sums_in_float32_may_be_subnormal(target, name):
    acc, rng = Accumulator(name), np.random.default_rng(0)
    b = np.ldexp(rng.integers(-9, 10, (1, 37, 33)) / 8, -63).astype(np.float32)
    for exponent in (-63, -61):
        a = np.ldexp(rng.integers(-9, 10, (1, 20, 37)) / 8, exponent).astype(np.float32)
        wanted = expected(torch.from_numpy(a), torch.from_numpy(b), acc)
        assert ((wanted != 0) & (np.abs(wanted) < 2.0**-126)).any()
        with use_target(target) as used:
            found = matmul(torch.from_numpy(a), torch.from_numpy(b), acc)
            assert "Single32" in lanes(chosen(acc, used, torch.from_numpy(a), torch.from_numpy(b)))
        np.testing.assert_array_equal(found.numpy(), wanted)


def test_aarch64_sets_its_control_register_around_additions():
    """This machine may not run that code, nor does its LLVM assemble it."""
    target, acc, ranges = TARGETS["neon"], Accumulator("paper12 outer=fp32"), measured("float32", 1.0)
    choice = choose(acc, target, *ranges, 50, True)
    llvm.initialize_all_targets()
    machine = llvm.Target.from_triple("aarch64-unknown-linux-gnu").create_target_machine(cpu=target.cpu, opt=3)
    code = optimize(str(Gemm(choice.arithmetic, acc.chunk, target, Tile(*target.tile)).build()), machine)
    assert len(re.findall(r'asm "msr FPCR, .*f(?:add|mla) .*msr FPCR, ', str(code))) == 2  # of 8 cells, 6 at once
