"""From a module of LLVM's to callable machine code, without a compiler on the machine; kept on disk (`code_cache`)."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
from llvmlite import ir

from fmaq.kernels import code_cache
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


def _machine(target: Target) -> llvm.TargetMachine:
    """What writes code for a target."""
    _initialize()
    return llvm.Target.from_triple(_triple(target)).create_target_machine(cpu=target.cpu, opt=3, jit=True)


def optimize(text: str, machine: llvm.TargetMachine) -> llvm.ModuleRef:
    """A module, optimized.

    LLVM neither vectorizes nor unrolls: loops are written as vectors, and a step keeps the machine's units busy.
    """
    parsed = llvm.parse_assembly(text)
    parsed.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    options.loop_interleaving = False
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(parsed, builder)
    return parsed


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
    machine = _machine(target)
    module.triple = _triple(target)
    text = str(module)
    key = code_cache.key_of(_versions(), target.cpu.encode(), text.encode())
    code = code_cache.find(key)
    if code is None:
        code = machine.emit_object(optimize(text, machine))
        code_cache.keep(key, code)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return Compiled(engine)


@functools.cache
def _versions() -> bytes:
    """Of LLVM, and of this file, which says how it is used."""
    return repr((llvmlite.__version__, llvm.llvm_version_info)).encode() + Path(__file__).read_bytes()


def assembly(module: ir.Module, target: Target) -> str:
    """A module's assembly text for a target, which this machine need not run."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = _machine(target)
    module.triple = _triple(target)
    return str(machine.emit_assembly(optimize(str(module), machine)))
