"""Vectors of float32 or float64 lanes: the small expression layer that the arithmetic of a step is written on.

An operation is one instruction where the target has it and LLVM's own lowering elsewhere. Integer views of a vector are
explicit (`bits`, `from_bits`), since rounding is arithmetic on bit patterns.
"""

from __future__ import annotations

import struct

from llvmlite import ir

from fmaq.kernels.ir_blocks import F32, F64, I1, I32, I64, Value
from fmaq.kernels.targets import Target
from fmaq.numerics import random


class Lanes:
    """Builds vector instructions of one element type on a target."""

    def __init__(self, builder: ir.IRBuilder, target: Target, element_bytes: int) -> None:
        self.b = builder
        self.target = target
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

    def add_to_nearest(self, x: Value, y: Value) -> Value:
        """x + y of float32 lanes to the nearest, ties to even, however the processor rounds.

        Elsewhere than on AVX-512, in float64 lanes: only a sum of terms more than 53 places apart is not exact there,
        and it lies next to the larger one, which float32 holds.
        """
        if self.target.name == "avx512":
            add = self.declare("llvm.x86.avx512.add.ps.512", self.vector, [self.vector, self.vector, I32])
            to_nearest_without_exceptions = 8
            return self.b.call(add, [x, y, I32(to_nearest_without_exceptions)])
        wide, words = ir.VectorType(F64, self.count), ir.VectorType(I64, self.count)

        def word(value: int) -> Value:
            return ir.Constant(words, [ir.Constant(I64, value)] * self.count)

        dropped = 52 - 23
        bits = self.b.bitcast(self.b.fadd(self.b.fpext(x, wide), self.b.fpext(y, wide)), words)
        last = self.b.and_(self.b.lshr(bits, word(dropped)), word(1))
        rounded = self.b.and_(self.b.add(self.b.add(bits, word((1 << (dropped - 1)) - 1)), last), word(-1 << dropped))
        return self.b.fptrunc(self.b.bitcast(rounded, wide), self.vector)

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
        place = self.b.module.globals.get(name)
        if place is None:
            place = ir.GlobalVariable(self.b.module, value.type, name)
            place.initializer = value
        return self.b.load(place, typ=value.type)

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
