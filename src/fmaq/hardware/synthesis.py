"""From RTL to a netlist of library cells, through Yosys and ABC in a process of their own, by several recipes.

One recipe is noise: the same design comes out a third larger or smaller with another script. So every unit is mapped
by all of `RECIPES`, from the smallest to the fastest, and what is reported is the front between area and delay.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fmaq.cache_folder import cache_folder
from fmaq.hardware.liberty import LibertyError, Library
from fmaq.hardware.netlist import GENERIC, Netlist
from fmaq.whole_files import write_bytes

TOP = "fmaq"
TIME_LIMIT = 300
RIPPLE = Path(__file__).with_name("ripple.v")


@dataclass(frozen=True)
class Recipe:
    """A way to a netlist.

    Attributes:
        name: for tables.
        adders: `"ripple"` or `"prefix"`, how carries are made before logic optimisation.
        script: ABC's commands.
    """

    name: str
    adders: str
    script: str


SHRINK = (
    "balance -l; resub -K 6 -l; rewrite -l; resub -K 6 -N 2 -l; refactor -l; resub -K 8 -l; balance -l; "
    "resub -K 8 -N 2 -l; rewrite -l; resub -K 10 -l; rewrite -z -l; resub -K 10 -N 2 -l; balance -l; "
    "resub -K 12 -l; refactor -z -l; resub -K 12 -N 2 -l; rewrite -z -l; balance -l"
)
CLEAN = "strash; ifraig; scorr; dc2"
SIZE = "buffer -c; topo; upsize; dnsize; stime -p"

RECIPES = (
    Recipe("smallest", "ripple", f"{CLEAN}; {SHRINK}; dch; amap -m; buffer -c; topo; dnsize; stime -p"),
    Recipe("balanced", "prefix", f"{CLEAN}; dch -f; map -B 0.9; topo; buffer -c; topo; dnsize; stime -p"),
    Recipe("fast", "prefix", f"{CLEAN}; dch -f; map -B 0.9; topo; {SIZE}"),
    Recipe("fastest", "prefix", f"{CLEAN}; if -g -K 6; strash; dch; map; topo; {SIZE}"),
)

FRONT_END = (
    *(f"hierarchy -top {TOP}", "proc", "flatten", "opt -full", "wreduce", "peepopt", "opt_clean"),
    # The multiplier first and alone: merged with an adder, its partial products are sign-extended to the adder's width.
    *("alumacc t:$mul", "alumacc", "share", "opt -full"),
)
"""From RTL to adders, multipliers and multiplexers of words."""

LOWERING = ("proc", "flatten", "techmap", "simplemap", "dfflegalize -cell $_DFF_P_ 01", "simplemap", "clean")
"""From RTL to Yosys's own gates."""

RUNNER = """
import sys
from pyosys import libyosys
design = libyosys.Design()
for command in open(sys.argv[1], encoding="utf-8").read().splitlines():
    libyosys.run_pass(command, design)
"""


class SynthesisError(OSError):
    """Yosys or Amaranth is not there, or Yosys failed; the message says what it said."""


@dataclass(frozen=True)
class Mapped:
    """One recipe's netlist, as Yosys wrote it.

    Attributes:
        recipe: its name.
        picoseconds: delay of the longest path, by ABC's static timing analysis without wires.
        module: the module of Yosys's JSON.
    """

    recipe: str
    picoseconds: float
    module: dict[str, Any]

    def netlist(self, library: Library) -> Netlist:
        """The netlist over a library's cells."""
        return Netlist.from_yosys(self.module, library.cells)


def lower(rtlil: str) -> Netlist:
    """The design itself in Yosys's own gates, before any optimisation: RTL that simulates fast."""
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder, "design.il"), Path(folder, "gates.json")
        source.write_text(rtlil, encoding="utf-8")
        run_yosys(
            [f"read_rtlil {source}", f"hierarchy -top {TOP}", *LOWERING, f"write_json {result}"],
            Path(folder),
        )
        return Netlist.from_yosys(_module(result), GENERIC)


def assemble(rtlil: str, inside: Mapping[str, Netlist]) -> Netlist:
    """A design that is nothing but wires between instances of these netlists, by their modules' names."""
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder, "design.il"), Path(folder, "gates.json")
        source.write_text(rtlil, encoding="utf-8")
        run_yosys([f"read_rtlil {source}", "proc", "clean", f"write_json {result}"], Path(folder))
        cells = next(iter(inside.values())).cells
        return Netlist.from_yosys(_module(result), cells, inside)


def verilog(rtlil: str) -> str:
    """The design as Verilog, with its hierarchy and its signals' names."""
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder, "design.il"), Path(folder, "design.v")
        source.write_text(rtlil, encoding="utf-8")
        tidy = ["proc -nomux", "opt_expr", "opt_merge", "opt_clean -purge"]
        run_yosys([f"read_rtlil {source}", *tidy, f"write_verilog -noattr -decimal {result}"], Path(folder))
        return result.read_text(encoding="utf-8")


def map_to_cells(rtlil: str, library: Library, recipes: Iterable[Recipe] = RECIPES) -> list[Mapped]:
    """Netlists of a design by every recipe; from the cache where they are there.

    Args:
        rtlil: a design whose top module is `fmaq`. Flip-flops are mapped too.
    Raises:
        SynthesisError: pyosys is not installed, or Yosys fails.
    """
    recipes = tuple(recipes)
    key = _key(rtlil, library, recipes)
    cached = cache_folder("hardware") / f"{key}.json.gz"
    if cached.is_file():
        return _read(cached)
    with tempfile.TemporaryDirectory() as folder:
        mapped = _run_recipes(rtlil, library, recipes, Path(folder))
    _write(cached, mapped)
    return mapped


def _run_recipes(rtlil: str, library: Library, recipes: tuple[Recipe, ...], folder: Path) -> list[Mapped]:
    (folder / "design.il").write_text(rtlil, encoding="utf-8")
    cells = folder / "cells.lib"
    cells.write_text(library.text, encoding="utf-8")
    commands = [f"read_rtlil {folder}/design.il", *FRONT_END, "design -save words"]
    for adders in dict.fromkeys(recipe.adders for recipe in recipes):
        ripple = [f"techmap -map {RIPPLE}"] if adders == "ripple" else []
        commands += ["design -load words", *ripple, "techmap", f"dfflibmap -liberty {cells}", "opt -full"]
        commands += [f"design -save {adders}"]
    for recipe in recipes:
        (folder / f"{recipe.name}.abc").write_text(recipe.script.replace("; ", "\n") + "\n", encoding="utf-8")
        mapping = f"abc -liberty {cells} -script {folder}/{recipe.name}.abc {_unwanted(library)}"
        commands += [f"design -load {recipe.adders}", f"tee -q -o {folder}/{recipe.name}.log {mapping}", "opt_clean"]
        commands += [f"write_json {folder}/{recipe.name}.json"]
    try:
        run_yosys(commands, folder)
    except SynthesisError as error:
        raise SynthesisError(_in_plain_words(str(error), library, folder)) from None
    return [_mapped(recipe, folder, library) for recipe in recipes]


COMPLAINT = re.compile(r"ABC: .*(error|cannot|assertion|segmentation)", re.IGNORECASE)


def _in_plain_words(complaint: str, library: Library, folder: Path) -> str:
    """What a library lacks, or what ABC said, which Yosys's own message leaves out."""
    if "cannot be legalized" in complaint:
        return (
            f"library {library.name} has no plain D flip-flop (a clock edge, data and an output), which registers "
            "need; give another library, or synthesize the unit alone"
        )
    logs = sorted(folder.glob("*.log"), key=lambda path: path.stat().st_mtime)
    lines = logs[-1].read_text(encoding="utf-8", errors="replace").splitlines() if logs else []
    said = [line.removeprefix("ABC: ") for line in lines if COMPLAINT.match(line)]
    if not said:
        return complaint
    return f"ABC cannot map recipe {logs[-1].stem!r} to library {library.name}: {' '.join(said)}"


def _unwanted(library: Library) -> str:
    """Clock buffers are no logic."""
    return " ".join(f"-dont_use {name}" for name in library.cells if name.upper().startswith("CLKBUF"))


def _mapped(recipe: Recipe, folder: Path, library: Library) -> Mapped:
    log = (folder / f"{recipe.name}.log").read_text(encoding="utf-8", errors="replace")
    module = _module(folder / f"{recipe.name}.json")
    delays = re.findall(r"Delay\s*=\s*([\d.]+)\s*ps", log)
    if not delays and not module["cells"]:  # nothing but wires: what is left of some formats
        return Mapped(recipe.name, 0.0, module)
    if not delays:
        raise SynthesisError(f"ABC gave no delay for recipe {recipe.name!r} with library {library.name}:\n{log[-800:]}")
    return Mapped(recipe.name, float(delays[-1]), module)


def _module(path: Path) -> dict[str, Any]:
    """Ports and cells of the top module, without the rest of Yosys's JSON."""
    module = json.loads(path.read_text(encoding="utf-8"))["modules"][TOP]
    cells = {name: {"type": c["type"], "connections": c["connections"]} for name, c in module["cells"].items()}
    return {
        "ports": {n: {"direction": p["direction"], "bits": p["bits"]} for n, p in module["ports"].items()},
        "cells": cells,
    }


def run_yosys(commands: list[str], folder: Path) -> None:
    """Run Yosys commands in a process of their own, which cannot take ours down.

    Raises:
        SynthesisError: pyosys is not installed, or a command fails.
    """
    if importlib.util.find_spec("pyosys") is None:
        raise SynthesisError('synthesis needs pyosys, which is not installed: pip install "fmaq[hardware]"')
    script, runner = folder / "script.ys", folder / "run.py"
    script.write_text("\n".join(commands), encoding="utf-8")
    runner.write_text(RUNNER, encoding="utf-8")
    command = [sys.executable, str(runner), str(script)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT, check=False)
    except subprocess.TimeoutExpired:
        raise SynthesisError(f"Yosys did not finish in {TIME_LIMIT} seconds") from None
    if done.returncode:
        raise SynthesisError(f"Yosys failed:\n{_complaint(done.stdout + done.stderr)}")


def _complaint(output: str) -> str:
    """The lines with an error, or the last ones."""
    lines = output.splitlines()
    return "\n".join([line for line in lines if "ERROR" in line] or lines[-8:])


# --- Cache ------------------------------------------------------------------------------------------------------------


def _key(rtlil: str, library: Library, recipes: tuple[Recipe, ...]) -> str:
    if importlib.util.find_spec("pyosys") is None:
        raise SynthesisError('synthesis needs pyosys, which is not installed: pip install "fmaq[hardware]"')
    # Amaranth writes where in our source each signal comes from: it changes nothing.
    design = re.sub(r'attribute \\src "[^"]*"', "", rtlil)
    parts = [version("pyosys"), *FRONT_END, design, library.text, RIPPLE.read_text(encoding="utf-8"), repr(recipes)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _read(path: Path) -> list[Mapped]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return [Mapped(**entry) for entry in json.load(file)]
    except (OSError, EOFError, ValueError, TypeError):
        path.unlink(missing_ok=True)
        raise SynthesisError(
            f"a cached netlist was damaged and is removed ({path.name}); run the command again"
        ) from None


def _write(path: Path, mapped: list[Mapped]) -> None:
    """Whole or not at all, so that an interrupted or a second run leaves no half file."""
    text = json.dumps([{"recipe": m.recipe, "picoseconds": m.picoseconds, "module": m.module} for m in mapped])
    write_bytes(path, gzip.compress(text.encode(), compresslevel=3))


__all__ = [
    "RECIPES",
    "LibertyError",
    "Mapped",
    "Recipe",
    "SynthesisError",
    "assemble",
    "lower",
    "map_to_cells",
    "run_yosys",
    "verilog",
]
