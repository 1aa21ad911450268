"""Machine code on disk: found by other processes, never wrong, and not needed."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
from llvmlite import ir

import fmaq.kernels.compile as compiling
from fmaq.kernels import code_cache, current_target
from fmaq.kernels.code_cache import PART, find, keep, key_of, prune
from fmaq.kernels.compile import compile_module

PRODUCT = "import torch, fmaq; print(fmaq.matmul(torch.full((3, 7), 1.7), torch.full((7, 5), 0.3), 'M5E4b8').tolist())"


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FMAQ_CACHE", str(tmp_path))
    return tmp_path / PART


def module(number: int) -> ir.Module:
    """`store(pointer)` writes a number."""
    found = ir.Module("numbers")
    function = ir.Function(found, ir.FunctionType(ir.VoidType(), [ir.PointerType()]), "store")
    b = ir.IRBuilder(function.append_basic_block("entry"))
    b.store(ir.Constant(ir.IntType(32), number), function.args[0])
    b.ret_void()
    return found


def stored(number: int) -> int:
    place, compiled = ctypes.c_int32(0), compile_module(module(number), current_target())
    compiled.function("store", ctypes.c_void_p)(ctypes.addressof(place))
    return place.value


def test_a_module_is_compiled_once(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    optimize = compiling.optimize
    monkeypatch.setattr(compiling, "optimize", lambda text, machine: compiled.append(text) or optimize(text, machine))
    assert [stored(7), stored(8), stored(7), stored(8)] == [7, 8, 7, 8]
    assert len(compiled) == 2 and len(list(empty.iterdir())) == 2


def test_another_process_finds_it(empty: Path) -> None:
    def run() -> tuple[str, set[str]]:
        done = subprocess.run([sys.executable, "-c", PRODUCT], capture_output=True, text=True, check=True)
        return done.stdout, {path.name for path in empty.iterdir()}

    first, second = run(), run()
    assert first == second and len(first[1]) > 1 and not any(name.startswith(".") for name in first[1])


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 4000])
def test_a_spoilt_file_is_compiled_anew(empty: Path, content: bytes) -> None:
    assert stored(9) == 9
    (path,) = empty.iterdir()
    good = path.read_bytes()
    path.write_bytes(content)
    assert stored(9) == 9 and path.read_bytes() == good


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("no folder")
    monkeypatch.setenv("FMAQ_CACHE", str(file))
    assert stored(10) == 10 and file.read_text() == "no folder"


def test_what_code_depends_on_is_in_its_name() -> None:
    names = {key_of(b"a", b"bc"), key_of(b"ab", b"c"), key_of(b"abc"), key_of(b"a", b"bd")}
    assert len(names) == 4
    assert Path(compiling.__file__).read_bytes() in compiling._versions()


def test_what_was_used_longest_ago_goes(empty: Path) -> None:
    keys = [key_of(bytes([n])) for n in range(6)]
    for age, key in enumerate(keys):
        keep(key, bytes(100))
        os.utime(empty / key, (1e9 + age, 1e9 + age))
    prune(empty, limit=1000)
    assert len(list(empty.iterdir())) == 6
    assert find(keys[0]) == bytes(100)  # and is now the one used last
    prune(empty, limit=600)
    assert {path.name for path in empty.iterdir()} == {keys[0], keys[5]}


def test_files_are_counted_now_and_then(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned: list[Path] = []
    monkeypatch.setattr(code_cache, "prune", pruned.append)
    for n in range(2 * code_cache.SELDOM):
        keep(f"{n:064x}", b"code")
    assert pruned == [empty, empty]
