"""The blocks of a fused multiply-add, as Amaranth expressions: decode, multiply, normalise, align, add, round, pack.

Two kinds of numbers flow between the blocks, both exact. A `Real` is sign and magnitude with an exponent; a `Fixed` is
two's complement. What is known when the unit is generated (the smallest and largest exponent a number can have) goes
with them, so that a block leaves out what cannot happen. Every intermediate result is a named signal, since the
Verilog is to be read.

Rounding needs the bits that are dropped: what an alignment shifts out is kept as one sticky bit below the others,
the OR of them all. Under truncation too: 1 − 2^−30 is the number below 1. A half-unit number has its implied half as
the lowest bit of its significand; its format is rounded to by truncation, and takes no rounder.
"""

from __future__ import annotations

from dataclasses import dataclass

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed, unsigned

from fmaq.hardware.operands import FloatOperand, Operand
from fmaq.hardware.unit import IeeeFormat
from fmaq.numerics import FixedFormat, FloatFormat


class Sheet:
    """Where a block writes its named signals: a module, and a prefix for the names."""

    def __init__(self, module: Module, prefix: str = "") -> None:
        self.module, self.prefix = module, prefix

    def under(self, name: str) -> Sheet:
        """The same module, a longer prefix."""
        return Sheet(self.module, f"{self.prefix}{name}_")

    def name(self, name: str, value: Value, width: int | None = None) -> Signal:
        """A signal of this name that carries the value, cut to a width if one is given."""
        shape = value.shape()
        if width is not None:
            shape = signed(width) if shape.signed else unsigned(width)
        signal = Signal(shape, name=self.prefix + name)
        self.module.d.comb += signal.eq(value)
        return signal


@dataclass(frozen=True)
class Real:
    """(−1)^sign · significand · 2^(exponent + origin − (width of significand − 1)).

    Attributes:
        sign: one bit.
        exponent: signed or unsigned; of a zero it may be anything.
        significand: unsigned; all zeros is zero. *Normalised* means that its top bit is set otherwise.
        origin: what exponent code 0 means.
        low, top: the smallest and the largest exponent of a nonzero number's top significand bit.
        has_subnormals: normalised, but for numbers of the smallest exponent.
    """

    sign: Value
    exponent: Value
    significand: Value
    origin: int
    low: int
    top: int
    has_subnormals: bool = False

    @property
    def width(self) -> int:
        """Bits of the significand."""
        return len(self.significand)


@dataclass(frozen=True)
class Fixed:
    """value · 2^lsb, a signed value."""

    value: Value
    lsb: int


@dataclass(frozen=True)
class Rounding:
    """A rounding mode; `random` is the port of stochastic rounding's integer."""

    mode: str
    random: Value | None = None

    @property
    def kept(self) -> int:
        """Dropped bits that the decision needs, apart from the sticky bit."""
        if self.mode == "stochastic":
            assert self.random is not None
            return len(self.random)
        return 1 if self.mode in ("nearest_even", "nearest_away", "half_up") else 0


def random_integer(port: Value | None, centred: bool) -> Value | None:
    """What a port of stochastic rounding's integer stands for: as it is, or with its last bit set."""
    return Cat(Const(1, 1), port[1:]) if port is not None and len(port) and centred else port


# --- Operands and their product ---------------------------------------------------------------------------------------


def read_operand(sheet: Sheet, code: Value, format: Operand) -> Real | Fixed:
    """A code's number: subnormals have no hidden one, and the exponent of the smallest normal numbers."""
    if not isinstance(format, FloatOperand):
        return Fixed(code.as_signed(), 0)
    field = code[format.mantissa : format.mantissa + format.exponent]
    normal = sheet.name("normal", field.any())
    exponent = sheet.name("exponent", Cat(field[0] | ~normal, field[1:]))
    significand = sheet.name("significand", Cat(code[: format.mantissa], normal))
    return Real(
        code[-1], exponent, significand, -format.bias, 1 - format.bias, (1 << format.exponent) - 1 - format.bias
    )


def multiply(sheet: Sheet, x: Real | Fixed, w: Real | Fixed) -> Real | Fixed:
    """The exact product, not normalised."""
    if isinstance(x, Fixed) and isinstance(w, Fixed):
        return Fixed(sheet.name("product", x.value * w.value), x.lsb + w.lsb)
    x = sign_magnitude(sheet.under("x"), x) if isinstance(x, Fixed) else x
    w = sign_magnitude(sheet.under("w"), w) if isinstance(w, Fixed) else w
    # Each significand has one bit before its point, so the product has two: the top bit's exponent is one more.
    return Real(
        sheet.name("sign", x.sign ^ w.sign),
        sheet.name("exponent", x.exponent + w.exponent),
        sheet.name("significand", x.significand * w.significand),
        x.origin + w.origin + 1,
        x.low + w.low + 1,
        x.top + w.top + 1,
    )


def sign_magnitude(sheet: Sheet, x: Fixed) -> Real:
    """A two's-complement number as a Real of one exponent, not normalised."""
    width = len(x.value)
    sign = sheet.name("negative", x.value[-1])
    magnitude = sheet.name("magnitude", Mux(sign, -x.value, x.value).as_unsigned(), width)
    top = x.lsb + width - 1
    return Real(sign, Const(0, 1), magnitude, top, top, top)


# --- Normalisation ----------------------------------------------------------------------------------------------------


def leading_zeros(sheet: Sheet, bits: Value) -> Value:
    """How many zeros stand above the top one, by halves (Oklobdzija 1994); of all zeros, unspecified."""
    size = 1 << (len(bits) - 1).bit_length()
    padded = Cat(Const(0, size - len(bits)), bits) if size > len(bits) else bits

    def count(low: int, size: int) -> tuple[Value, Value]:
        """Whether a part has a one, and its leading zeros."""
        part = padded[low : low + size]
        if size == 1:
            return part, Const(0, 0)
        half = size // 2
        (_, zeros_low), (any_high, zeros_high) = count(low, half), count(low + half, half)
        top = low + size - 1 - (len(padded) - len(bits))
        zeros = Cat(Mux(any_high, zeros_high, zeros_low), ~any_high)
        return part.any(), sheet.name(f"zeros_from_{max(top, 0)}_of_{size}", zeros)

    return count(0, size)[1]


def normalise(sheet: Sheet, x: Real, floor: int | None = None) -> Real:
    """The same number with its top bit set; with a floor, no exponent falls below it (gradual underflow)."""
    width = x.width
    if width == 1:
        return x
    zeros: Value = leading_zeros(sheet, x.significand)
    lowest = x.low - (width - 1)
    if floor is not None:
        room = sheet.name("room", (x.exponent + (x.origin - floor)).as_unsigned())
        zeros = sheet.name("shift", Mux(zeros < room, zeros, room), len(zeros))
        lowest = max(lowest, floor)
    shifted = sheet.name("significand", x.significand << zeros, width)
    exponent = sheet.name("exponent", x.exponent - zeros)
    return Real(x.sign, exponent, shifted, x.origin, lowest, x.top, floor is not None)


# --- Addition ---------------------------------------------------------------------------------------------------------


def shift_out(sheet: Sheet, bits: Value, amount: Value) -> Value:
    """bits >> amount, with one more bit below that is the OR of what was shifted out."""
    sticky: Value = Const(0, 1)
    for stage in range(len(amount)):
        step, chosen = 1 << stage, amount[stage]
        sticky = sheet.name(f"sticky_{step}", sticky | (chosen & bits[:step].any()))
        rest = bits[step:] if step < len(bits) else Const(0, 1)
        bits = sheet.name(f"shifted_{step}", Mux(chosen, rest, bits), len(bits))
    return Cat(sticky, bits)


def add(sheet: Sheet, p: Real, s: Real, keep: int, rounding: Rounding) -> Real:
    """p + s, not normalised, with all that a rounding to `keep` bits needs: guard bits, and a sticky bit at the bottom.

    The larger magnitude comes first, so the difference is never negative. Where the exponents differ by two or more,
    the difference loses at most one leading bit, and `keep` + 1 bits, those of the rounding, and the sticky bit are
    enough; where they differ by less, one guard bit makes the sum exact.
    """
    origin = min(p.low, s.low)
    n = max(p.width, s.width)
    guard = max(1, keep + 1 + rounding.kept - n)
    span = (max(p.top, s.top) - origin).bit_length()

    def place(x: Real) -> tuple[Value, Value]:
        code = (x.exponent + (x.origin - origin)).as_unsigned()
        significand = Cat(Const(0, n - x.width), x.significand) if n > x.width else x.significand
        return Cat(code, Const(0, span))[:span], significand

    (p_exponent, p_bits), (s_exponent, s_bits) = place(p), place(s)
    if p.has_subnormals or s.has_subnormals:
        p_key, s_key = Cat(p_bits, p_exponent, p_bits.any()), Cat(s_bits, s_exponent, s_bits.any())
    else:  # the top bit is unset in zeros alone
        p_key, s_key = Cat(p_bits[:-1], p_exponent, p_bits[-1]), Cat(s_bits[:-1], s_exponent, s_bits[-1])
    swap = sheet.name("product_is_larger", p_key > s_key)
    exponent = sheet.name("exponent", Mux(swap, p_exponent, s_exponent))
    distance = sheet.name("distance", (exponent - Mux(swap, s_exponent, p_exponent)).as_unsigned(), len(exponent))
    larger = sheet.name("larger", Mux(swap, p_bits, s_bits))
    smaller = sheet.name("smaller", Cat(Const(0, guard), Mux(swap, s_bits, p_bits)))
    reach = min(len(distance), (n + guard).bit_length())
    aligned = shift_out(sheet, smaller, distance[:reach])
    if reach < len(distance):
        far = sheet.name("far", distance[reach:].any())
        nothing = Cat(smaller.any(), Const(0, n + guard))
        aligned = Mux(far, nothing, aligned)
    subtract = sheet.name("subtract", p.sign ^ s.sign)
    width = n + guard + 2
    # −x is ~x + 1, and a carry into the lowest place adds the 1: one adder serves both.
    first = Cat(subtract, Const(0, guard + 1), larger)
    second = Cat(subtract, aligned ^ subtract.replicate(len(aligned)), subtract)
    total = sheet.name("total", (first + second)[1:], width)
    sign = sheet.name("sign", Mux(swap, p.sign, s.sign))
    low = min(p.low - p.width, s.low - s.width) - guard
    return Real(sign, exponent, total, origin + 1, low, max(p.top, s.top) + 1)


# --- Rounding and packing of floats -----------------------------------------------------------------------------------


def increment(sheet: Sheet, kept: Value, dropped: Value, rounding: Rounding, sign: Value) -> Value | None:
    """Whether a magnitude's rounding goes away from zero; None where it never does, and where `jam` does it."""
    if rounding.mode in ("toward_zero", "odd") or len(dropped) == 0:
        return None
    half, rest = dropped[-1], dropped[:-1].any()
    match rounding.mode:
        case "nearest_even":
            return sheet.name("round_up", half & (rest | kept[0]))
        case "nearest_away":
            return half
        case "half_up":
            return sheet.name("round_up", half & (rest | ~sign))
        case "floor":
            return sheet.name("round_up", sign & dropped.any())
    random, bits = rounding.random, rounding.kept
    fraction = dropped[-bits:] if len(dropped) >= bits else Cat(Const(0, bits - len(dropped)), dropped)
    return sheet.name("round_up", (fraction + random)[bits])


def jam(kept: Value, dropped: Value, rounding: Rounding) -> Value:
    """Rounding to odd, of a magnitude or of two's complement: the last kept bit is set where anything is dropped."""
    return Cat(kept[0] | dropped.any(), kept[1:]) if rounding.mode == "odd" and len(dropped) else kept


def round_float(sheet: Sheet, x: Real, mantissa: int, rounding: Rounding) -> Real:
    """A normalised number rounded to a mantissa of M bits: normalised again, its exponent one larger on a carry."""
    drop = x.width - (mantissa + 1)
    if drop <= 0:
        return Real(x.sign, x.exponent, Cat(Const(0, -drop), x.significand), x.origin, x.low, x.top)
    dropped = x.significand[:drop]
    kept = jam(x.significand[drop:], dropped, rounding)
    up = increment(sheet, kept, dropped, rounding, x.sign)
    if up is None:
        return Real(x.sign, x.exponent, kept, x.origin, x.low, x.top)
    # A carry out of the mantissa goes on into the exponent, and leaves the mantissa zero.
    exponent = Cat(x.exponent, x.exponent[-1] if x.exponent.shape().signed else Const(0, 1))
    code = sheet.name("rounded", Cat(kept[:-1], exponent) + up, mantissa + len(exponent))
    return Real(x.sign, code[mantissa:].as_signed(), Cat(code[:mantissa], kept[-1]), x.origin, x.low, x.top + 1)


def into_range(sheet: Sheet, x: Real, format: FloatFormat) -> Real:
    """Flush what is below the smallest magnitude to zero; saturate what is above the largest."""
    lowest = format.emin - (format.zero == "exponent")
    offset = sheet.name("offset", x.exponent + (x.origin - lowest))
    nonzero = x.significand[-1]
    if x.low < format.emin:
        is_too_small = offset[-1] if offset.shape().signed else Const(0, 1)
        if format.zero == "exponent":
            is_too_small = is_too_small | (offset == 0)
        nonzero = sheet.name("nonzero", nonzero & ~is_too_small)
    exponent, mantissa = offset[: format.exponent], x.significand[:-1]
    if x.top > format.emax:
        too_large = sheet.name("saturate", offset > (1 << format.exponent) - 1)
        exponent = exponent | too_large.replicate(format.exponent)
        mantissa = mantissa | too_large.replicate(format.mantissa)
    if len(exponent) < format.exponent:
        exponent = Cat(exponent, Const(0, format.exponent - len(exponent)))
    exponent = sheet.name("exponent", exponent)
    return Real(x.sign, exponent, Cat(mantissa, nonzero), lowest, format.emin, format.emax)


def complete(sheet: Sheet, x: Real, format: FloatFormat) -> Real:
    """A register's number as an adder needs it: a zero's mantissa made zero, and the half of a half-unit format."""
    nonzero = x.significand[-1]
    mantissa = sheet.name("mantissa", x.significand[:-1] & nonzero.replicate(x.width - 1))
    half = Cat(nonzero) if format.half_unit else Cat()
    return Real(x.sign, x.exponent, Cat(half, mantissa, nonzero), x.origin, x.low, x.top)


def read_float(code: Value, format: FloatFormat) -> Real:
    """The number in a register, not yet `complete`: the mantissa of a zero may be anything."""
    mantissa, exponent = code[: format.mantissa], code[format.mantissa : format.mantissa + format.exponent]
    nonzero = exponent.any() if format.zero == "exponent" else ~code[format.bits]
    origin = format.emin - (format.zero == "exponent")
    return Real(code[format.bits - 1], exponent, Cat(mantissa, nonzero), origin, format.emin, format.emax)


def write_float(sheet: Sheet, x: Real, format: FloatFormat) -> Value:
    """The code of a number in range: a zero is the flag, or exponent code 0."""
    nonzero = x.significand[-1]
    if format.zero == "flag":
        return Cat(x.significand[:-1], x.exponent, x.sign, ~nonzero)
    return Cat(x.significand[:-1], x.exponent & nonzero.replicate(format.exponent), x.sign)


# --- IEEE 754 ---------------------------------------------------------------------------------------------------------


def read_ieee(sheet: Sheet, code: Value, format: IeeeFormat) -> tuple[Real, Value]:
    """The number in a register, and whether it is none (an infinity or NaN)."""
    field = code[format.mantissa : format.mantissa + format.exponent]
    normal = sheet.name("normal", field.any())
    exponent = Cat(field[0] | ~normal, field[1:])
    significand = Cat(code[: format.mantissa], normal)
    special = sheet.name("special", field.all())
    return Real(code[-1], exponent, significand, format.emin - 1, format.emin, format.emax, True), special


def write_ieee(sheet: Sheet, x: Real, format: IeeeFormat) -> Value:
    """Round to the nearest and pack; a subnormal has exponent code 0, and what is too large is infinite."""
    drop = x.width - (format.mantissa + 1)
    significand = x.significand if drop >= 0 else Cat(Const(0, -drop), x.significand)
    kept, dropped = significand[max(drop, 0) :], significand[: max(drop, 0)]
    offset = sheet.name("offset", (x.exponent + (x.origin - format.emin + 1)).as_unsigned())
    field = offset & kept[-1].replicate(len(offset))
    up = increment(sheet, kept, dropped, Rounding("nearest_even"), x.sign)
    code = sheet.name("rounded", Cat(kept[:-1], field) + (Const(0, 1) if up is None else up))
    infinite = sheet.name("infinite", code[format.mantissa :] >= (1 << format.exponent) - 1)
    ones = infinite.replicate(format.exponent)
    exponent = code[format.mantissa : format.mantissa + format.exponent] | ones
    return Cat(code[: format.mantissa] & ~infinite.replicate(format.mantissa), exponent, x.sign)


# --- Fixed point ------------------------------------------------------------------------------------------------------


def to_fixed(sheet: Sheet, x: Real | Fixed, lsb: int) -> Fixed:
    """A number in two's complement down to 2^lsb and, one place below, a sticky bit.

    That is the floor, and whether it is exact. The number's own bits below become the sticky bit.
    """
    if isinstance(x, Fixed):
        if x.lsb >= lsb:
            return Fixed(sheet.name("value", x.value << (x.lsb - lsb + 1)), lsb - 1)
        drop = lsb - x.lsb
        inexact = x.value[:drop].any() if drop < len(x.value) else x.value.any()
        whole = x.value[drop:] if drop < len(x.value) else x.value[-1]
        return Fixed(sheet.name("value", Cat(inexact, whole).as_signed()), lsb - 1)
    magnitude = place_fixed(sheet, x, lsb)
    signs = Cat(magnitude ^ x.sign.replicate(len(magnitude)), x.sign).as_signed()
    return Fixed(sheet.name("value", signs + x.sign, len(magnitude) + 1), lsb - 1)


def place_fixed(sheet: Sheet, x: Real, lsb: int) -> Value:
    """A magnitude down to 2^lsb and, one place below, a sticky bit: shifted right from the place of the largest one."""
    window = max(x.top - lsb + 1, x.width)
    placed = Cat(Const(0, window - x.width), x.significand)
    # The largest exponent is all shifts undone; the distance below it says how many are done.
    distance = sheet.name("distance", ((x.top - x.origin) - x.exponent).as_unsigned(), (x.top - x.origin).bit_length())
    reach = min(len(distance), window.bit_length())
    shifted = shift_out(sheet, placed, distance[:reach])
    if reach < len(distance):
        far = sheet.name("far", distance[reach:].any())
        shifted = Mux(far, Cat(x.significand.any(), Const(0, window)), shifted)
    surplus = window - (x.top - lsb + 1)
    if surplus:
        shifted = Cat(shifted[: surplus + 1].any(), shifted[surplus + 1 :])
    return sheet.name("magnitude", shifted)


def round_to_fixed(sheet: Sheet, x: Real | Fixed, lsb: int, rounding: Rounding) -> Value:
    """The signed whole number of 2^lsb that a number is rounded to.

    A Real is rounded as a magnitude: −(m + 1) is ~m and −m is ~m + 1, so the carry of the rounding and that of two's
    complement are one.
    """
    if isinstance(x, Fixed):
        return round_fixed(sheet, to_fixed(sheet, x, lsb - rounding.kept), rounding)
    drop = rounding.kept + 1
    magnitude = place_fixed(sheet, x, lsb - rounding.kept)
    magnitude = Cat(magnitude, Const(0, max(0, drop + 1 - len(magnitude))))
    kept, dropped = jam(magnitude[drop:], magnitude[:drop], rounding), magnitude[:drop]
    up = increment(sheet, kept, dropped, rounding, x.sign)
    carry = sheet.name("carry", x.sign if up is None else x.sign ^ up)
    return sheet.name("whole", Cat(kept ^ x.sign.replicate(len(kept)), x.sign).as_signed() + carry)


def round_fixed(sheet: Sheet, x: Fixed, rounding: Rounding) -> Value:
    """The signed whole part of a number whose low bits are `rounding.kept` fraction bits and a sticky bit.

    The whole part is the floor: `floor` is to drop bits, `half_up` a carry-in, and of the two neighbours that `odd` may
    take the odd one is the floor with its last bit set. Toward zero goes up from a negative number that is not whole.
    Stochastic rounding is of the magnitude: of a negative number, 1 − f of the fraction f, so up is where R is below
    the fraction, rounded up.
    """
    drop = rounding.kept + 1
    negative = x.value[-1]
    # A number that is always far below one has no whole part yet: its sign is all of it. To odd, it may become 1.
    value = Cat(x.value, negative.replicate(max(0, drop + 2 - len(x.value))))
    fraction, whole = value[:drop], value[drop:].as_signed()
    half, rest = fraction[-1], fraction[:-1].any()
    match rounding.mode:
        case "floor" | "odd":
            return sheet.name("whole", jam(whole, fraction, rounding).as_signed())
        case "toward_zero":
            up = negative & fraction.any()
        case "nearest_even":
            up = half & (rest | whole[0])
        case "nearest_away":
            up = half & (rest | ~negative)
        case "half_up":
            up = half
        case _:
            bits, random = rounding.kept, rounding.random
            assert random is not None
            up = Mux(negative, random < fraction[1:] + fraction[0], (fraction[1:] + random)[bits])
    return sheet.name("whole", whole + sheet.name("round_up", up))


def into_fixed_range(sheet: Sheet, whole: Value, format: FixedFormat) -> Value:
    """The two's-complement code of a whole number of steps: its low bits, or saturated."""
    extra = len(whole) - format.width
    if extra <= 0:
        return Cat(whole, whole[-1].replicate(-extra)) if extra else whole
    code = whole[: format.width]
    if format.overflow == "wrap":
        return code
    top = whole[format.width - 1 :]
    fits = sheet.name("fits", ~top.any() | top.all())
    limit = Cat((~whole[-1]).replicate(format.width - 1), whole[-1])
    return sheet.name("saturated", Mux(fits, code, limit))
