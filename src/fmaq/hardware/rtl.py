"""The FMAq unit and the chunked multiply-accumulate around it, as Amaranth modules, and their Verilog.

`FmaqUnit` is combinational: x, w, s in, y out. `Mac` registers s, counts the steps of a chunk, merges finished chunks
in a second-level accumulator, and has its own random bits.
"""

from __future__ import annotations

from amaranth.hdl import Cat, Elaboratable, Module, Mux, Signal, Value

from fmaq.hardware import datapath as dp
from fmaq.hardware.lfsr import MERGE_SEED, STEP_SEED, TAPS
from fmaq.hardware.unit import IeeeFormat, Unit
from fmaq.numerics import FixedFormat, FloatFormat


def product(sheet: dp.Sheet, unit: Unit, x: Value, w: Value, rounding: dp.Rounding) -> dp.Real | dp.Fixed:
    """Q_prod(x·w) of two codes."""
    exact = dp.multiply(
        sheet.under("multiply"),
        dp.read_operand(sheet.under("x"), x, unit.activation),
        dp.read_operand(sheet.under("w"), w, unit.weight),
    )
    format, quantize = unit.product, sheet.under("product")
    if isinstance(format, FloatFormat):
        real = exact if isinstance(exact, dp.Real) else dp.sign_magnitude(quantize, exact)
        rounded = dp.round_float(quantize, dp.normalise(quantize, real), format.mantissa, rounding)
        return dp.complete(quantize, dp.into_range(quantize, rounded, format), format)
    if isinstance(format, FixedFormat):
        code = dp.into_fixed_range(quantize, dp.round_to_fixed(quantize, exact, -format.fraction, rounding), format)
        return dp.Fixed(sheet.name("product", code.as_signed()), -format.fraction)
    return exact


def accumulate(
    sheet: dp.Sheet, unit: Unit, p: dp.Real | dp.Fixed, s: Value, rounding: dp.Rounding, is_normalised: bool = False
) -> Value:
    """Q_acc(p + s) of a product (or, normalised, another register's number) and a code: the new code."""
    format = unit.format
    if isinstance(format, FixedFormat):
        if isinstance(p, dp.Fixed) and p.lsb >= -format.fraction:  # nothing to round
            addend = sheet.name("term", p.value << (p.lsb + format.fraction))
            return dp.into_fixed_range(sheet, sheet.name("total", addend + s.as_signed()), format)
        aligned = dp.to_fixed(sheet.under("term"), p, -format.fraction - rounding.kept)
        exact = dp.Fixed(sheet.name("total", aligned.value + (s.as_signed() << (rounding.kept + 1))), aligned.lsb)
        return dp.into_fixed_range(sheet, dp.round_fixed(sheet, exact, rounding), format)
    term = dp.sign_magnitude(sheet.under("term"), p) if isinstance(p, dp.Fixed) else p
    if isinstance(format, IeeeFormat):
        return _accumulate_ieee(sheet, term, s, format)
    if not is_normalised:
        term = dp.normalise(sheet.under("term"), term)
    register = dp.complete(sheet.under("register"), dp.read_float(s, format), format)
    total = dp.add(sheet.under("sum"), term, register, format.mantissa + 1, rounding)
    result = dp.normalise(sheet.under("result"), total)
    rounded = dp.round_float(sheet.under("result"), result, format.mantissa, rounding)
    return dp.write_float(sheet, dp.into_range(sheet.under("output"), rounded, format), format)


def _accumulate_ieee(sheet: dp.Sheet, p: dp.Real, s: Value, format: IeeeFormat) -> Value:
    """The same with gradual underflow: nothing is normalised below the smallest normal exponent."""
    rounding = dp.Rounding("nearest_even")
    register, special = dp.read_ieee(sheet.under("register"), s, format)
    p = dp.normalise(sheet.under("term"), p, floor=format.emin)
    total = dp.add(sheet.under("sum"), p, register, format.mantissa + 1, rounding)
    code = dp.write_ieee(sheet.under("output"), dp.normalise(sheet.under("result"), total, floor=format.emin), format)
    return Mux(special, s, code)


class FmaqUnit(Elaboratable):
    """y = FMAq(x, w, s), combinational. Ports: `unit.inputs`, and `y`."""

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self.inputs = {name: Signal(width, name=name) for name, width in unit.inputs.items()}
        self.y = Signal(unit.register_bits, name="y")

    @property
    def ports(self) -> list[Signal]:
        """Inputs, then the output."""
        return [*self.inputs.values(), self.y]

    def elaborate(self, platform: object) -> Module:
        """The datapath."""
        module, ports = Module(), self.inputs
        sheet = dp.Sheet(module)
        centred = self.unit.centred
        of_product = dp.Rounding(self.unit.product_rounding, dp.random_integer(ports.get("r_product"), centred))
        of_sum = dp.Rounding(self.unit.rounding, dp.random_integer(ports.get("r_sum"), centred))
        p = product(sheet, self.unit, ports["x"], ports["w"], of_product)
        code = accumulate(
            sheet, self.unit, p, ports["s"], of_sum, is_normalised=isinstance(self.unit.product, FloatFormat)
        )
        module.d.comb += self.y.eq(code)
        return module


class Merge(Elaboratable):
    """y = Q_acc(s + t), the second level: two registers' numbers, combinational."""

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self.s, self.t = (Signal(unit.register_bits, name=name) for name in ("s", "t"))
        self.r_sum = Signal(unit.random_bits, name="r_sum")
        self.y = Signal(unit.register_bits, name="y")

    def elaborate(self, platform: object) -> Module:
        """The adder alone."""
        module, format = Module(), self.unit.format
        sheet = dp.Sheet(module)
        term: dp.Real | dp.Fixed
        if isinstance(format, FixedFormat):
            term = dp.Fixed(self.s.as_signed(), -format.fraction)
        elif isinstance(format, FloatFormat):
            term = dp.complete(sheet.under("term"), dp.read_float(self.s, format), format)
        else:
            raise TypeError(f"{format} has no second level")
        rounding = dp.Rounding(self.unit.rounding, dp.random_integer(self.r_sum, self.unit.centred))
        module.d.comb += self.y.eq(accumulate(sheet, self.unit, term, self.t, rounding, is_normalised=True))
        return module


class Lfsr(Elaboratable):
    """`bits` new random bits a cycle: a 32-bit linear-feedback shift register that advances by as many places."""

    def __init__(self, bits: int, seed: int) -> None:
        self.seed = seed
        self.enable = Signal(name="enable")
        self.out = Signal(bits, name="out")

    def elaborate(self, platform: object) -> Module:
        """All the feedback bits of a cycle, unrolled."""
        module = Module()
        state = Signal(32, init=self.seed, name="state")
        bits: list[Value] = list(state)
        for place in range(len(self.out)):
            feedback = Signal(name=f"feedback_{place}")
            module.d.comb += feedback.eq(Cat(bits[tap] for tap in TAPS).xor())
            bits = [feedback, *bits[:-1]]
        module.d.comb += self.out.eq(state[: len(self.out)])
        with module.If(self.enable):
            module.d.sync += state.eq(Cat(bits))
        return module


class Mac(Elaboratable):
    """A chunked dot product, one step a cycle.

    Ports: `x`, `w`, taken where `valid`; `last` with the last step of a dot product. Two cycles later `done` is set for
    one cycle and `total` is the dot product's code. A new dot product may start in the cycle after `last`.
    """

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self.x, self.w = Signal(unit.activation.bits, name="x"), Signal(unit.weight.bits, name="w")
        self.valid, self.last = Signal(name="valid"), Signal(name="last")
        self.total, self.done = Signal(unit.register_bits, name="total"), Signal(name="done")

    @property
    def ports(self) -> list[Signal]:
        """Inputs, then outputs; clk and rst join them."""
        return [self.x, self.w, self.valid, self.last, self.total, self.done]

    def elaborate(self, platform: object) -> Module:
        """The unit, its register and chunk counter; the merging adder and its register one cycle behind."""
        unit, module = self.unit, Module()
        zero = int(unit.format.encode(0.0))
        module.submodules.fmaq = step = FmaqUnit(unit)
        module.submodules.merge = merge = Merge(unit)
        s = Signal(unit.register_bits, init=zero, name="s")
        total = Signal(unit.register_bits, init=zero, name="t")
        chunk_ends, starts = Signal(name="chunk_ends"), Signal(init=1, name="chunk_starts")
        merges, finishes = Signal(name="merges"), Signal(name="finishes")
        module.d.comb += [
            step.inputs["x"].eq(self.x),
            step.inputs["w"].eq(self.w),
            step.inputs["s"].eq(Mux(starts, zero, s)),
            chunk_ends.eq(self.last | self._count(module)),
            merge.s.eq(s),
            merge.t.eq(total),
        ]
        with module.If(self.valid):
            module.d.sync += [s.eq(step.y), starts.eq(chunk_ends)]
        module.d.sync += [
            merges.eq(self.valid & chunk_ends),
            finishes.eq(self.valid & self.last),
            self.done.eq(finishes),
        ]
        with module.If(merges):
            module.d.sync += total.eq(Mux(finishes, zero, merge.y))
            module.d.sync += self.total.eq(merge.y)
        self._randomness(module, step, merge, merges)
        return module

    def _count(self, module: Module) -> Value:
        """Set in the last step of a full chunk."""
        chunk = self.unit.accumulator.chunk  # type: ignore[union-attr]
        if chunk is None:
            return Signal(name="never")
        position = Signal(range(max(chunk, 2)), name="position")
        is_last = Signal(name="chunk_is_full")
        module.d.comb += is_last.eq(position == chunk - 1)
        with module.If(self.valid):
            module.d.sync += position.eq(Mux(is_last | self.last, 0, position + 1))
        return is_last

    def _randomness(self, module: Module, step: FmaqUnit, merge: Merge, merges: Signal) -> None:
        """Fresh random integers for every rounding of every step, and for every merge."""
        bits = self.unit.random_bits
        if not bits:
            return
        names = [name for name in ("r_product", "r_sum") if name in step.inputs]
        module.submodules.lfsr = lfsr = Lfsr(bits * len(names), seed=STEP_SEED)
        module.submodules.merge_lfsr = merge_lfsr = Lfsr(bits, seed=MERGE_SEED)
        module.d.comb += [lfsr.enable.eq(self.valid), merge_lfsr.enable.eq(merges), merge.r_sum.eq(merge_lfsr.out)]
        for index, name in enumerate(names):
            module.d.comb += step.inputs[name].eq(lfsr.out[index * bits : (index + 1) * bits])
