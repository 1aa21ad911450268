"""Liberty files as foundries write them: what is read, and what the mapper is given."""

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("amaranth", reason="needs the extra fmaq[hardware]")
pytest.importorskip("pyosys", reason="needs the extra fmaq[hardware]")

import pyosys

from fmaq import hardware
from fmaq.hardware import cells, synthesis
from fmaq.hardware.functions import FunctionError, compile_function, pins_of
from fmaq.hardware.liberty import LibertyError, find_library
from fmaq.hardware.liberty_text import LibertySyntaxError, read, write


@pytest.fixture
def library(tmp_path):
    """Reads a library from text."""

    def load(text):
        file = tmp_path / f"cells{abs(hash(text))}.lib"
        file.write_text(text)
        return find_library(file)

    return load


PLAIN = cells.liberty().replace("library(unit)", "library(mine)")


def with_cell(text):
    """Our library with one more cell."""
    return PLAIN.rstrip().removesuffix("}") + text + "}\n"


def without(*names):
    """Our library without cells whose names start so."""
    header, *rest = re.split(r"(?=\n  cell\()", PLAIN.rstrip().removesuffix("}"))
    return header + "".join(c for c in rest if not c.strip().startswith(tuple(f"cell({n}" for n in names))) + "}\n"


# --- Functions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(!(A B))", lambda a, b, c: 1 - (a & b)),
        ("A*B+C", lambda a, b, c: (a & b) | c),
        ("A' + B^C", lambda a, b, c: (1 - a) | (b ^ c)),
        ("!A & (B | C)'", lambda a, b, c: (1 - a) & (1 - (b | c))),
        ("A !B", lambda a, b, c: a & (1 - b)),
        ("A(B+C)", lambda a, b, c: a & (b | c)),
        ("(((A B)+(B C))+(C A))", lambda a, b, c: int(a + b + c >= 2)),
        ("1", lambda a, b, c: 1),
        ("0", lambda a, b, c: 0),
    ],
)
def test_functions_of_cells(text, expected):
    function = compile_function(text)
    for index in range(8):
        pins = dict(zip("ABC", (index >> 2, index >> 1 & 1, index & 1), strict=True))
        assert function(pins) & 1 == expected(*pins.values())


def test_pins_may_have_an_index():
    text = "!(A[0] * A[12]) + C B<3>"
    assert pins_of(text) == {"A[0]", "A[12]", "C", "B<3>"}
    assert compile_function(text)({"A[0]": 1, "A[12]": 1, "C": 1, "B<3>": 1}) & 1 == 1
    assert compile_function(text)({"A[0]": 1, "A[12]": 1, "C": 1, "B<3>": 0}) & 1 == 0


def test_a_constant_is_words_where_there_are_words():
    words = {"0": np.zeros(2, np.uint64), "1": ~np.zeros(2, np.uint64), "A": np.array([5, 6], np.uint64)}
    assert np.array_equal(compile_function("A ^ 1")(words), ~words["A"])
    assert np.array_equal(compile_function("0")(words), words["0"])


def test_words_of_python_are_pins():
    text = "import os"
    assert pins_of(text) == {"import", "os"}
    assert compile_function(text)({"import": 3, "os": 6}) == 2


@pytest.mark.parametrize("text", ["A +", "(A", "A)", "A & & B", "A == B", "A.b", '"A"', "2", ""])
def test_what_is_no_function_is_refused(text):
    with pytest.raises(FunctionError):
        compile_function(text)


# --- Syntax -----------------------------------------------------------------------------------------------------------


def test_what_is_written_reads_back_the_same():
    root = read(PLAIN)
    assert read(write(root)) == root


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("library(x) {\n a : 1;\n b {", "line 3: '\\(' should come, not '{'"),
        ("library(x) {\n a : 1;\n /* never closed", "line 3: a quote or comment that does not end"),
        ('library(x) {\n comment : "never closed;\n }', "line 2: a quote or comment that does not end"),
        ("library(x) { values (1; 2);", "'\\)' should come, not ';'"),
        ("library(x) { cell(A) {", "the file ends"),
    ],
)
def test_wrong_syntax_is_named_with_its_line(text, message):
    with pytest.raises(LibertySyntaxError, match=message):
        read(text)


# --- Libraries as they are --------------------------------------------------------------------------------------------


def test_our_own_library_counts_transistors():
    ours = find_library()
    assert ours.name == "unit"
    assert ours.nand2 == 1
    assert ours.cells["INVX1"].area == 0.5
    assert ours.cells["INVX4"].area == 2
    assert ours.cells["DFFX1"].is_sequential
    assert ours.cells["NOR2X2"].inputs == {
        "A": pytest.approx(10 / 3, abs=1e-3),
        "B": pytest.approx(10 / 3, abs=1e-3),
    }
    assert ours.delay(cells.FO4) == 1
    assert ours.unread == {}


NOTES = [
    PLAIN.replace("time_unit", 'comment : "see https://example.org/lib" ;\n  time_unit', 1),
    PLAIN.replace("area : 1;", 'area : 1; user_note : "see /* the manual";').replace(
        "area : 4;", 'area : 4; user_note : "end */ of it";'
    ),
    PLAIN.replace("area : 1;", 'area : 1; user_note : "a; b } c { d";'),
    PLAIN.replace("area : 1;", 'area : 1; user_note : "he said \\"see // this\\"";'),
]
"""Libraries with marks of comments, and others, in their quotes."""
SLOPPY = {
    "comments": PLAIN.replace("    pin(A)", "    // pin(X) { direction : input; }\n    /* cell(Y) {\n */ pin(A)"),
    "no semicolons": re.sub(r"; *\n", "\n", PLAIN),
    "no semicolons on a line": re.sub(r"(direction : \w+|capacitance : [\d.]+);", r"\1", PLAIN),
    "more semicolons": PLAIN.replace("}\n", "};\n"),
    "continued lines": PLAIN.replace(", ", ", \\\n   "),
    "spaces": re.sub(r"\b(library|cell|pin|timing|values)\(", r"\1 ( ", PLAIN)
    .replace("{", "\n{\n")
    .replace(" :", "\t:"),
    "names in quotes": re.sub(r"(cell|pin)\((\w+)\)", r'\1("\2")', PLAIN),
    "carriage returns": PLAIN.replace("\n", "\r\n"),
}


@pytest.mark.parametrize("text", [*NOTES, *SLOPPY.values()], ids=[f"note{i}" for i in range(len(NOTES))] + list(SLOPPY))
def test_bent_rules_change_nothing(library, text):
    assert text != PLAIN
    found = library(text)
    assert found.cells == library(PLAIN).cells
    assert found.unread == {}


def abc_cells(folder, text):
    """How many gates ABC reads."""
    file = Path(folder, "abc.lib")
    file.write_text(text)
    abc = Path(pyosys.__file__).with_name("yosys-abc")
    done = subprocess.run([abc, "-c", f"read_lib {file}"], capture_output=True, text=True, cwd=folder, check=False)
    match = re.search(r"has (\d+) cells", done.stdout)
    return int(match[1]) if match else 0


@pytest.mark.parametrize("text", [*NOTES, SLOPPY["no semicolons"], SLOPPY["comments"]])
def test_the_mapper_reads_the_same_cells(library, tmp_path, text):
    found = library(text)
    gates = [cell for cell in found.cells.values() if not cell.is_sequential]
    assert abc_cells(tmp_path, found.text) == len(gates) == 30
    file = tmp_path / "yosys.lib"
    file.write_text(found.text)
    synthesis.run_yosys([f"read_liberty -lib {file}", f"write_json {tmp_path}/out.json"], tmp_path)
    seen = set(re.findall(r'^    "(\w+)": \{', (tmp_path / "out.json").read_text(), re.MULTILINE))
    assert set(found.cells) <= seen


def test_abc_alone_loses_cells_behind_a_mark_in_quotes(tmp_path):
    assert abc_cells(tmp_path, PLAIN) == 30
    assert abc_cells(tmp_path, NOTES[1]) < 30


def test_figures_do_not_depend_on_notes(library):
    plain = hardware.synthesize("M3E3b4", "M1E2", "M1E2", library=library(PLAIN))
    for text in (NOTES[0], NOTES[1], SLOPPY["no semicolons"]):
        assert hardware.synthesize("M3E3b4", "M1E2", "M1E2", library=library(text)) == plain


NAND2 = cells._cell(next(cell for cell in cells.CELLS if cell.name == "NAND2"), 1)
OUT = NAND2[NAND2.index("    pin(Y)") :].rstrip().removesuffix("}")
"""The output of a NAND2 with its tables."""
INDEXED = OUT.replace('"A"', '"D[0]"').replace('"B"', '"D[1]"').replace("A*B", "D[0]*D[1]")


@pytest.mark.parametrize(
    ("cell", "inputs"),
    [
        (f"cell(C) {{ area : 1; pin (A, B) {{ direction : input; capacitance : 2; }} {OUT} }}", {"A": 2, "B": 2}),
        (f'cell(C) {{ area : 1; pin ("A B") {{ direction : input; capacitance : 2; }} {OUT} }}', {"A": 2, "B": 2}),
        (
            "cell(C) { area : 1; bundle(D) { members(A, B); direction : input; capacitance : 2;"
            f" pin(B) {{ capacitance : 3; }} }} {OUT} }}",
            {"B": 3, "A": 2},
        ),
        (
            "cell(C) { area : 1; bus(D) { bus_type : two; direction : input; pin(D[1]) { capacitance : 3; }"
            f" pin(D[0]) {{ capacitance : 2; }} }} {INDEXED} }}",
            {"D[1]": 3, "D[0]": 2},
        ),
        (
            "type(two) { base_type : array; bit_from : 1; bit_to : 0; } cell(C) { area : 1; bus(D) { bus_type : two;"
            f" direction : input; capacitance : 2; }} {INDEXED} }}",
            {"D[0]": 2, "D[1]": 2},
        ),
        (
            "cell(C) { area : 1; bus(D) { bus_type : two; direction : input; pin(D[1:0]) { capacitance : 2; } }"
            f" {INDEXED} }}",
            {"D[0]": 2, "D[1]": 2},
        ),
    ],
    ids=["pin(A,B)", "quoted", "bundle", "bus", "bus by type", "bus by range"],
)
def test_pins_in_groups_of_every_kind(library, tmp_path, cell, inputs):
    found = library(with_cell(cell))
    assert found.cells["C"].inputs == inputs
    assert list(found.cells["C"].outputs) == ["Y"]
    assert found.unread == {}
    assert abc_cells(tmp_path, found.text) == 31


def test_pins_with_an_index_are_mapped_and_simulated(library):
    text = PLAIN.replace("pin(B)", "pin(B[0])").replace('related_pin : "B"', 'related_pin : "B[0]"')
    text = re.sub(r'function : "[^"]*"', lambda m: re.sub(r"\bB\b", "B[0]", m[0]), text)
    found = library(text)
    assert found.cells["NAND2X1"].inputs.keys() == {"A", "B[0]"}
    proof = hardware.prove(hardware.Unit.of("M3E3b4", "M1E2", "M1E2"), [found])
    assert proof.exhaustive and proof.holds


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ('cell(C) { area : 1; statetable("A B", "S") { table : "H L : - : H"; } pin(A) { direction : input; } '
         'pin(B) { direction : input; } pin(Y) { direction : output; internal_node : "S"; } }', None),
        ('cell(C) { area : 1; pin(A) { direction : input; } pin(B) { direction : input; } '
         'pin(S) { direction : internal; } pin(Y) { direction : output; function : "S"; } }', None),
        (f"cell(C) {{ area : 1; dont_use : true; pin(A, B) {{ direction : input; }} {OUT} }}", None),
        ('cell(C) { area : 1; latch("IQ", "IQN") { enable : "B"; data_in : "A"; } pin(A, B) { direction : input; } '
         'pin(Y) { direction : output; function : "IQ"; } }', None),
        ('cell(C) { area : 1; pin(A, B) { direction : input; } '
         'pin(Y) { direction : output; function : "A"; three_state : "B"; } }', None),
        ("cell(FILL) { area : 4; }", None),
        (f"cell(C) {{ area : big; pin(A, B) {{ direction : input; }} {OUT} }}", "area of C is 'big', not a number"),
        (f"cell(C) {{ area : 1; pin(A, B) {{ direction : input; }} {OUT.replace('*', '==')} }}", "a function has '='"),
        (f"cell(C) {{ area : 1; pin(A) {{ direction : input; }} {OUT} }}", "is of B, which is no input"),
        ('cell(C) { area : 1; pin(A, B) { direction : input; } pin(Y) { direction : output; function : "A*B"; } }',
         "no delay tables"),
    ],
)  # fmt: skip
def test_one_odd_cell_does_not_reject_the_library(library, tmp_path, cell, reason):
    found = library(with_cell(cell))
    assert found.cells == library(PLAIN).cells
    assert abc_cells(tmp_path, found.text) == 30
    if reason is None:
        assert found.unread == {}
    else:
        assert reason in found.unread["C"]


@pytest.mark.parametrize(
    ("unit", "femtofarads"),
    [
        ("(1,ff)", 1),
        ('("1ff")', 1),
        ('(1, "ff")', 1),
        ('("1", "pf")', 1000),
        ("(1.0, pF)", 1000),
        ("(0.1,pf)", 100),
        ("(1000.0,FF)", 1000),
    ],
)
def test_units_of_capacitance(library, unit, femtofarads):
    found = library(PLAIN.replace("capacitive_load_unit (1,ff)", f"capacitive_load_unit {unit}"))
    assert found.cells["INVX2"].inputs == {"A": pytest.approx(2 * femtofarads)}
    assert re.search(r"capacitive_load_unit \([\d.]+, [fp]f\);", found.text)


@pytest.mark.parametrize(
    ("text", "volts"),
    [
        ("nom_voltage : 1.8;", 1.8),
        ("nom_voltage : 1800;", 1.8),
        ("operating_conditions(slow) { voltage : 0.9; }", 0.9),
        ("", 1),
    ],
)
def test_the_supply(library, text, volts):
    changed = PLAIN.replace("nom_voltage : 1;", text)
    if "1800" in text:
        changed = changed.replace('voltage_unit : "1V"', 'voltage_unit : "1mV"')
    assert library(changed).voltage == pytest.approx(volts)


# --- Libraries that cannot be used ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a whole Liberty file"),
        ("library(x) { cell(A) {", "not a whole Liberty file"),
        ("module x(); endmodule", "not a whole Liberty file"),
        ("cell(x) { area : 1; }", "it starts with 'cell'"),
        ("library(x) { cell(INV) { area : 1; pin(A) { direction : input; } } }", "no two-input NAND"),
        ("library(x) { cell(INV) { area : big; } }", "no two-input NAND"),
        (PLAIN.replace("(1,ff)", "(1,kg)"), "capacitive_load_unit is '1 kg'; it should be like"),
        (PLAIN.replace("nom_voltage : 1;", "nom_voltage : high;"), "nom_voltage is 'high', not a number"),
        (PLAIN.replace('voltage_unit : "1V"', 'voltage_unit : "1kV"'), "voltage_unit is '1kv'"),
        (without("NAND2"), "no two-input NAND, which areas are counted in"),
        (without("INV"), "has no inverter"),
        (without("BUF"), "has no buffer"),
        (PLAIN.replace("cell_rise", "rise").replace("cell_fall", "fall"), "INVX1: it has no delay tables"),
    ],
)
def test_a_library_that_cannot_be_used_is_refused(library, text, message):
    with pytest.raises(LibertyError, match=message):
        library(text)


def test_a_missing_library_is_refused(tmp_path, monkeypatch):
    with pytest.raises(
        LibertyError, match=r"there is no Liberty file .*nothing\.lib; give a file, or one of: unit, osu018"
    ):
        find_library(tmp_path / "nothing.lib")
    monkeypatch.setattr("fmaq.hardware.liberty.DEBIAN", tmp_path)
    with pytest.raises(LibertyError, match="apt-get install qflow-tech-osu018"):
        find_library("osu018")
    assert hardware.installed_libraries() == ["unit"]


def test_three_gates_are_enough_for_a_unit(library):
    three = library(
        without(*{name for name in find_library().cells if not name.startswith(("INVX1", "BUFX2", "NAND2X1"))})
    )
    assert set(three.cells) == {"INVX1", "BUFX2", "NAND2X1"}
    assert hardware.prove(hardware.Unit.of("M2E2b2", "M1E2", "M1E2"), [three]).holds


def test_without_flip_flops_there_is_a_unit_and_no_multiply_accumulate(library):
    gates = library(without("DFF"))
    assert hardware.synthesize("M2E2b2", "M1E2", "M1E2", library=gates).area > 100
    with pytest.raises(hardware.SynthesisError, match="library mine has no plain D flip-flop") as error:
        hardware.synthesize_mac("M2E2b2", "M1E2", "M1E2", library=gates)
    assert len(str(error.value).splitlines()) == 1


def test_what_abc_says_is_passed_on(tmp_path):
    (tmp_path / "smallest.log").write_text("ABC: + map\nABC: Error: Mapping has failed.\nABC: ** cmd error: aborting\n")
    said = synthesis._in_plain_words("Yosys failed:\nlong", find_library(), tmp_path)
    assert said.startswith("ABC cannot map recipe 'smallest' to library unit: Error: Mapping has failed.")


def test_any_liberty_file_can_be_given(tmp_path):
    file = tmp_path / "mine.lib"
    file.write_text(PLAIN)
    result = hardware.synthesize("M2E2b2", "M1E2", "M1E2", library=file)
    assert result.library == "mine"
    assert result.delay_unit == "ns"
