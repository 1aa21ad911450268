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


def _triple(target: Target) -> str:
    default = llvm.get_default_triple()
    if default.split("-")[0] == target.architecture:
        return default
    return f"{target.architecture}-unknown-linux-gnu"


def optimize(module: ir.Module, target: Target) -> tuple[llvm.ModuleRef, llvm.TargetMachine]:
    """The module, optimized for a target, and the machine that writes its code.

    Loops are neither vectorized nor unrolled by LLVM: they are written as vectors, and a step fills the machine's units.
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
    """A function's machine code; `engine` keeps it alive."""

    function: Any
    engine: llvm.ExecutionEngine


def compile_function(module: ir.Module, name: str, arguments: tuple[Any, ...], target: Target) -> Compiled:
    """A module's function as a callable of ctypes; calls release Python's interpreter lock.

    Args:
        arguments: the ctypes of the function's arguments; it returns nothing.
    """
    optimized, machine = optimize(module, target)
    engine = llvm.create_mcjit_compiler(optimized, machine)
    engine.finalize_object()
    prototype = ctypes.CFUNCTYPE(None, *arguments)
    return Compiled(prototype(engine.get_function_address(name)), engine)


def assembly(module: ir.Module, target: Target) -> str:
    """A module's assembly text for a target, which this machine need not run."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    optimized, machine = optimize(module, target)
    return machine.emit_assembly(optimized)
