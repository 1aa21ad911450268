"""`fmaq hardware`: its commands' output, files and exit codes."""

import json
import sys

import pytest

pytest.importorskip("typer", reason="needs the extra fmaq[cli]")
pytest.importorskip("amaranth", reason="needs the extra fmaq[hardware]")
pytest.importorskip("pyosys", reason="needs the extra fmaq[hardware]")

from fmaq import cli


@pytest.fixture
def fmaq(monkeypatch, capsys, tmp_path):
    """Runs a command line; returns exit code, output and errors."""
    monkeypatch.setenv("FMAQ_CACHE", str(tmp_path / "cache"))

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


def test_rtl_writes_verilog(fmaq, tmp_path):
    file = tmp_path / "out" / "mac.v"
    code, out, _ = fmaq("rtl", "paper12", "--part", "mac", "-o", str(file))
    assert code == 0
    assert str(file) in out
    assert "module fmaq(" in file.read_text()


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
        (("table", "--operands", "int5"), "operands must be one of M4E3, int8, got 'int5'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(fmaq, arguments, message):
    code, _, err = fmaq(*arguments)
    assert code == 2
    assert message in " ".join(err.split())
