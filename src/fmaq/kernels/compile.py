"""From a module of LLVM's to callable machine code, in this process, without a compiler on the machine."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

from fmaq.kernels.targets import Target


@functools.cache
def _initialize() -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.initialize_native_asmparser()  # reads `Lanes.added`


def _triple(target: Target) -> str:
    default = llvm.get_default_triple()
    if default.split("-")[0] == target.architecture:
        return default
    return f"{target.architecture}-unknown-linux-gnu"


def optimize(module: ir.Module, target: Target) -> tuple[llvm.ModuleRef, llvm.TargetMachine]:
    """The module, optimized for a target, and the machine that writes its code.

    LLVM neither vectorizes nor unrolls: loops are written as vectors, and a step keeps the machine's units busy.
    """
    _initialize()
    module.triple = _triple(target)
    machine = llvm.Target.from_triple(module.triple).create_target_machine(cpu=target.cpu, opt=3, jit=True)
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    options.loop_interleaving = False
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(parsed, builder)
    return parsed, machine


@dataclass(frozen=True)
class Compiled:
    """Machine code in this process, while this object lives."""

    engine: llvm.ExecutionEngine

    def address(self, name: str) -> int:
        """Where a function's code is."""
        return int(self.engine.get_function_address(name))

    def function(self, name: str, *arguments: Any) -> Any:
        """A function, that returns nothing, as a callable of ctypes; calls release the interpreter lock."""
        return ctypes.CFUNCTYPE(None, *arguments)(self.address(name))


def compile_module(module: ir.Module, target: Target) -> Compiled:
    """A module's machine code."""
    optimized, machine = optimize(module, target)
    engine = llvm.create_mcjit_compiler(optimized, machine)
    engine.finalize_object()
    return Compiled(engine)


def assembly(module: ir.Module, target: Target) -> str:
    """A module's assembly text for a target, which this machine need not run."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    optimized, machine = optimize(module, target)
    return machine.emit_assembly(optimized)
