"""A self-checking test bench to take away: Verilog, its stimulus, and what must come out, for any simulator.

It says PASS, or ends in `$fatal` with the number of codes that differ from `fmaq.numerics.reference`. A zero has
several codes, so each expected code comes with a mask of the bits that count.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fmaq.hardware import synthesis
from fmaq.hardware.cost import check_part, sharing
from fmaq.hardware.unit import IeeeFormat, RegisterFormat, Unit, Values, dot_products, register_bits
from fmaq.hardware.vectors import Vectors, random, vectors_for
from fmaq.hardware.verilog import check_name, verilog
from fmaq.numerics import FixedFormat

Codes = NDArray[np.int64]

STEPS = 37
"""Steps of a dot product in the bench of a multiply-accumulate: no multiple of a usual chunk."""
IDLE = 0.1
"""Share of the cycles in which no operand comes."""


def testbench(
    unit: Unit, part: str = "unit", name: str = synthesis.TOP, count: int = 10_000, seed: int = 0
) -> dict[str, str]:
    """The files of a test bench, by name: `NAME.v`, the design; `NAME_tb.v`, the bench; and its words in hexadecimal.

    Args:
        part: `"unit"`, `"mac"` or `"shared"`.
        name: of the design's top module, as for `verilog`.
        count: vectors of a unit, all there are where these are few; dot products of 37 steps, with pauses, of a
            multiply-accumulate; of those that share an adder, the same filled up with zeros, and so many that each
            does as many as the others.
    Raises:
        ValueError: the unit has no such part, there is none of that name, or the name is none in Verilog.
    """
    check_part(part)
    check_name(name)
    if part == "unit":
        return bench_of_unit(unit, vectors_for(unit, count, seed), name)
    if part == "mac":
        drawn = random(unit, count * STEPS, seed)
        return bench_of_mac(unit, drawn["x"].reshape(-1, STEPS), drawn["w"].reshape(-1, STEPS), name, seed)
    lanes = sharing(unit)
    x, w = filled_up(unit, -(-count // lanes) * lanes, seed)
    x, w = (codes.reshape(-1, lanes, codes.shape[-1]).transpose(0, 2, 1) for codes in (x, w))
    return bench_of_shared(unit, x, w, name, seed)


def whole_chunks(unit: Unit) -> int:
    """Steps of whole chunks for 37."""
    return -(-STEPS // sharing(unit)) * sharing(unit)


def filled_up(unit: Unit, count: int, seed: int = 0) -> tuple[Codes, Codes]:
    """Codes of the operands of random dot products of 37 steps, filled up with zeros: (products, steps), twice."""
    drawn, more = random(unit, count * STEPS, seed), whole_chunks(unit) - STEPS
    x, w = (np.pad(drawn[name].reshape(count, STEPS), ((0, 0), (0, more))) for name in ("x", "w"))
    return x, w


def mismatches(files: Mapping[str, str]) -> int:
    """How many codes differ, by Icarus Verilog (Debian: iverilog).

    Raises:
        FileNotFoundError: it is not installed.
        RuntimeError: it fails, or the bench does not come to an end.
    """
    if not has_iverilog():
        raise FileNotFoundError("Icarus Verilog is not installed; on Debian: apt-get install iverilog")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, text in files.items():
            (folder / file).write_text(text, encoding="utf-8")
        sources = [file for file in files if file.endswith(".v")]
        _run(["iverilog", "-g2012", "-o", "bench", *sources], folder)
        said = _run(["vvp", "-n", "bench"], folder, may_fail=True)
    verdict = re.search(r"PASS: \d+|FAIL: (\d+)", said)
    if verdict is None:
        raise RuntimeError(f"the test bench gave no verdict:\n{said[-2000:]}")
    return int(verdict[1] or 0)


def has_iverilog() -> bool:
    """Whether Icarus Verilog is installed."""
    return bool(shutil.which("iverilog") and shutil.which("vvp"))


def _run(command: list[str], folder: Path, may_fail: bool = False) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode and not may_fail:
        raise RuntimeError(f"{command[0]} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return done.stdout + done.stderr


# --- What must come out -----------------------------------------------------------------------------------------------


def expected_codes(format: RegisterFormat, values: Values, s: Codes | None = None) -> tuple[Codes, Codes]:
    """A code of each value, and a mask of the bits that every code of it has.

    Args:
        s: codes of the sum that came in: NaN passes through an IEEE unit.
    """
    every = (1 << register_bits(format)) - 1
    if isinstance(format, FixedFormat):
        return format.encode(values), np.full(values.shape, every)
    if isinstance(format, IeeeFormat):
        codes = format.encode(np.where(np.isfinite(values), values, 0))
        field = ((1 << format.exponent) - 1) << format.mantissa
        infinite = field | np.signbit(values).astype(np.int64) << (format.bits - 1)
        codes = np.where(np.isinf(values), infinite, codes)
        codes = codes if s is None else np.where(np.isnan(values), s, codes)
        return codes, np.where(values == 0, every >> 1, every)
    codes = np.asarray(format.encode(values))
    zero = 1 << format.bits if format.zero == "flag" else ((1 << format.exponent) - 1) << format.mantissa
    return codes, np.where(values == 0, zero, every)


def _words(*fields: tuple[Codes, int]) -> str:
    """Lines of hexadecimal words: fields of so many bits each, the first at the top."""
    words = [0] * len(fields[0][0])
    for codes, bits in fields:
        words = [word << bits | int(code) for word, code in zip(words, codes, strict=True)]
    return "\n".join(f"{word:x}" for word in words) + "\n"


# --- The benches ------------------------------------------------------------------------------------------------------


def bench_of_unit(unit: Unit, vectors: Vectors, name: str = synthesis.TOP) -> dict[str, str]:
    """The files of a bench that tries these vectors on a unit."""
    codes, care = expected_codes(unit.format, unit.golden(vectors), vectors["s"])
    bits = unit.register_bits
    fields = [(vectors[port], width) for port, width in unit.inputs.items()]
    text = UNIT_BENCH.format(
        name=name,
        count=len(codes),
        declarations="\n".join(f"  reg [{width - 1}:0] {port};" for port, width in unit.inputs.items()),
        top=bits - 1,
        width=sum(unit.inputs.values()) + 2 * bits,
        connections=", ".join(f".{port}({port})" for port in unit.inputs),
        ports=", ".join(unit.inputs),
        shown=" ".join(f"{port}=%h" for port in unit.inputs),
    )
    words = _words(*fields, (codes, bits), (care, bits))
    return {f"{name}.v": verilog(unit, "unit", name), f"{name}_tb.v": text, f"{name}_tb.hex": words}


def bench_of_mac(unit: Unit, x: Codes, w: Codes, name: str = synthesis.TOP, seed: int = 0) -> dict[str, str]:
    """The files of a bench that puts these dot products, (products, steps), through a multiply-accumulate."""
    codes, care = expected_codes(unit.total, dot_products(unit, x, w))
    count, steps = x.shape
    busy = _busy(count * steps, seed)
    cycles = {port: np.zeros(len(busy), np.int64) for port in ("x", "w", "last")}
    cycles["x"][busy], cycles["w"][busy] = x.ravel(), w.ravel()
    cycles["last"][busy] = np.arange(count * steps) % steps == steps - 1
    a, b, bits = unit.activation.bits, unit.weight.bits, register_bits(unit.total)
    text = MAC_BENCH.format(
        name=name, count=count, cycles=len(busy), x_top=a - 1, w_top=b - 1, top=bits - 1, width=a + b + 2, pair=2 * bits
    )
    stimulus = _words((busy.astype(np.int64), 1), (cycles["last"], 1), (cycles["x"], a), (cycles["w"], b))
    return {
        f"{name}.v": verilog(unit, "mac", name),
        f"{name}_tb.v": text,
        f"{name}_tb.hex": stimulus,
        f"{name}_tb_totals.hex": _words((codes, bits), (care, bits)),
    }


def bench_of_shared(unit: Unit, x: Codes, w: Codes, name: str = synthesis.TOP, seed: int = 0) -> dict[str, str]:
    """The files of a bench that puts these dot products, (products, steps, lanes), through lanes that share."""
    codes, care = expected_codes(unit.total, dot_products(unit, x, w))
    count, steps, lanes = x.shape
    busy = _busy(count * steps, seed)
    first = {port: np.zeros(len(busy) + lanes - 1, np.int64) for port in ("valid", "last")}
    first["valid"][: len(busy)] = busy
    first["last"][: len(busy)][busy] = np.arange(count * steps) % steps == steps - 1
    a, b, bits = unit.activation.bits, unit.weight.bits, register_bits(unit.total)
    fields = [(first["valid"], 1), (first["last"], 1)]
    for port, width, operand in (("x", a, x), ("w", b, w)):
        for lane in reversed(range(lanes)):  # the first field is at the top
            first[port] = np.zeros(len(busy) + lanes - 1, np.int64)
            first[port][lane : lane + len(busy)][busy] = operand[..., lane].ravel()
            fields.append((first[port], width))
    widths = {"x": a, "w": b, "total": bits, "done": 1}
    text = SHARED_BENCH.format(
        name=name,
        count=count * lanes,
        cycles=len(first["valid"]),
        lanes=lanes,
        **{port: f"[{lanes * width - 1}:0] {port}" for port, width in widths.items()},
        connections=", ".join(
            f".{port}_{lane}({port}[{lane * width} +: {width}])"
            for lane in range(lanes)
            for port, width in widths.items()
        ),
        top=bits - 1,
        bits=bits,
        width=lanes * (a + b) + 2,
        pair=2 * bits,
    )
    return {
        f"{name}.v": verilog(unit, "shared", name),
        f"{name}_tb.v": text,
        f"{name}_tb.hex": _words(*fields),
        f"{name}_tb_totals.hex": _words((codes.ravel(), bits), (care.ravel(), bits)),
    }


def _busy(steps: int, seed: int) -> NDArray[np.bool_]:
    """In which cycles a step is made: pauses between, and as many cycles as it takes."""
    busy = np.random.default_rng(seed).random(2 * steps + 64) >= IDLE
    return busy[: int(np.argmax(np.cumsum(busy) == steps)) + 1]


VERDICT = """    if (wrong == 0) $display("PASS: %0d {what}", COUNT);
    else $fatal(1, "FAIL: %0d faults in %0d {what}", wrong, COUNT);
    $finish;
"""

UNIT_BENCH = (
    """// Test bench of {name}: COUNT vectors against what the reference of fmaq says.
// iverilog -g2012 -o {name}_tb {name}_tb.v {name}.v && vvp -n {name}_tb
`timescale 1ns / 1ps
module {name}_tb;
  localparam COUNT = {count};
{declarations}
  wire [{top}:0] y;
  {name} dut({connections}, .y(y));
  reg [{width}-1:0] vectors [0:COUNT-1];
  reg [{top}:0] expected, care;  // care: the bits that every code of the value has
  integer i, wrong;
  initial begin
    $readmemh("{name}_tb.hex", vectors);
    wrong = 0;
    for (i = 0; i < COUNT; i = i + 1) begin
      {{{ports}, expected, care}} = vectors[i];
      #1 if (((y ^ expected) & care) !== 0) begin
        wrong = wrong + 1;
        if (wrong <= 10) $display("vector %0d: {shown}: y=%h, not %h", i, {ports}, y, expected);
      end
    end
"""
    + VERDICT.replace("{what}", "vectors")
    + """  end
endmodule
"""
)

MAC_BENCH = (
    """// Test bench of {name}: COUNT dot products, with pauses, against what the reference of fmaq says.
// iverilog -g2012 -o {name}_tb {name}_tb.v {name}.v && vvp -n {name}_tb
`timescale 1ns / 1ps
module {name}_tb;
  localparam COUNT = {count}, CYCLES = {cycles};
  reg clk = 0, rst = 1, valid = 0, last = 0;
  reg [{x_top}:0] x;
  reg [{w_top}:0] w;
  wire [{top}:0] total;
  wire done;
  {name} dut(.clk(clk), .rst(rst), .x(x), .w(w), .valid(valid), .last(last), .total(total), .done(done));
  reg [{width}-1:0] cycles [0:CYCLES-1];
  reg [{pair}-1:0] totals [0:COUNT-1];
  reg [{top}:0] expected, care;  // care: the bits that every code of the value has
  integer i, seen, wrong;
  always #1 clk = ~clk;
  always @(negedge clk) if (done === 1) begin
    {{expected, care}} = totals[seen];
    if (((total ^ expected) & care) !== 0) begin
      wrong = wrong + 1;
      if (wrong <= 10) $display("dot product %0d: total=%h, not %h", seen, total, expected);
    end
    seen = seen + 1;
  end
  initial begin
    $readmemh("{name}_tb.hex", cycles);
    $readmemh("{name}_tb_totals.hex", totals);
    seen = 0;
    wrong = 0;
    @(negedge clk); @(negedge clk) rst = 0;
    for (i = 0; i < CYCLES; i = i + 1) begin
      {{valid, last, x, w}} = cycles[i];
      @(negedge clk);
    end
    valid = 0;
    last = 0;
    repeat (4) @(negedge clk);
    if (seen != COUNT) wrong = wrong + 1;
"""
    + VERDICT.replace("{what}", "dot products")
    + """  end
endmodule
"""
)

SHARED_BENCH = (
    """// Test bench of {name}: COUNT dot products, with pauses, against what the reference of fmaq says.
// iverilog -g2012 -o {name}_tb {name}_tb.v {name}.v && vvp -n {name}_tb
`timescale 1ns / 1ps
module {name}_tb;
  localparam COUNT = {count}, CYCLES = {cycles}, LANES = {lanes};
  reg clk = 0, rst = 1, valid = 0, last = 0;
  reg {x};  // lane 0 at the bottom
  reg {w};
  wire {total};
  wire {done};
  {name} dut(.clk(clk), .rst(rst), .valid(valid), .last(last), {connections});
  reg [{width}-1:0] cycles [0:CYCLES-1];
  reg [{pair}-1:0] totals [0:COUNT-1];
  reg [{top}:0] expected, care;  // care: the bits that every code of the value has
  integer i, lane, wrong, seen [0:LANES-1];
  reg [{top}:0] found;
  always #1 clk = ~clk;
  always @(negedge clk) for (lane = 0; lane < LANES; lane = lane + 1) if (done[lane] === 1) begin
    {{expected, care}} = totals[seen[lane] * LANES + lane];
    found = total[lane * {bits} +: {bits}];
    if (((found ^ expected) & care) !== 0) begin
      wrong = wrong + 1;
      if (wrong <= 10) $display("lane %0d, dot product %0d: total=%h, not %h", lane, seen[lane], found, expected);
    end
    seen[lane] = seen[lane] + 1;
  end
  initial begin
    $readmemh("{name}_tb.hex", cycles);
    $readmemh("{name}_tb_totals.hex", totals);
    for (i = 0; i < LANES; i = i + 1) seen[i] = 0;
    wrong = 0;
    @(negedge clk); @(negedge clk) rst = 0;
    for (i = 0; i < CYCLES; i = i + 1) begin
      {{valid, last, x, w}} = cycles[i];
      @(negedge clk);
    end
    valid = 0;
    last = 0;
    repeat (4) @(negedge clk);
    for (i = 0; i < LANES; i = i + 1) if (seen[i] * LANES != COUNT) wrong = wrong + 1;
"""
    + VERDICT.replace("{what}", "dot products")
    + """  end
endmodule
"""
)
