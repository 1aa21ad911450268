"""The processor's floating-point control register: rounding direction and flushing, set around kernels and restored."""

from __future__ import annotations

from llvmlite import ir

from fmaq.kernels.ir_blocks import I32, I64, POINTER
from fmaq.kernels.targets import Target

ROUNDINGS = ("nearest", "down", "up", "zero")

# x86 MXCSR: exceptions masked; rounding; flush results to zero and take subnormal operands as zero.
MXCSR_DEFAULT = 0x1F80
MXCSR_ROUNDING = {name: code << 13 for code, name in enumerate(ROUNDINGS)}
MXCSR_FLUSH = 0x8000 | 0x0040
# AArch64 FPCR: FZ flushes operands and results.
FPCR_ROUNDING = {name: code << 22 for code, name in enumerate(("nearest", "up", "down", "zero"))}
FPCR_FLUSH = 1 << 24


def control_bits(target: Target, rounding: str, flushes: bool) -> int:
    """The control register that rounds so, and flushes subnormal numbers or not."""
    if target.control == "mxcsr":
        return MXCSR_DEFAULT | MXCSR_ROUNDING[rounding] | (MXCSR_FLUSH if flushes else 0)
    return FPCR_ROUNDING[rounding] | (FPCR_FLUSH if flushes else 0)


class FloatControl:
    """Remembers the caller's control register where it is made, in the function that `builder` is in."""

    def __init__(self, builder: ir.IRBuilder, target: Target) -> None:
        self.b = builder
        self.target = target
        self.is_x86 = target.control == "mxcsr"
        if self.is_x86:
            self.slot = builder.alloca(I32)
            self.callers = builder.alloca(I32)
            builder.call(self._intrinsic("llvm.x86.sse.stmxcsr", ir.VoidType(), [POINTER]), [self.callers])
        else:
            self.callers = builder.call(self._intrinsic("llvm.aarch64.get.fpcr", I64, []), [])

    def set(self, toward_zero: bool = False, flushes: bool = False) -> None:
        """Round to the nearest or toward zero, and flush subnormal numbers or not."""
        bits = control_bits(self.target, "zero" if toward_zero else "nearest", flushes)
        if self.is_x86:
            self.b.store(ir.Constant(I32, bits), self.slot)
            self._load(self.slot)
        else:
            self._set_fpcr(ir.Constant(I64, bits))

    def restore(self) -> None:
        """To what the caller had."""
        if self.is_x86:
            self._load(self.callers)
        else:
            self._set_fpcr(self.callers)

    def _load(self, slot: ir.Value) -> None:
        self.b.call(self._intrinsic("llvm.x86.sse.ldmxcsr", ir.VoidType(), [POINTER]), [slot])

    def _set_fpcr(self, value: ir.Value) -> None:
        self.b.call(self._intrinsic("llvm.aarch64.set.fpcr", ir.VoidType(), [I64]), [value])

    def _intrinsic(self, name: str, result: ir.Type, arguments: list[ir.Type]) -> ir.Function:
        module = self.b.module
        return module.globals.get(name) or ir.Function(module, ir.FunctionType(result, arguments), name)
