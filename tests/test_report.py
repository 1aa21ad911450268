"""Reports: the table, the plot and the page, and the record they are made from."""

import csv
import io
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from fmaq.report import rich_table, write_report
from fmaq.report.plot import draw, to_svg
from fmaq.report.tables import cells, headings
from fmaq.training.record import Record, Row, show

STAGE = {"epochs": 2, "learning_rate": 1e-3, "underflow": False, "cosine": True, "final_learning_rate": 0.0}


def stage(accuracy: float, underflow: bool) -> dict:
    metrics = {"accuracy": accuracy, "loss": 0.1}
    return {"stage": STAGE | {"underflow": underflow}, "loss": 0.05, "metrics": metrics, "own_metrics": metrics}


@pytest.fixture
def record() -> Record:
    acc = "M7E4b10 product=M7E4b12 chunk=16"
    tuned = {"stages": [stage(0.9, False), stage(0.95, True)], "seconds": 3.0}
    rows = [
        Row("M4E3", "fp32", {"accuracy": 0.97, "loss": 0.2}, 1.0),
        Row("M4E3", acc, {"accuracy": 0.5, "loss": 0.9}, 1.0, tuned),
        Row("M4E3", "M3E3b5 chunk=None rounding=nearest_even", {"accuracy": 0.1, "loss": 2.0}, 1.0),
    ]
    baseline = Row("float32", "fp32", {"accuracy": 0.98, "loss": 0.1}, 1.0)
    return Record(
        "demo", "<digits> & more", "classification", 0, baseline, rows, {"torch": "2"}, {"name": "x"}, ["A note."]
    )


def test_values_as_people_read_them() -> None:
    assert show("accuracy", 0.91721) == "91.72 %"
    assert show("perplexity", 31.4567) == "31.457"
    assert show("perplexity", 123456.7) == "1.23e+05"
    assert show("accuracy", None) == "–"


def test_table(record: Record) -> None:
    assert headings(record)[-3:] == ["zero-shot", "after stage one", "after stage two"]
    assert cells(record, record.rows[1]) == ["M4E3", "M7E4b10", "12", "M7E4b12", "16", "50.00 %", "90.00 %", "95.00 %"]
    assert cells(record, record.rows[2])[1:5] == ["M3E3b5 nearest even", "7", "exact", "all"]
    assert cells(record, record.baseline)[:3] == ["float32", "float32", "32"]


def test_table_without_fine_tuning(record: Record) -> None:
    record.rows[1].tuned = None
    assert headings(record)[-2:] == ["accuracy", "loss"]
    assert cells(record, record.rows[1])[-2:] == ["50.00 %", "0.900"]


def test_terminal_table(record: Record) -> None:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(rich_table(record))
    text = console.export_text()
    assert "95.00 %" in text and "M7E4b12" in text


def test_record_round_trip_and_csv(record: Record, tmp_path: Path) -> None:
    record.save(tmp_path / "r.json")
    assert Record.load(tmp_path / "r.json") == record
    record.save_csv(tmp_path / "r.csv")
    rows = list(csv.DictReader((tmp_path / "r.csv").open()))
    assert [row["bits"] for row in rows] == ["32", "32", "12", "7"]
    assert rows[2]["accuracy after stage 2"] == "0.95"
    assert rows[1]["accuracy after stage 2"] == ""


def test_page_is_self_contained_and_escaped(record: Record, tmp_path: Path) -> None:
    written = write_report(record, tmp_path, "page")
    page = written.page.read_text(encoding="utf-8")
    assert "&lt;digits&gt; &amp; more" in page and "<digits>" not in page
    assert "95.00 %" in page and "A note." in page and "prefers-color-scheme: dark" in page
    loaded = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)|@import', page)
    assert all((a or b).startswith("#") for a, b in loaded)
    assert "<script" not in page
    assert written.plot.read_bytes().startswith(b"\x89PNG")


def test_plot_takes_the_pages_colour(record: Record) -> None:
    svg = to_svg(draw(record))
    root = ElementTree.fromstring(svg)
    assert root.get("viewBox") and root.get("width") is None and root.get("height") is None
    assert "currentColor" in svg


@pytest.mark.parametrize(("metric", "value"), [("perplexity", 31.5), ("pearson", 0.65)])
def test_plots_of_other_metrics(metric: str, value: float, tmp_path: Path) -> None:
    rows = [Row(o, a, {metric: value}, 1.0) for o in ("float32", "M4E3") for a in ("fp32", "M7E4b10")]
    made = Record("evaluate", "n", "t", 0, Row("float32", "fp32", {metric: value}, 1.0), rows)
    axes = draw(made).axes[0]
    assert axes.get_ylabel() == metric
    assert len(axes.get_legend().get_texts()) == 2
    assert (axes.get_yscale() == "log") == (metric == "perplexity")


def test_columns_of_the_plot_are_told_apart() -> None:
    accumulators = ["fp32", "M5E4b10", "M5E4b9 chunk=16", "M5E4b9 chunk=8"]
    rows = [Row("M4E3", a, {"accuracy": 0.5}, 1.0) for a in accumulators]
    made = Record("evaluate", "n", "t", 0, rows[0], rows)
    for count, expected in ((2, "M5E4\n10 bits"), (3, "M5E4b10\n10 bits"), (4, "M5E4b10\nchunk=16\n10 bits")):
        made.rows = rows[:count]
        labels = [label.get_text() for label in draw(made).axes[0].get_xticklabels()]
        assert labels[1] == expected and len(set(labels)) == count
