"""The FMAq unit and the chunked multiply-accumulate around it, as Amaranth modules, and their Verilog.

`FmaqUnit` is combinational: x, w, s in, y out. `Mac` registers s, counts the steps of a chunk, merges finished chunks
in a second-level accumulator, and has its own random bits.
"""

from __future__ import annotations

from amaranth.hdl import Cat, Elaboratable, Module, Mux, Signal, Value

from fmaq.hardware import datapath as dp
from fmaq.hardware.lfsr import MERGE_SEED, STEP_SEED, TAPS
from fmaq.hardware.unit import IeeeFormat, RegisterFormat, Unit, register_bits
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
    sheet: dp.Sheet,
    format: RegisterFormat,
    p: dp.Real | dp.Fixed,
    s: Value,
    rounding: dp.Rounding,
    is_normalised: bool = False,
) -> Value:
    """Q(p + s) of a product (or another register's number) and a code of the format: the new code."""
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
            sheet, self.unit.format, p, ports["s"], of_sum, is_normalised=isinstance(self.unit.product, FloatFormat)
        )
        module.d.comb += self.y.eq(code)
        return module


class Merge(Elaboratable):
    """y = Q(s + t), the level above the chunks: a chunk's sum and a total, combinational."""

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self.s, self.t = Signal(unit.register_bits, name="s"), Signal(register_bits(unit.total), name="t")
        self.r_sum = Signal(unit.merge_random_bits, name="r_sum")
        self.y = Signal(len(self.t), name="y")

    @property
    def ports(self) -> list[Signal]:
        """Inputs, then the output."""
        return [self.s, self.t, *([self.r_sum] if len(self.r_sum) else []), self.y]

    def elaborate(self, platform: object) -> Module:
        """The adder alone."""
        module, format, level = Module(), self.unit.format, self.unit.merge
        sheet = dp.Sheet(module)
        term: dp.Real | dp.Fixed
        if isinstance(format, FixedFormat):
            term = dp.Fixed(self.s.as_signed(), -format.fraction)
        elif isinstance(format, FloatFormat):
            term = dp.complete(sheet.under("term"), dp.read_float(self.s, format), format)
        else:
            raise TypeError(f"{format} has no second level")
        rounding = dp.Rounding(level.rounding, dp.random_integer(self.r_sum, level.centred))
        is_float = isinstance(format, FloatFormat)
        module.d.comb += self.y.eq(accumulate(sheet, self.unit.total, term, self.t, rounding, is_normalised=is_float))
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


class Lane(Elaboratable):
    """A multiply-accumulate without its merging adder: the unit, chunk counter, and the registers of both levels.

    Ports: those of `Mac`, and between the lane and an adder, which answers in the same cycle: `merges`, set where a
    chunk's sum is merged; `s` and `t`, the codes to add; `y`, their sum.
    """

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self.x, self.w = Signal(unit.activation.bits, name="x"), Signal(unit.weight.bits, name="w")
        self.valid, self.last = Signal(name="valid"), Signal(name="last")
        bits = register_bits(unit.total)
        self.total, self.done = Signal(bits, name="total"), Signal(name="done")
        self.merges, self.y = Signal(name="merges"), Signal(bits, name="y")
        self.s = Signal(unit.register_bits, init=int(unit.format.encode(0.0)), name="s")
        self.t = Signal(bits, init=int(unit.total.encode(0.0)), name="t")

    def elaborate(self, platform: object) -> Module:
        """The unit, its register and chunk counter; the merge one cycle behind."""
        unit, module = self.unit, Module()
        module.submodules.fmaq = step = FmaqUnit(unit)
        chunk_ends, finishes = Signal(name="chunk_ends"), Signal(name="finishes")
        starts = Signal(init=1, name="chunk_starts")
        module.d.comb += [
            step.inputs["x"].eq(self.x),
            step.inputs["w"].eq(self.w),
            step.inputs["s"].eq(Mux(starts, self.s.init, self.s)),
            chunk_ends.eq(self.last | self._count(module)),
        ]
        with module.If(self.valid):
            module.d.sync += [self.s.eq(step.y), starts.eq(chunk_ends)]
        module.d.sync += [
            self.merges.eq(self.valid & chunk_ends),
            finishes.eq(self.valid & self.last),
            self.done.eq(finishes),
        ]
        with module.If(self.merges):
            module.d.sync += self.t.eq(Mux(finishes, self.t.init, self.y))
            module.d.sync += self.total.eq(self.y)
        self._randomness(module, step)
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

    def _randomness(self, module: Module, step: FmaqUnit) -> None:
        """Fresh random integers for every rounding of every step."""
        bits = self.unit.random_bits
        if not bits:
            return
        names = [name for name in ("r_product", "r_sum") if name in step.inputs]
        module.submodules.lfsr = lfsr = Lfsr(bits * len(names), seed=STEP_SEED)
        module.d.comb += lfsr.enable.eq(self.valid)
        for index, name in enumerate(names):
            module.d.comb += step.inputs[name].eq(lfsr.out[index * bits : (index + 1) * bits])


class Mac(Elaboratable):
    """A chunked dot product, one step a cycle.

    Ports: `x`, `w`, taken where `valid`; `last` with the last step of a dot product. Two cycles later `done` is set for
    one cycle and `total` is the dot product's code. A new dot product may start in the cycle after `last`.
    """

    def __init__(self, unit: Unit) -> None:
        self.unit, self.lane = unit, Lane(unit)
        self.x, self.w, self.valid, self.last = self.lane.x, self.lane.w, self.lane.valid, self.lane.last
        self.total, self.done = self.lane.total, self.lane.done

    @property
    def ports(self) -> list[Signal]:
        """Inputs, then outputs; clk and rst join them."""
        return [self.x, self.w, self.valid, self.last, self.total, self.done]

    def elaborate(self, platform: object) -> Module:
        """A lane and a merging adder of its own, in which nothing changes between merges: that saves its energy."""
        unit, lane, module = self.unit, self.lane, Module()
        module.submodules.lane = lane
        module.submodules.merge = merge = Merge(unit)
        module.d.comb += [
            merge.s.eq(Mux(lane.merges, lane.s, lane.s.init)),
            merge.t.eq(lane.t),
            lane.y.eq(merge.y),
        ]
        if unit.merge_random_bits:
            module.submodules.merge_lfsr = lfsr = Lfsr(unit.merge_random_bits, seed=MERGE_SEED)
            module.d.comb += [lfsr.enable.eq(lane.merges), merge.r_sum.eq(lfsr.out)]
        return module
