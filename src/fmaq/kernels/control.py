"""The processor's floating-point control register: rounding direction and flushing, set around kernels and restored."""

from __future__ import annotations

from llvmlite import ir

from fmaq.kernels.ir_blocks import I32, I64, POINTER
from fmaq.kernels.targets import Target

# x86 MXCSR: exceptions masked; rounding toward zero; flush results to zero and take subnormal operands as zero.
MXCSR_DEFAULT = 0x1F80
MXCSR_TOWARD_ZERO = 0x6000
MXCSR_FLUSH = 0x8000 | 0x0040
# AArch64 FPCR: rounding mode 3 is toward zero; FZ flushes operands and results.
FPCR_DEFAULT = 0
FPCR_TOWARD_ZERO = 3 << 22
FPCR_FLUSH = 1 << 24


class FloatControl:
    """Remembers the caller's control register where it is made, in the function that `builder` is in."""

    def __init__(self, builder: ir.IRBuilder, target: Target) -> None:
        self.b = builder
        self.is_x86 = target.control == "mxcsr"
        if self.is_x86:
            self.slot = builder.alloca(I32)
            self.callers = builder.alloca(I32)
            builder.call(self._intrinsic("llvm.x86.sse.stmxcsr", ir.VoidType(), [POINTER]), [self.callers])
        else:
            self.callers = builder.call(self._intrinsic("llvm.aarch64.get.fpcr", I64, []), [])

    def set(self, toward_zero: bool = False, flushes: bool = False) -> None:
        """Round to the nearest or toward zero, and flush subnormal numbers or not."""
        if self.is_x86:
            bits = MXCSR_DEFAULT | (MXCSR_TOWARD_ZERO if toward_zero else 0) | (MXCSR_FLUSH if flushes else 0)
            self.b.store(ir.Constant(I32, bits), self.slot)
            self._load(self.slot)
        else:
            bits = FPCR_DEFAULT | (FPCR_TOWARD_ZERO if toward_zero else 0) | (FPCR_FLUSH if flushes else 0)
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
