"""`fmaq hardware`: its commands' output, files and exit codes."""

import csv
import io
import json
import sys

import pytest

pytest.importorskip("typer", reason="needs the extra fmaq[cli]")
pytest.importorskip("amaranth", reason="needs the extra fmaq[hardware]")
pytest.importorskip("pyosys", reason="needs the extra fmaq[hardware]")

from fmaq import cli


@pytest.fixture
def fmaq(monkeypatch, capsys):
    """Runs a command line; returns exit code, output and errors."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fmaq", "hardware", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return run


def test_formats(fmaq):
    code, out, _ = fmaq("formats", "paper12", "--json")
    assert code == 0
    assert [row["register"] for row in json.loads(out)] == [13, 13]


def test_estimate_shows_components(fmaq):
    code, out, _ = fmaq("estimate", "paper12", "M23E8b127", "--components")
    assert code == 0
    assert "leading-zero detector" in out
    assert "paper12" in out and "M23E8b127" in out


def test_synthesize_as_json(fmaq):
    code, out, _ = fmaq("synthesize", "M2E2b2", "-w", "M1E2", "-x", "M1E2", "--json")
    (result,) = json.loads(out)
    assert code == 0
    assert result["library"] == "unit"
    assert {"area", "delay", "energy", "cells", "front"} <= set(result)


LEVELS = "M2E2b2h product=M2E2b3h chunk=2 outer=M3E3b4"


def test_synthesize_a_share(fmaq):
    code, out, _ = fmaq("synthesize", LEVELS, "-w", "M1E2", "-x", "M1E2", "--part", "shared", "--json")
    (result,) = json.loads(out)
    assert code == 0 and result["lanes"] == 2 and result["total"] == "M3E3b4"
    code, out, _ = fmaq("synthesize", LEVELS, "-w", "M1E2", "-x", "M1E2", "--part", "shared")
    assert code == 0 and "with its share of a merging adder" in out
    code, _, err = fmaq("synthesize", LEVELS, "--part", "shares")
    assert code != 0 and "part must be one of unit, mac, shared, got 'shares'" in err


def read_csv(text):
    return list(csv.DictReader(io.StringIO(text)))


SMALL = ("-w", "M1E2", "-x", "M1E2")
BASELINES = ("-l", "unit", "--wide", "M5E3b4", "--half", "M4E3b4")


@pytest.mark.parametrize(
    ("command", "heads"),
    [
        (("estimate", "M3E3b4 product=M3E3b6", *SMALL), 1),
        (("synthesize", "M3E3b4 product=M3E3b6", *SMALL), 1),
        (("synthesize", "M3E3b4 product=M3E3b6", *SMALL, "--part", "mac"), 1),
        (("table", "M3E3b4 product=M3E3b6", *SMALL, *BASELINES), 1),
        (("prove", "M3E3b4 product=M3E3b6", *SMALL), 3),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_every_table_shows_bits_and_products(fmaq, command, heads):
    code, out, _ = fmaq(*command)
    assert code == 0
    head = next(line for line in out.splitlines() if "accumulator" in line)
    assert head.split()[heads : heads + 4] == ["bits", "product", "its", "bits"]
    row = next(line for line in out.splitlines() if line.strip().startswith("M3E3b4"))
    assert "  7  " in row and "M3E3b6" in row


def test_formats_says_that_products_are_exact(fmaq):
    _, out, _ = fmaq("formats", "M5E4b10", "--json")
    assert [(row["role"], row["format"], row["bits"]) for row in json.loads(out)] == [
        ("sums", "M5E4b10", 10),
        ("products", "exact", None),
    ]
    assert "exact" in fmaq("formats", "M5E4b10")[1]


def test_integer_operands_are_synthesized(fmaq):
    code, out, err = fmaq("synthesize", "paper12", "-w", "int8", "-x", "int8", "--csv")
    rows = read_csv(out)
    assert code == 0 and err == ""
    assert {row["recipe"] for row in rows} >= {"smallest"}
    assert all(row["weight"] == row["activation"] == "int8" and row["bits"] == "12" for row in rows)
    areas = [float(row["area"]) for row in rows]
    assert areas == sorted(areas) and areas[0] > 900
    assert float(rows[0]["energy"]) > 100 and rows[-1]["energy"] == ""


def test_an_unlike_comparison_is_warned_of(fmaq):
    for command in ("estimate", "synthesize"):
        _, _, err = fmaq(command, "M3E3b4 product=M3E3b6", "M2E2b2", *SMALL)
        assert 'write "M2E2b2 product=M2E2b4"' in " ".join(err.split())
        assert fmaq(command, "M2E2b2", *SMALL)[2] == ""
    code, out, err = fmaq("table", "M3E3b4 product=M3E3b6", "M2E2b2", *SMALL, *BASELINES, "--csv")
    assert code == 0 and "unlike comparison" in err and "unlike" not in out


def test_a_multiply_accumulate_has_a_front(fmaq):
    _, out, _ = fmaq("synthesize", "M3E3b4", *SMALL, "--part", "mac", "--json")
    (result,) = json.loads(out)
    assert len(result["front"]) > 1
    assert result["energy"] > 0 and result["levels"] > 0 and result["flip_flops"] == 32
    rows = read_csv(fmaq("synthesize", "M3E3b4", *SMALL, "--part", "mac", "--csv")[1])
    assert [float(row["area"]) for row in rows] == [point["area"] for point in result["front"]]
    assert {row["flip_flops"] for row in rows} == {"32"}


def test_a_table_of_ones_own_list(fmaq, tmp_path):
    arguments = ("table", "I10f0", "I14f0w", "-w", "int4", "-x", "int2", "-l", "unit")
    code, out, _ = fmaq(*arguments, "--csv", "-o", str(tmp_path))
    rows = read_csv(out)
    assert code == 0
    assert [row["accumulator"] for row in rows] == ["I10f0", "I14f0w", "I16f0", "I32f0"]
    assert float(rows[-1]["area_to_wide"]) == 1 == float(rows[-2]["area_to_half"])
    assert (tmp_path / "hardware.png").read_bytes()[:4] == b"\x89PNG"
    code, out, _ = fmaq(*arguments, "--part", "mac", "--wide", "I14f0w", "--half", "I14f0w", "--markdown")
    assert "chunked multiply-accumulate" in out
    assert out.splitlines()[4].startswith("| I10f0 | 10 | exact | 6 |")


def test_cells_that_cannot_be_read_are_named(fmaq, tmp_path):
    from fmaq.hardware import cells

    file = tmp_path / "odd.lib"
    file.write_text(cells.liberty().replace("library(unit)", "library(odd)").replace('"A^B"', '"A == B"'))
    code, _, err = fmaq("synthesize", "M2E2b2", *SMALL, "-l", str(file), "--json")
    assert code == 0
    assert "library odd: 2 cells are left out (XOR2X1:" in " ".join(err.split())


def test_a_testbench_to_take_away(fmaq, tmp_path):
    code, out, _ = fmaq(
        "testbench", "M3E3b4", *SMALL, "--part", "mac", "--name", "core", "--vectors", "7", "-o", str(tmp_path)
    )
    assert code == 0
    files = {"core.v", "core_tb.v", "core_tb.hex", "core_tb_totals.hex"}
    assert {path.name for path in tmp_path.iterdir()} == files
    assert all(file in out for file in files)
    assert "iverilog -g2012 -o core_tb core_tb.v core.v" in out
    assert "module core(" in (tmp_path / "core.v").read_text()
    assert len((tmp_path / "core_tb_totals.hex").read_text().split()) == 7


def test_a_multiply_accumulate_is_proven(fmaq):
    code, out, _ = fmaq("prove", "M3E3b4", *SMALL, "--part", "mac", "--vectors", "5000", "--json")
    (found,) = json.loads(out)
    assert code == 0
    assert set(found["mismatches"]) > {"rtl"} and not any(found["mismatches"].values())


@pytest.mark.parametrize("command", ["rtl", "testbench", "prove"])
def test_every_part_is_to_be_had(fmaq, tmp_path, command):
    out = ("-o", str(tmp_path / "out"))
    for part in ("unit", "mac", "shared"):
        options = ("--vectors", "4000") if command == "prove" else ("--name", part, *out)
        code, said, _ = fmaq(command, LEVELS, *SMALL, "--part", part, *options)
        assert code == 0
        if command == "prove":
            assert part in said and "in 5 designs, 0 mismatches" in " ".join(said.split())
        if command == "testbench":
            assert f"module {part}_tb;" in (tmp_path / "out" / f"{part}_tb.v").read_text()
        if command == "rtl":
            assert f"module {part}(" in (tmp_path / "out").read_text()


def test_prove_without_accumulators_tries_all_parts(fmaq, monkeypatch):
    from fmaq.hardware import table

    study = table.Study("M1E2", "M1E2", (LEVELS,), "", "")
    monkeypatch.setattr(table, "PROVEN", {part: (study,) for part in table.PARTS})
    code, out, _ = fmaq("prove", "--vectors", "2000", "--json")
    assert code == 0
    assert [found["part"] for found in json.loads(out)] == ["unit", "mac", "shared"]
    code, out, _ = fmaq("prove", "--vectors", "2000", "--json", "--part", "shared")
    assert [found["part"] for found in json.loads(out)] == ["shared"]


def test_a_table_of_all_parts(fmaq, tmp_path):
    baselines = ("--wide", "M3E3b4 chunk=2", "--half", "M3E3b4 chunk=2")
    arguments = ("table", "M2E2b2 chunk=2", *SMALL, "-l", "unit", "--part", "all", *baselines)
    code, out, _ = fmaq(*arguments)
    assert code == 0 and "own area" in " ".join(out.split())
    rows = read_csv(fmaq(*arguments, "--csv", "-o", str(tmp_path))[1])
    assert [row["part"] for row in rows] == ["unit", "unit", "mac", "mac", "shared", "shared"]
    assert set(json.loads((tmp_path / "hardware.json").read_text())["unit"]) == {"unit", "mac", "shared"}
    assert (tmp_path / "hardware.png").read_bytes()[:4] == b"\x89PNG"


def test_help_of_every_command_has_examples(fmaq):
    for command in ("estimate", "synthesize", "rtl", "testbench", "prove", "table", "model", "formats"):
        code, out, _ = fmaq(command, "--help")
        assert code == 0
        assert f"fmaq hardware {command} " in out


def test_rtl_writes_verilog(fmaq, tmp_path):
    file = tmp_path / "out" / "mac.v"
    code, out, _ = fmaq("rtl", "paper12", "--part", "mac", "-o", str(file))
    assert code == 0
    assert str(file) in out
    assert "module fmaq(" in file.read_text()
    fmaq("rtl", "paper12", "--part", "mac", "--name", "core", "-o", str(file))
    assert "module core_merge(" in file.read_text() and "module fmaq" not in file.read_text()


def test_prove_counts_mismatches(fmaq):
    code, out, _ = fmaq("prove", "M3E3b4", "-w", "M1E2", "-x", "M1E2", "--json")
    (found,) = json.loads(out)
    assert code == 0
    assert found["exhaustive"] and found["vectors"] == 1 << 16
    assert set(found["mismatches"].values()) == {0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("synthesize", "paper12", "--liberty", "nothing.lib"), "there is no Liberty file nothing.lib"),
        (("estimate", "paper12", "-w", "M12E3"), "weight format 'M12E3' does not fit the unit"),
        (("rtl", "M7E4"), "hardware needs a bias"),
        (
            ("table", "--operands", "int5"),
            "operands must be one of M4E3, int8, levels, roundings, got 'int5'; for others give accumulators",
        ),
        (("table", "paper12", "-w", "int99"), "weight format 'int99' does not fit the unit"),
        (("rtl", "paper12", "--name", "module"), "'module' is no name of a Verilog module"),
        (("rtl", "paper12", "--part", "core"), "part must be one of unit, mac, shared, got 'core'"),
        (("synthesize", "paper12", "--part", "core"), "part must be one of unit, mac, shared, got 'core'"),
        (("synthesize", "ieee32", "--part", "mac"), "has a unit, and no chunked"),
        (("testbench", "ieee32", "--part", "mac"), "has a unit, and no chunked"),
        (("estimate", "paper12", "--csv", "--json"), "give one of --json and --csv"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(fmaq, arguments, message):
    code, _, err = fmaq(*arguments)
    assert code == 2
    assert message in " ".join(err.split())
