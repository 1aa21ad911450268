"""What kernels leave as they found it, and when they are compiled: control register, threads, forks, caches."""

import ctypes
import multiprocessing
import platform
import subprocess
import sys
import threading
from unittest.mock import patch

import llvmlite.binding as llvm
import numpy as np
import pytest
import torch

from fmaq.kernels import Geometry, available_targets, conv, matmul, products, use_target
from fmaq.numerics import Accumulator, reference

EXCEPTION_FLAGS = 0x3F  # of MXCSR: which exceptions happened, not how to compute
FLUSH_TO_ZERO, SUBNORMALS_ARE_ZERO, ROUND_TOWARD_ZERO = 0x8000, 0x0040, 0x6000
ACCESS = """
declare void @llvm.x86.sse.stmxcsr(ptr)
declare void @llvm.x86.sse.ldmxcsr(ptr)
define void @read(ptr %p) {
  call void @llvm.x86.sse.stmxcsr(ptr %p)
  ret void
}
define void @write(ptr %p) {
  call void @llvm.x86.sse.ldmxcsr(ptr %p)
  ret void
}
"""
on_x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="reads the control register of x86")


class ControlRegister:
    """This thread's MXCSR."""

    def __init__(self) -> None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_default_triple().create_target_machine()
        self.engine = llvm.create_mcjit_compiler(llvm.parse_assembly(ACCESS), machine)
        self.engine.finalize_object()
        access = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        self._read, self._write = (access(self.engine.get_function_address(name)) for name in ("read", "write"))

    def read(self) -> int:
        """All but the flags of exceptions that happened."""
        value = ctypes.c_uint32()
        self._read(ctypes.byref(value))
        return value.value & ~EXCEPTION_FLAGS

    def write(self, value: int) -> None:
        self._write(ctypes.byref(ctypes.c_uint32(value)))


@pytest.fixture
def register():
    register = ControlRegister()
    before = register.read()
    yield register
    register.write(before)


ACCUMULATORS = (
    "paper12",
    "M7E4b10 rounding=nearest_even",
    "M23E7b100 chunk=None",
    "M20E7b100 product=M23E7b0",
    "I16f4w",
)


def tiny_and_usual() -> tuple[torch.Tensor, torch.Tensor]:
    """Operands of which some are subnormal and have products that are not."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(0, 1, (1, 20, 18)), rng.normal(0, 1, (1, 18, 33))
    a[:, :, ::3] *= 2.0**-130
    b[:, ::3] *= 2.0**120
    return torch.from_numpy(a.astype(np.float32)), torch.from_numpy(b.astype(np.float32))


@on_x86
@pytest.mark.parametrize("target", [t.name for t in available_targets()])
@pytest.mark.parametrize("extra", [0, FLUSH_TO_ZERO | SUBNORMALS_ARE_ZERO])
@pytest.mark.parametrize("name", ACCUMULATORS)
def test_the_callers_control_register_is_restored_and_does_not_matter(register, target, extra, name):
    acc = Accumulator(name)
    a, b = tiny_and_usual()
    wanted = reference.matmul(a[0].numpy(), b[0].numpy(), acc).astype(np.float32)
    value = register.read() | extra
    with use_target(target), patch.object(products, "SMALL", 0):
        register.write(value)
        found = matmul(a, b, acc)
        after = register.read()
        register.write(value & ~extra)
    assert after == value
    np.testing.assert_array_equal(found[0].numpy(), wanted)


@on_x86
@pytest.mark.parametrize("target", [t.name for t in available_targets()])
def test_the_callers_rounding_is_restored(register, target):
    """Python itself cannot compute when rounding toward zero, so the kernel is there already."""
    a, b = tiny_and_usual()
    value = register.read() | ROUND_TOWARD_ZERO
    with use_target(target):
        matmul(a, b, Accumulator.paper12)
        register.write(value)
        matmul(a, b, Accumulator.paper12)
        after = register.read()
        register.write(value & ~ROUND_TOWARD_ZERO)
    assert after == value


@on_x86
def test_torch_may_flush_subnormals(register):
    """Operands that are all subnormal, under `torch.set_flush_denormal(True)`."""
    acc = Accumulator("M7E7b64", product=None)
    a, b = torch.full((1, 2, 3), 2.0**-140), torch.full((1, 3, 4), 2.0**127)
    assert torch.set_flush_denormal(True)
    try:
        found = matmul(a, b, acc)
        image = conv(a, b[:, :, :1].mT.contiguous()[:, :2].expand(1, 2, 3), acc, Geometry((1,), (0,), (1,)))
        still_flushes = register.read() & FLUSH_TO_ZERO
    finally:
        torch.set_flush_denormal(False)
    assert still_flushes
    assert torch.equal(found, torch.full((1, 2, 4), 3 * 2.0**-13))
    assert torch.equal(image, torch.full((1, 1, 1), 6 * 2.0**-13))


def a_product() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Operands that two threads share, and their product."""
    rng = np.random.default_rng(8)
    a, b = (torch.from_numpy(rng.normal(0, 1, s).astype(np.float32)) for s in ((1, 70, 40), (1, 40, 75)))
    wanted = reference.matmul(a[0].numpy(), b[0].numpy(), Accumulator.paper12).astype(np.float32)
    return a, b, torch.from_numpy(wanted)[None]


def _in_child(a, b, wanted, answers) -> None:
    answers.put(torch.equal(matmul(a, b, Accumulator.paper12), wanted))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_computes_after_its_parent_used_the_pool():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        a, b, wanted = a_product()
        with patch.object(products, "SMALL", 0):
            assert torch.equal(matmul(a, b, Accumulator.paper12), wanted)
            context = multiprocessing.get_context("fork")
            answers = context.SimpleQueue()
            child = context.Process(target=_in_child, args=(a, b, wanted, answers), daemon=True)
            child.start()
            child.join(60)
        assert child.exitcode == 0
        assert answers.get()
    finally:
        torch.set_num_threads(before)


def test_concurrent_calls_of_several_threads():
    """First uses of kernels, and different ones, at the same time, each with the pool."""
    names = [f"M{mantissa}E5b{12 + mantissa} product=M7E5b14 chunk=7" for mantissa in (5, 6, 7)]
    rng = np.random.default_rng(4)
    a, b = (torch.from_numpy(rng.normal(0, 1, s).astype(np.float32)) for s in ((1, 37, 30), (1, 30, 41)))
    wanted = {n: reference.matmul(a[0].numpy(), b[0].numpy(), Accumulator(n)).astype(np.float32) for n in names}
    start, found, before = threading.Barrier(6), [], torch.get_num_threads()

    def work(name: str) -> None:
        start.wait()
        for _ in range(20):
            found.append((name, matmul(a, b, Accumulator(name))[0].numpy()))

    torch.set_num_threads(2)
    try:
        with patch.object(products, "SMALL", 0):
            threads = [threading.Thread(target=work, args=(name,)) for name in names * 2]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        torch.set_num_threads(before)
    assert len(found) == 120
    for name, product in found:
        np.testing.assert_array_equal(product, wanted[name])


@pytest.mark.parametrize("name", ["M5E5b13 product=M6E5b16 chunk=9", "M5E5b13 chunk=9 rounding=stochastic"])
def test_a_kernel_is_compiled_once(name):
    a, b, _ = a_product()
    first = matmul(a, b, Accumulator(name))
    with patch.object(products, "compile_module", side_effect=AssertionError("compiled again")):
        assert torch.equal(matmul(a, b, Accumulator(name)), first)
        assert matmul(a[:, :50].contiguous(), b, Accumulator(name)).shape == (1, 50, 75)


def test_a_seed_compiles_nothing():
    """Training draws with another seed at every step: it is no part of a kernel."""
    a, b, _ = a_product()
    acc = Accumulator("M4E5b13", chunk=9, rounding="stochastic", seed=1)
    first = matmul(a, b, acc)
    with patch.object(products, "compile_module", side_effect=AssertionError("compiled for a seed")):
        other = matmul(a, b, Accumulator("M4E5b13", chunk=9, rounding="stochastic", seed=2**64 - 1))
    assert not torch.equal(first, other)


def _run_python(program: str) -> str:
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    return run.stdout.strip()


def test_import_compiles_nothing():
    assert _run_python("import sys, fmaq; print('llvmlite' in sys.modules)") == "False"
    program = "from unittest.mock import patch; import llvmlite.binding as l\n"
    program += "with patch.object(l, 'parse_assembly', side_effect=AssertionError): import fmaq.kernels\n"
    assert _run_python(program + "print('imported')") == "imported"
