"""Vectors of float32 or float64 lanes: the small expression layer that the arithmetic of a step is written on.

An operation is one instruction where the target has it and LLVM's own lowering elsewhere. Integer views of a vector are
explicit (`bits`, `from_bits`), since rounding is arithmetic on bit patterns.
"""

from __future__ import annotations

import struct

from llvmlite import ir

from fmaq.kernels.control import ROUNDINGS, control_bits
from fmaq.kernels.ir_blocks import F32, F64, I1, I32, I64, POINTER, Value
from fmaq.kernels.targets import Target
from fmaq.numerics import random

# How a processor whose instructions do not say how they round adds, between two settings of its control register: one
# instruction that sets it, s += t, s += t·lift, and the kind of register.
SWITCHED = {
    "avx2": ("vldmxcsr (${})", "vaddps ${1}, ${0}, ${0}", "vfmadd231ps ${2}, ${1}, ${0}", "x"),
    "sse2": ("ldmxcsr (${})", "addps ${1}, ${0}", "", "x"),
    "neon": ("msr FPCR, ${}", "fadd ${0}.4s, ${0}.4s, ${1}.4s", "fmla ${0}.4s, ${1}.4s, ${2}.4s", "w"),
}
SWITCHED_AT_ONCE = 6  # sums, so that they and their terms fit in 16 registers


class Lanes:
    """Builds vector instructions of one element type on a target.

    Args:
        rounding, flushes: what the processor is set to meanwhile, where `added` is called.
    """

    def __init__(
        self,
        builder: ir.IRBuilder,
        target: Target,
        element_bytes: int,
        rounding: str = "nearest",
        flushes: bool = False,
    ) -> None:
        self.b = builder
        self.target = target
        self.rounding = rounding
        self.flushes = flushes
        self.is_double = element_bytes == 8
        self.count = target.lanes(element_bytes)
        self.element = F64 if self.is_double else F32
        self.integer = I64 if self.is_double else I32
        self.mantissa = 52 if self.is_double else 23
        self.vector = ir.VectorType(self.element, self.count)
        self.bit_vector = ir.VectorType(self.integer, self.count)
        self.words = ir.VectorType(I32, self.count)
        self.mask = ir.VectorType(I1, self.count)

    # Constants and memory; operands are always float32 in memory.

    def constant(self, value: float) -> Value:
        """The same number in every lane."""
        if not self.is_double:
            value = struct.unpack("f", struct.pack("f", value))[0]
        return ir.Constant(self.vector, [ir.Constant(self.element, value)] * self.count)

    def bit_constant(self, value: int) -> Value:
        """The same bit pattern in every lane."""
        return ir.Constant(self.bit_vector, [ir.Constant(self.integer, value)] * self.count)

    def splat(self, scalar: Value) -> Value:
        """A scalar in every lane."""
        single = ir.VectorType(scalar.type, self.count)
        first = self.b.insert_element(ir.Constant(single, ir.Undefined), scalar, ir.Constant(I32, 0))
        zeros = ir.Constant(ir.VectorType(I32, self.count), [0] * self.count)
        return self.b.shuffle_vector(first, ir.Constant(single, ir.Undefined), zeros)

    def load(self, pointer: Value) -> Value:
        """`count` neighbouring float32 from memory."""
        value = self.b.load(pointer, typ=ir.VectorType(F32, self.count), align=4)
        return self.b.fpext(value, self.vector) if self.is_double else value

    def load_splat(self, pointer: Value) -> Value:
        """One float32 from memory, in every lane."""
        value = self.b.load(pointer, typ=F32, align=4)
        return self.splat(self.b.fpext(value, F64) if self.is_double else value)

    def store(self, value: Value, pointer: Value) -> None:
        """`count` neighbouring float32 to memory, rounded to the nearest where they are wider."""
        self.b.store(
            self.b.fptrunc(value, ir.VectorType(F32, self.count)) if self.is_double else value, pointer, align=4
        )

    def prefetch(self, pointer: Value) -> None:
        """Have memory that will be read in all caches; it need not be there."""
        function = self.declare("llvm.prefetch.p0", ir.VoidType(), [POINTER, I32, I32, I32])
        self.b.call(function, [pointer, I32(0), I32(3), I32(1)])

    # Arithmetic, in the processor's current rounding mode.

    def add(self, x: Value, y: Value) -> Value:
        """x + y."""
        return self.b.fadd(x, y)

    def sub(self, x: Value, y: Value) -> Value:
        """x − y."""
        return self.b.fsub(x, y)

    def mul(self, x: Value, y: Value) -> Value:
        """x·y."""
        return self.b.fmul(x, y)

    def fma(self, x: Value, y: Value, z: Value) -> Value:
        """x·y + z, rounded once."""
        return self._call("llvm.fma", x, y, z)

    def added(self, rounding: str, terms: list[Value], sums: list[Value], lift: float | Value = 1.0) -> list[Value]:
        """term·lift + sum of float32 lanes, rounded once, however the processor rounds.

        Args:
            rounding: one of `control.ROUNDINGS`; "odd": to the one of both neighbours whose last bit is 1, unless it
                is exact, which makes any rounding to 22 bits or less that follows right; "own": the processor's.
            lift: a power of two, or any numbers where the target has a fused multiply-add; 1 adds alone.
        """
        lift = self.constant(lift) if isinstance(lift, float) and lift != 1.0 else lift
        if lift != 1.0 and not self.target.fused:
            terms, lift = [self.mul(term, lift) for term in terms], 1.0
        if rounding == "odd":
            pairs = (self.added(direction, terms, sums, lift) for direction in ("down", "up"))
            return [self._odd_one(*pair) for pair in zip(*pairs, strict=True)]
        if rounding in ("own", self.rounding):
            if lift == 1.0:
                return [self.add(*pair) for pair in zip(sums, terms, strict=True)]
            return [self.fma(term, lift, total) for term, total in zip(terms, sums, strict=True)]
        if self.target.name == "avx512":
            return [self._embedded(rounding, *pair, lift) for pair in zip(terms, sums, strict=True)]
        found = []
        for first in range(0, len(terms), SWITCHED_AT_ONCE):
            of = slice(first, first + SWITCHED_AT_ONCE)
            found += self._switched(rounding, terms[of], sums[of], lift)
        return found

    def _odd_one(self, down: Value, up: Value) -> Value:
        is_odd = self.b.trunc(self.bits(down), self.mask)
        return self.b.select(is_odd, down, up)

    def _embedded(self, rounding: str, term: Value, total: Value, lift: float | Value) -> Value:
        """AVX-512's instructions say how they round."""
        code = I32(8 | ROUNDINGS.index(rounding))
        if lift == 1.0:
            add = self.declare("llvm.x86.avx512.add.ps.512", self.vector, [self.vector, self.vector, I32])
            return self.b.call(add, [term, total, code])
        fma = self.declare("llvm.x86.avx512.vfmadd.ps.512", self.vector, [*[self.vector] * 3, I32])
        return self.b.call(fma, [term, lift, total, code])

    def _switched(self, rounding: str, terms: list[Value], sums: list[Value], lift: float | Value) -> list[Value]:
        """The processor is set to another rounding and back around all of the additions, in one piece of assembly."""
        count, is_x86 = len(terms), self.target.control == "mxcsr"
        words = [control_bits(self.target, how, self.flushes) for how in (rounding, self.rounding)]
        registers = [self._in_memory(f"mxcsr{word}", I32(word)) if is_x86 else I64(word) for word in words]
        vectors = [*sums, *terms, terms[0] if lift == 1.0 else lift]
        set_control, add, fma, kind = SWITCHED[self.target.name]
        # Operands: results, then sums, which are the same registers, terms, the power of two, control registers.
        lines = [(add if lift == 1.0 else fma).format(i, 2 * count + i, 3 * count) for i in range(count)]
        first, last = (set_control.format(3 * count + 1 + i) for i in range(2))
        constraints = [*[f"={kind}"] * count, *map(str, range(count)), *[kind] * (count + 1), "r", "r"]
        result = ir.LiteralStructType([self.vector] * count) if count > 1 else self.vector
        operands = [*vectors, *registers]
        signature = ir.FunctionType(result, [value.type for value in operands])
        found = self.b.asm(signature, "\\0A".join([first, *lines, last]), ",".join(constraints), operands, False)
        return [self.b.extract_value(found, i) for i in range(count)] if count > 1 else [found]

    def magnitude(self, x: Value) -> Value:
        """|x|."""
        return self._call("llvm.fabs", x)

    def clamp(self, x: Value, low: float, high: float) -> Value:
        """x limited to low … high."""
        if low == -high and self.target.name == "avx512":
            return self._range(x, high)
        limit = self.constant(high)
        x = self.b.select(self.b.fcmp_ordered("<", x, limit), x, limit)
        limit = self.constant(low)
        return self.b.select(self.b.fcmp_ordered(">", x, limit), x, limit)

    def _range(self, x: Value, limit: float) -> Value:
        """AVX-512's VRANGE: the smaller magnitude with the sign of x (immediate 2)."""
        suffix = "pd" if self.is_double else "ps"
        every = ir.IntType(self.count)
        types = [self.vector, self.vector, I32, self.vector, every, I32]
        function = self.declare(f"llvm.x86.avx512.mask.range.{suffix}.512", self.vector, types)
        current_rounding = 4
        arguments = [x, self.constant(limit), I32(2), x, every(2**self.count - 1), I32(current_rounding)]
        return self.b.call(function, arguments)

    def zero_below(self, x: Value, tiny: float) -> Value:
        """0 where |x| < tiny, x elsewhere."""
        below = self.b.fcmp_ordered("<", self.magnitude(x), self.constant(tiny))
        return self.b.select(below, self.constant(0.0), x)

    def trunc(self, x: Value) -> Value:
        """To an integer toward zero."""
        return self._call("llvm.trunc", x)

    def floor(self, x: Value) -> Value:
        """To an integer downward."""
        return self._call("llvm.floor", x)

    def round_even(self, x: Value) -> Value:
        """To the nearest integer, ties to even."""
        return self._call("llvm.roundeven", x)

    def copy_sign(self, x: Value, sign: Value) -> Value:
        """|x| with the sign of another."""
        return self._call("llvm.copysign", x, sign)

    # Bit patterns.

    def bits(self, x: Value) -> Value:
        """The lanes' bit patterns."""
        return self.b.bitcast(x, self.bit_vector)

    def from_bits(self, x: Value) -> Value:
        """Lanes from their bit patterns."""
        return self.b.bitcast(x, self.vector)

    def sign_bits(self, x: Value) -> Value:
        """All bits set where the sign is, none elsewhere: −1 or 0."""
        return self.b.ashr(self.bits(x), self.bit_constant(self.integer.width - 1))

    def increment(self, integers: Value, mask: Value) -> Value:
        """Integers of the lanes' width, one more where the mask is set."""
        if self.target.name != "avx512":
            return self.b.sub(integers, self.b.sext(mask, self.bit_vector))
        # One instruction, of which LLVM would make two.
        of_mask, suffix = ir.IntType(max(8, self.count)), "q" if self.is_double else "d"
        types = [self.bit_vector, self.bit_vector, of_mask]
        code = f"vpsub{suffix} $2, $0, $0 {{$3}}"
        minus_one = self.bit_constant(-1)
        operands = [integers, minus_one, self.b.bitcast(mask, of_mask)]
        return self.b.asm(ir.FunctionType(self.bit_vector, types), code, "=v,0,v,^Yk", operands, False)

    def total(self, integers: Value) -> Value:
        """The sum over the lanes of unsigned integers, as an int64."""
        longs = ir.VectorType(I64, self.count)
        add = self.declare(f"llvm.vector.reduce.add.v{self.count}i64", I64, [longs])
        return self.b.call(add, [integers if self.is_double else self.b.zext(integers, longs)])

    def leading_bit(self, x: Value) -> Value:
        """x without its mantissa."""
        return self.keep_bits(x, self.mantissa)

    def keep_bits(self, x: Value, dropped: int) -> Value:
        """x without its lowest bits."""
        if dropped == 0:
            return x
        mask = self.bit_constant(-1 << dropped)
        if self.target.name == "avx2":
            mask = self._from_memory(f"mask{dropped}", mask)
        return self.from_bits(self.b.and_(self.bits(x), mask))

    def _from_memory(self, name: str, value: Value) -> Value:
        """A constant that LLVM cannot see through: of an AND with one it makes a blend, which has a single port."""
        return self.b.load(self._in_memory(name, value), typ=value.type)

    def _in_memory(self, name: str, value: Value) -> Value:
        """The address of a number that the module has once."""
        place = self.b.module.globals.get(name)
        if place is None:
            place = ir.GlobalVariable(self.b.module, value.type, name)
            place.initializer = value
        return place

    # Random words (see numerics.random).

    def word(self, value: int) -> Value:
        """A 32-bit word in every lane."""
        return ir.Constant(self.words, [ir.Constant(I32, value)] * self.count)

    def mix(self, x: Value) -> Value:
        """`numerics.random.mix`."""
        x = self.b.mul(self.b.xor(x, self.b.lshr(x, self.word(16))), self.word(random.MULTIPLIER_1))
        x = self.b.mul(self.b.xor(x, self.b.lshr(x, self.word(15))), self.word(random.MULTIPLIER_2))
        return self.b.xor(x, self.b.lshr(x, self.word(16)))

    def widen(self, words: Value) -> Value:
        """Words as integers of the lanes' width."""
        return self.b.zext(words, self.bit_vector) if self.is_double else words

    def _call(self, name: str, *arguments: Value) -> Value:
        suffix = f"v{self.count}{'f64' if self.is_double else 'f32'}"
        function = self.declare(f"{name}.{suffix}", self.vector, [self.vector] * len(arguments))
        return self.b.call(function, arguments)

    def declare(self, name: str, result: ir.Type, arguments: list[ir.Type]) -> ir.Function:
        """An intrinsic function of LLVM's, declared once in the module."""
        module = self.b.module
        return module.globals.get(name) or ir.Function(module, ir.FunctionType(result, arguments), name)
