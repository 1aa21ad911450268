"""RTL, synthesized netlists and Verilog equal the reference, bit for bit."""

import time

import numpy as np
import pytest

pytest.importorskip("amaranth", reason="needs the extra fmaq[hardware]")
pytest.importorskip("pyosys", reason="needs the extra fmaq[hardware]")

from amaranth.sim import Simulator

from fmaq.hardware import proof, synthesis, testbench
from fmaq.hardware.cost import design, mac_design
from fmaq.hardware.lfsr import lfsr_sequence
from fmaq.hardware.liberty import find_library
from fmaq.hardware.rtl import FmaqUnit, Mac
from fmaq.hardware.unit import Unit, dot_products
from fmaq.hardware.vectors import is_exhaustive, vectors_for
from fmaq.numerics import reference

needs_iverilog = pytest.mark.skipif(
    not testbench.has_iverilog(), reason="Icarus Verilog is not installed (Debian: apt-get install iverilog)"
)


SMALL = [
    ("M3E3b4 product=M3E3b6", "M1E2", "M1E2"),
    ("M2E3b2z product=M1E3b4z rounding=nearest_even", "M2E2", "M1E2"),
    ("M1E2b1 product=M0E2b2 rounding=stochastic random_bits=3", "M1E2", "M1E2"),
    ("M0E3b5 rounding=nearest_even", "M2E2", "M2E2"),
    ("M4E3b3z", "int4", "M1E2"),
    ("I8f4 rounding=nearest_even", "M2E2", "M2E2"),
    ("I6f2w rounding=stochastic random_bits=3", "M2E2", "M2E2"),
    ("I7f-1 product=I5f-2w", "int4", "int4"),
    # Products that are always far below a step of their format.
    ("M2E3b-4 product=I6f-3 rounding=nearest_even", "M2E1b1", "M0E2b3"),
    ("I8f-3 product=I6f-4 rounding=stochastic random_bits=2", "M1E1b1", "M0E1b3"),
    ("M2E3b-4 product=I6f-3 rounding=odd", "M2E1b1", "M0E2b3"),
    # Half-unit sums and products, alone and together.
    ("M3E3b4h product=M3E3b6h", "M1E2", "M1E2"),
    ("M3E3b4h product=M1E3b4zh", "M2E2", "M1E2"),
    ("M1E3b5h product=M4E2b3h", "M2E2", "M2E2"),
    ("M0E3b5h product=M0E3b5h", "M2E2", "M2E2"),
    ("M2E3b2zh", "M2E2", "M1E2"),
    ("M4E3b2h", "int4", "M1E2"),
    ("I8f4 product=M2E3b4h", "M2E2", "M2E2"),
    ("M3E3b4h product=I6f3 product_rounding=half_up", "M2E2", "M1E2"),
    # One rounding of products, another of sums; random integers that are odd.
    ("I6f2 product=I5f1 product_rounding=stochastic rounding=half_up random_bits=3", "M2E2", "M2E2"),
    ("M2E3b3 product=M1E3b4 product_rounding=odd rounding=stochastic random_bits=3", "M1E2", "M1E2"),
    ("M1E2b1 product=M0E2b2 rounding=stochastic random_bits=3 centred=true", "M1E2", "M1E2"),
    ("I6f2w rounding=stochastic random_bits=3 centred=true", "M2E2", "M2E2"),
]
ROUNDED = [
    (f"{accumulator} rounding={rounding}", *operands)
    for rounding in ("nearest_away", "floor", "half_up", "odd")
    for accumulator, *operands in [
        ("M3E3b4 product=M3E3b6", "M1E2", "M1E2"),
        ("M2E3b2z product=M1E3b4z", "M2E2", "M1E2"),
        ("M0E3b5", "M2E2", "M2E2"),
        ("I8f4", "M2E2", "M2E2"),
        ("I8f4 product=I6f2", "M2E2", "M2E2"),
        ("I7f-1 product=I5f-2w", "int4", "int4"),
        ("I8f-1 product=M4E3b3", "int4", "M1E2"),
    ]
]
LARGE = [
    ("paper12", "M4E3", "M4E3"),
    ("M10E5b16 product=M10E5b18", "M4E3", "M4E3"),
    ("M23E8b127 rounding=nearest_even", "M4E3", "M4E3"),
    ("M7E4b10 product=M5E4b12 rounding=stochastic random_bits=10", "M4E3", "M4E3"),
    ("M7E5b9z product=I12f8", "M3E4", "M4E3b5"),
    ("M6E4b-3", "int8", "int8"),
    ("ieee32", "M4E3", "M4E3"),
    ("ieee16", "M4E3", "M4E3b9"),
    ("I16f10", "M4E3", "M4E3"),
    ("I16f6w product=M4E4b12 rounding=stochastic random_bits=5", "M4E3", "M4E3"),
    ("I32f0", "int8", "int8"),
    ("M5E4b10h product=M5E4b12h", "M4E3", "M4E3"),
    ("M5E4b10h product=M7E4b12h", "int8", "M4E3"),
    ("M22E8b127h", "M4E3", "M4E3"),
    ("I12f8 product=I12f8 product_rounding=half_up", "M4E3", "M4E3"),
    ("M7E4b10 product=M7E4b12 rounding=nearest_away", "M4E3", "M4E3"),
]


@pytest.mark.parametrize("description", [*SMALL, *ROUNDED], ids=lambda d: d[0].replace(" ", ","))
def test_rtl_of_small_formats_for_every_input(description):
    unit = Unit.of(*description)
    vectors = vectors_for(unit)
    assert is_exhaustive(unit)
    codes = synthesis.lower(design(unit)).simulate(vectors)["y"]
    assert proof.mismatches(unit.format, codes, unit.golden(vectors)) == 0


@pytest.mark.parametrize("description", LARGE, ids=lambda d: d[0].replace(" ", ","))
def test_rtl_on_100000_vectors(description):
    unit = Unit.of(*description)
    vectors = vectors_for(unit, 100_000)
    codes = synthesis.lower(design(unit)).simulate(vectors)["y"]
    assert len(codes) == 100_000
    assert proof.mismatches(unit.format, codes, unit.golden(vectors)) == 0


@pytest.mark.parametrize(
    "description",
    [LARGE[0], LARGE[6], LARGE[9], *LARGE[11:], *SMALL[10:12], *ROUNDED[-7::2], SMALL[1]],
    ids=lambda d: d[0].replace(" ", ","),
)
def test_every_synthesized_netlist(description):
    found = proof.prove(Unit.of(*description), [find_library()])
    assert found.vectors >= 100_000 or found.exhaustive
    assert set(found.mismatches) == {"rtl", *(f"unit/{recipe.name}" for recipe in synthesis.RECIPES)}
    assert found.holds


@pytest.mark.parametrize("name", ["osu018", "osu035"])
def test_netlists_of_debians_libraries(name):
    try:
        library = find_library(name)
    except ValueError as error:
        pytest.skip(str(error))
    assert proof.prove(Unit.of("M4E3b4 product=M4E3b6"), [library]).holds


def test_a_netlists_100000_vectors_take_less_than_a_second():
    unit = Unit.of("paper12")
    netlist, vectors = synthesis.lower(design(unit)), vectors_for(unit, 100_000)
    start = time.process_time()
    netlist.simulate(vectors)
    assert time.process_time() - start < 1


def test_a_wrong_netlist_is_found():
    unit = Unit.of("paper12")
    vectors = vectors_for(unit, 10_000)
    other = synthesis.lower(design(Unit.of("M7E4b10 product=M7E4b12 rounding=nearest_even")))
    assert proof.mismatches(unit.format, other.simulate(vectors)["y"], unit.golden(vectors)) > 100


@pytest.mark.parametrize("description", [LARGE[0], LARGE[3], LARGE[7]], ids=lambda d: d[0].replace(" ", ","))
def test_rtl_in_amaranths_own_simulator(description):
    unit = Unit.of(*description)
    vectors = vectors_for(unit, 200)
    top, codes = FmaqUnit(unit), []

    async def bench(context):
        for index in range(200):
            for name, signal in top.inputs.items():
                context.set(signal, int(vectors[name][index]))
            codes.append(context.get(top.y))

    simulator = Simulator(top)
    simulator.add_testbench(bench)
    simulator.run()
    assert proof.mismatches(unit.format, np.array(codes), unit.golden(vectors)) == 0


def run_mac(unit, x, w, pause=()):
    """Dot products by Amaranth's simulator; no operand comes in the cycles of `pause`."""
    top, codes = Mac(unit), []
    x_codes, w_codes = unit.activation.encode(x), unit.weight.encode(w)
    steps = [
        (int(a), int(b), k == x.shape[1] - 1)
        for r in range(len(x))
        for k, (a, b) in enumerate(zip(x_codes[r], w_codes[r], strict=True))
    ]

    async def bench(context):
        cycle, waiting = 0, list(steps)
        while len(codes) < len(x):
            valid = bool(waiting) and cycle not in pause
            context.set(top.valid, valid)
            if valid:
                a, b, last = waiting.pop(0)
                context.set(top.x, a)
                context.set(top.w, b)
                context.set(top.last, last)
            await context.tick()
            if context.get(top.done):
                codes.append(context.get(top.total))
            cycle += 1

    simulator = Simulator(top)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run_until(1e-6 * (len(steps) + len(pause) + 10))
    return unit.format.decode(np.array(codes))


def operands(unit, count, steps, seed=0):
    rng = np.random.default_rng(seed)
    x = unit.activation.decode(rng.integers(0, 1 << unit.activation.bits, (count, steps)))
    return x, unit.weight.decode(rng.integers(0, 1 << unit.weight.bits, (count, steps)))


@pytest.mark.parametrize(
    ("accumulator", "pause"),
    [("paper12", ()), ("M5E4b10z chunk=5", (3, 4, 9, 11)), ("M3E4b8 chunk=1", ()), ("I12f4 chunk=None", (0, 21))],
)
def test_chunked_dot_products(accumulator, pause):
    unit = Unit.of(accumulator)
    x, w = operands(unit, 4, 21)
    expected = [reference.dot(a, b, unit.accumulator) for a, b in zip(x, w, strict=True)]
    assert np.array_equal(run_mac(unit, x, w, pause), expected)


def test_a_stochastic_dot_product_rounds_by_its_shift_register():
    unit = Unit.of("M4E4b10 product=M3E4b12 chunk=4 rounding=stochastic random_bits=5")
    x, w = operands(unit, 1, 12)
    steps, merges = lfsr_sequence(10, 0x5EED_0001, 12), lfsr_sequence(5, 0x5EED_0002, 3)
    acc, s, t = unit.accumulator, 0.0, 0.0
    for k in range(12):
        p = reference.quantize(x[0, k] * w[0, k], acc.product, acc.rounding, True, 5, steps[k] & 31)
        s = reference.quantize(reference.exact_sum(s, p), acc.format, acc.rounding, True, 5, steps[k] >> 5)
        if k % 4 == 3:
            t = reference.quantize(reference.exact_sum(t, s), acc.format, acc.rounding, True, 5, merges[k // 4])
            s = 0.0
    assert run_mac(unit, x, w)[0] == t
    # The register's bits are fair, and a long run does not repeat.
    long = lfsr_sequence(10, 0x5EED_0001, 20_000)
    assert abs(np.mean([value & 1 for value in long]) - 0.5) < 0.02
    assert len(set(zip(long, long[1:], long[2:], strict=False))) > 19_000


@needs_iverilog
@pytest.mark.parametrize("description", [LARGE[0], LARGE[9], LARGE[5]], ids=lambda d: d[0].replace(" ", ","))
def test_the_verilog_in_an_independent_simulator(description):
    count = 100_000 if description is LARGE[0] else 20_000
    found = proof.prove(Unit.of(*description), [], count, iverilog=True)
    assert found.mismatches == {"rtl": 0, "iverilog": 0}


# --- Integer operands -------------------------------------------------------------------------------------------------

INTEGERS = [
    ("paper12", "int8", "int8"),
    ("M23E8b127", "int8", "int8"),
    ("paper12", "int8", "M4E3"),
    ("M5E4b10 rounding=nearest_even", "M4E3", "int8"),
    ("M10E5b8z", "int4", "int4"),
    ("M7E4b-2 product=M7E4b0", "int16", "int16"),
    ("M4E3b1 rounding=stochastic random_bits=4", "int2", "int12"),
    ("I16f4", "int8", "M4E3"),
    ("I20f2 product=M7E4b4", "int8", "int5"),
]


@pytest.mark.parametrize("description", INTEGERS, ids=lambda d: ",".join(d).replace(" ", ","))
def test_netlists_of_integer_operands(description):
    found = proof.prove(Unit.of(*description), [find_library()], 50_000)
    assert set(found.mismatches) == {"rtl", *(f"unit/{recipe.name}" for recipe in synthesis.RECIPES)}
    assert found.holds


@pytest.mark.parametrize("name", ["osu018", "osu035"])
def test_netlists_of_integer_operands_in_debians_libraries(name):
    try:
        library = find_library(name)
    except ValueError as error:
        pytest.skip(str(error))
    assert proof.prove(Unit.of("M5E4b4 product=M5E4b6", "int8", "int4"), [library], 50_000).holds


@pytest.mark.parametrize("accumulator", ["I16f0", "I16f0w", "I24f0w", "I12f0"])
def test_an_integer_engine_adds_integer_products_of_codes(accumulator):
    # Python's whole numbers, nothing of fmaq: a product of codes, added, saturated or wrapped.
    bits, wraps = int(accumulator[1:3]), accumulator.endswith("w")
    rng = np.random.default_rng(0)
    x, w = rng.integers(-128, 128, (2, 20_000))
    s = rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), 20_000)
    s[:2000] = (1 << (bits - 1)) - 1 - rng.integers(0, 20_000, 2000) % (1 << (bits - 2))
    exact = [int(a) * int(b) + int(c) for a, b, c in zip(x, w, s, strict=True)]
    low, span = -(1 << (bits - 1)), 1 << bits
    expected = [(v - low) % span + low if wraps else min(max(v, low), low + span - 1) for v in exact]
    assert sum(v != e for v, e in zip(exact, expected, strict=True)) > 10
    unit = Unit.of(accumulator, "int8", "int8")
    vectors = {"x": x & 255, "w": w & 255, "s": s & (span - 1)}
    assert np.array_equal(unit.golden(vectors), expected)
    for mapped in synthesis.map_to_cells(design(unit), find_library()):
        codes = mapped.netlist(find_library()).simulate(vectors)["y"]
        assert np.array_equal(codes, np.array(expected) & (span - 1))


@pytest.mark.parametrize(
    ("accumulator", "chunk"), [("I12f0 chunk=None", 50), ("I14f0w chunk=None", 50), ("I12f0 chunk=8", 8)]
)
def test_an_integer_engines_dot_products(accumulator, chunk):
    bits, wraps = int(accumulator[1:3]), "w" in accumulator
    low, span = -(1 << (bits - 1)), 1 << bits

    def kept(value):
        return (value - low) % span + low if wraps else min(max(value, low), low + span - 1)

    rng = np.random.default_rng(1)
    x, w = rng.integers(-128, 128, (2, 2, 50, 64))
    expected = np.zeros((2, 64), int)
    for product, lane in np.ndindex(2, 64):
        total = 0
        for start in range(0, 50, chunk):
            s = 0
            for k in range(start, min(start + chunk, 50)):
                s = kept(s + int(x[product, k, lane]) * int(w[product, k, lane]))
            total = kept(total + s)
        expected[product, lane] = total
    unit = Unit.of(accumulator, "int8", "int8")
    for mapped in synthesis.map_to_cells(mac_design(unit), find_library(), synthesis.RECIPES[::3]):
        codes = proof.simulate_mac(mapped.netlist(find_library()), x & 255, w & 255)
        assert np.array_equal(codes, expected & (span - 1))


# --- The multiply-accumulate ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "description",
    [
        ("paper12", "M4E3", "M4E3"),
        ("M3E3b4 chunk=5 rounding=stochastic random_bits=3", "M1E2", "M1E2"),
        ("M5E4b10z chunk=None", "int4", "int4"),
        ("I16f0", "int8", "int8"),
        ("M5E4b10h product=M5E4b12h outer=M10E5b16", "M4E3", "M4E3"),
        ("I10f6 product=I10f6 product_rounding=half_up outer=I16f6", "M4E3", "M4E3"),
        (
            "M4E4b10 product=M3E4b12 chunk=4 product_rounding=odd "
            "outer=(M6E5b16 rounding=stochastic chunk=None random_bits=4)",
            "M4E3",
            "M4E3",
        ),
    ],
    ids=lambda d: ",".join(d).replace(" ", ","),
)
def test_netlists_of_the_multiply_accumulate(description):
    found = proof.prove(Unit.of(*description), [find_library()], 20_000, part="mac", iverilog=testbench.has_iverilog())
    assert {"rtl", *(f"unit/{recipe.name}" for recipe in synthesis.RECIPES)} <= set(found.mismatches)
    assert found.holds and found.vectors > 19_000


@pytest.mark.parametrize(
    "accumulator",
    [
        "M3E3b4h product=M3E3b6h outer=M10E5b16h",
        "M4E4b10h outer=(M6E5b16 rounding=nearest_even chunk=None) chunk=3",
        "M5E4b10h product=M5E4b12h outer=I20f10",
        "I12f4 outer=M10E5b16",
        "M3E3b4 outer=fp32 chunk=4",
        "M5E4b10h outer=fp32 chunk=2",
        "I12f4 outer=fp32 chunk=4",
        "M4E4b10 product=M3E4b12 chunk=4 product_rounding=stochastic random_bits=3 centred=true",
        "M4E4b10 chunk=4 outer=(M6E5b16 rounding=stochastic chunk=None random_bits=4 centred=true)",
    ],
)
def test_rtl_of_the_multiply_accumulate_with_a_level_of_its_own(accumulator):
    assert proof.prove(Unit.of(accumulator), [], 10_000, part="mac").holds


def test_float32_totals_overflow_and_underflow_as_ieee():
    for unit in (Unit.of("M4E4b-112 outer=fp32 chunk=4", "int8", "int8"), Unit.of("M4E4b126 outer=fp32", "M4E3b60")):
        assert proof.prove(unit, [], 10_000, part="mac").holds
    huge = Unit.of("M4E3b-120 product=none chunk=1 outer=fp32", "M0E1b-60", "M0E1b-60")
    x = np.full((1, 8, 1), 0b01)  # 2^61, whose square is 2^122
    assert dot_products(huge, x, x).item() == 2.0**125
    assert np.isinf(dot_products(huge, *[np.full((1, 64, 1), 0b01)] * 2)).all()


def test_a_wrong_multiply_accumulate_is_found(monkeypatch):
    unit, other = (Unit.of(text, "M1E2", "M1E2") for text in ("M3E3b4 chunk=4", "M3E3b4 chunk=5"))
    monkeypatch.setitem(proof.DESIGNS, "mac", lambda _: mac_design(other))
    assert not proof.prove(unit, [], 5_000, part="mac").holds


def test_there_is_no_other_part():
    with pytest.raises(ValueError, match="part must be one of unit, mac, shared, got 'adder'"):
        proof.prove(Unit.of("M3E3b4", "M1E2", "M1E2"), part="adder")
