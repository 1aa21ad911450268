"""Is the hardware the reference, bit for bit? RTL, every synthesized netlist, and a chunked dot product, compared."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fmaq.hardware import synthesis
from fmaq.hardware.cost import design, mac_design
from fmaq.hardware.liberty import Library, find_library
from fmaq.hardware.unit import Unit
from fmaq.hardware.vectors import Vectors, is_exhaustive, vectors_for

Codes = NDArray[np.int64]


@dataclass(frozen=True)
class Proof:
    """What a comparison found.

    Attributes:
        unit: as text.
        vectors: how many inputs were tried.
        exhaustive: whether these are all there are.
        mismatches: by what was tried: `"rtl"`, each library's netlists as `"osu018/smallest"`, or `"iverilog"`.
    """

    unit: str
    vectors: int
    exhaustive: bool
    mismatches: dict[str, int]

    @property
    def holds(self) -> bool:
        """Whether everything equals the reference."""
        return not any(self.mismatches.values())


def prove(
    unit: Unit, libraries: list[Library] | None = None, count: int = 100_000, seed: int = 0, iverilog: bool = False
) -> Proof:
    """Compare a unit's RTL and its synthesized netlists with `fmaq.numerics.reference`.

    Args:
        libraries: our own unless given.
        count: vectors, where trying all inputs is too much.
        iverilog: simulate the Verilog too, by Icarus Verilog, which must be installed.
    """
    vectors = vectors_for(unit, count, seed)
    expected = unit.golden(vectors)
    rtlil = design(unit)
    wrong = {"rtl": mismatches(unit, synthesis.lower(rtlil).simulate(vectors)["y"], expected)}
    for library in libraries if libraries is not None else [find_library()]:
        for mapped in synthesis.map_to_cells(rtlil, library):
            codes = mapped.netlist(library).simulate(vectors)["y"]
            wrong[f"{library.name}/{mapped.recipe}"] = mismatches(unit, codes, expected)
    if iverilog:
        wrong["iverilog"] = mismatches(unit, simulate_verilog(unit, vectors), expected)
    return Proof(str(unit), len(expected), is_exhaustive(unit), wrong)


def mismatches(unit: Unit, codes: Codes, expected: NDArray[np.float64]) -> int:
    """How many codes are not the expected values; NaN equals NaN, and the zeros are one."""
    values = unit.format.decode(codes)
    return int(np.sum((values != expected) & ~(np.isnan(values) & np.isnan(expected))))


# --- An independent simulator -----------------------------------------------------------------------------------------


def find_iverilog() -> str | None:
    """Icarus Verilog, if it is installed (Debian: iverilog)."""
    return shutil.which("iverilog") if shutil.which("vvp") else None


def simulate_verilog(unit: Unit, vectors: Vectors) -> Codes:
    """y of the unit's Verilog for each vector, by Icarus Verilog."""
    ports = unit.inputs
    width = sum(ports.values())
    declarations = "\n".join(f"  reg [{bits - 1}:0] {name};" for name, bits in ports.items())
    wires = ", ".join(f".{name}({name})" for name in (*ports, "y"))
    bench = f"""module bench;
{declarations}
  wire [{unit.register_bits - 1}:0] y;
  fmaq dut({wires});
  reg [{width - 1}:0] stimulus [0:{len(vectors["x"]) - 1}];
  integer i, file;
  initial begin
    $readmemh("stimulus.hex", stimulus);
    file = $fopen("result.hex", "w");
    for (i = 0; i < {len(vectors["x"])}; i = i + 1) begin
      {{{", ".join(ports)}}} = stimulus[i];
      #1 $fdisplay(file, "%h", y);
    end
    $fclose(file);
  end
endmodule
"""
    words = [0] * len(vectors["x"])
    for name, bits in ports.items():
        words = [word << bits | int(code) for word, code in zip(words, vectors[name], strict=True)]
    return _icarus(synthesis.verilog(design(unit)), bench, "\n".join(f"{word:x}" for word in words))


def simulate_mac(unit: Unit, x: ArrayLike, w: ArrayLike) -> Codes:
    """Dot products by the Verilog of the chunked multiply-accumulate, one after another without a pause.

    Args:
        x, w: (products, steps), values of the operands' formats.
    Returns:
        codes of the accumulator's format, one a product.
    """
    x_codes, w_codes = unit.activation.encode(x), unit.weight.encode(w)
    count, steps = x_codes.shape
    a, b = unit.activation.bits, unit.weight.bits
    bench = f"""module bench;
  reg clk = 0, rst = 1, valid = 0, last = 0;
  reg [{a - 1}:0] x;
  reg [{b - 1}:0] w;
  wire [{unit.register_bits - 1}:0] total;
  wire done;
  fmaq dut(.clk(clk), .rst(rst), .x(x), .w(w), .valid(valid), .last(last), .total(total), .done(done));
  reg [{a + b - 1}:0] stimulus [0:{count * steps - 1}];
  integer i, file;
  always #1 clk = ~clk;
  always @(posedge clk) if (done) $fdisplay(file, "%h", total);
  initial begin
    $readmemh("stimulus.hex", stimulus);
    file = $fopen("result.hex", "w");
    @(negedge clk); @(negedge clk) rst = 0;
    for (i = 0; i < {count * steps}; i = i + 1) begin
      valid = 1; last = i % {steps} == {steps - 1};
      {{x, w}} = stimulus[i];
      @(negedge clk);
    end
    valid = 0; last = 0;
    repeat (4) @(negedge clk);
    $fclose(file);
    $finish;
  end
endmodule
"""
    words = (x_codes << b | w_codes).ravel()
    return _icarus(synthesis.verilog(mac_design(unit)), bench, "\n".join(f"{word:x}" for word in words))


def _icarus(source: str, bench: str, stimulus: str) -> Codes:
    """Compile and run a test bench that writes result.hex."""
    compiler = find_iverilog()
    if compiler is None:
        raise FileNotFoundError("Icarus Verilog is not installed; on Debian: apt-get install iverilog")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, text in (("design.v", source), ("bench.v", bench), ("stimulus.hex", stimulus)):
            (folder / file).write_text(text, encoding="utf-8")
        for command in ([compiler, "-g2012", "-o", "bench", "bench.v", "design.v"], ["vvp", "-n", "bench"]):
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
            if done.returncode:
                raise RuntimeError(f"{command[0]} failed:\n{(done.stdout + done.stderr)[-2000:]}")
        lines = (folder / "result.hex").read_text(encoding="utf-8").split()
    return np.array([int(line, 16) for line in lines], np.int64)
