"""Reports: the table, the plot and the page, and the record they are made from."""

import csv
import io
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from fmaq.recipes.record import Record, Row, show
from fmaq.report import rich_table, write_report
from fmaq.report.plot import draw, to_svg
from fmaq.report.tables import cells, headings, lines

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


def test_accumulators_of_one_format_are_told_apart(record: Record) -> None:
    for name, shown in (
        ("M3E3b4h product=M3E3b6h", "M3E3b4h"),
        ("M3E3b4h outer=M10E5b14", "M3E3b4h outer M10E5b14"),
        ("I8f6 rounding=half_up outer=fp32", "I8f6 half up outer fp32"),
    ):
        record.rows[1].accumulator = name
        assert cells(record, record.rows[1])[1] == shown
    record.rows[1].accumulator = "M3E3b4h"
    labels = [label.get_text() for label in draw(record).axes[0].get_xticklabels()]
    assert labels == ["float32\n32 bits", "M3E3h\n7 bits", "M3E3\n7 bits"]


@pytest.fixture
def compared() -> Record:
    """Two kinds at two widths; one of each kind is fine-tuned, and the control."""
    tuned = {"stages": [stage(0.9, False), stage(0.95, True)], "seconds": 3.0}
    rows = [
        Row("M4E3", "fp32", {"accuracy": 0.97}, 1.0, tuned),
        Row("M4E3", "M7E4b10 product=M7E4b12", {"accuracy": 0.96}, 1.0, series="truncated"),
        Row("M4E3", "M7E4b10h product=M7E4b12h", {"accuracy": 0.98}, 1.0, series="half-unit"),
        Row("M4E3", "M3E3b5 product=M3E3b7", {"accuracy": 0.3}, 1.0, tuned, series="truncated"),
        Row("M4E3", "M3E3b5h product=M3E3b7h", {"accuracy": 0.8}, 1.0, tuned, series="half-unit"),
    ]
    return Record("demo", "n", "t", 0, Row("float32", "fp32", {"accuracy": 0.98}, 1.0), rows)


def test_kinds_of_accumulators_stand_side_by_side(compared: Record, tmp_path: Path) -> None:
    assert headings(compared) == ["operands", "accumulator", "bits", "products", "truncated", "half-unit"]
    assert lines(compared) == [
        (["M4E3", "float32", "32", "float32", "97.00 % → 95.00 %", ""], False),
        (["M4E3", "M7E4b10", "12", "M7E4b12", "96.00 %", "98.00 %"], False),
        (["M4E3", "M3E3b5", "7", "M3E3b7", "30.00 % → 95.00 %", "80.00 % → 95.00 %"], True),
    ]
    assert cells(compared, compared.baseline)[-2:] == ["98.00 %", ""]
    page = " ".join(write_report(compared, tmp_path, "page").page.read_text(encoding="utf-8").split())
    assert "7 bits, half-unit, fine-tuned" in page and "An arrow leads to" in page and "An h marks" in page
    compared.save_csv(tmp_path / "r.csv")
    assert [row["series"] for row in csv.DictReader((tmp_path / "r.csv").open())][2:4] == ["truncated", "half-unit"]


def test_the_plot_has_a_line_for_each_kind_of_accumulator(compared: Record) -> None:
    axes = draw(compared).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["M7E4\n12 bits", "M3E3\n7 bits"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [*compared.series, "the same, fine-tuned"]
    drawn = [line for line in axes.get_lines() if line.get_label() in compared.series]
    assert [list(line.get_ydata()) for line in drawn] == [[96.0, 30.0], [98.0, 80.0]]
    assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in drawn}) == 2
    hollow = [line for line in axes.get_lines() if line.get_markerfacecolor() == "none" and len(line.get_xdata())]
    assert [float(line.get_ydata()[0]) for line in hollow] == [95.0, 95.0]


@pytest.fixture
def calibrated() -> Record:
    def rows(operands: str, acc: str, *values: float) -> list[Row]:
        chosen = (None, "per layer", "per channel")
        files = (None, "layer.yaml", "channel.yaml")
        return [
            Row(operands, acc, {"accuracy": value}, 1.0, chosen=how, policy=file)
            for value, how, file in zip(values, chosen, files, strict=True)
        ]

    baseline = Row("float32", "fp32", {"accuracy": 0.98}, 1.0)
    made = [
        *rows("float32", "M7E4b10", 0.5, 0.8, 0.9),
        *rows("M4E3", "M7E4b10", 0.4, 0.7, 0.85),
        Row("M4E3", "M5E4", {"accuracy": 0.8}, 1.0, chosen="per channel", policy="template.yaml"),
    ]
    return Record("calibrate", "n", "t", 0, baseline, made)


def test_a_calibrated_accumulator_has_one_place_and_its_ranges_their_own_words(calibrated: Record) -> None:
    axes = draw(calibrated).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["M7E4\n12 bits", "M5E4\n10 bits"]
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names[0] == "float32 weights and activations, as given"
    assert names[-1] == "M4E3 weights and activations, per channel" and len(names) == 6
    lines = [line for line in axes.get_lines() if line.get_label() in names]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 6
    places = {round(float(x)) for line in lines for x in line.get_xdata()}
    assert places == {0, 1}


def test_the_calibrated_tables_tell_ranges_from_operands(calibrated: Record, tmp_path: Path) -> None:
    place = headings(calibrated).index("ranges")
    assert headings(calibrated)[place + 1 :] == ["accuracy"]
    assert cells(calibrated, calibrated.rows[0])[place] == "as given"
    assert cells(calibrated, calibrated.rows[2])[place:] == ["per channel", "90.00 %"]
    assert cells(calibrated, calibrated.baseline)[place] == "–"
    calibrated.save_csv(tmp_path / "r.csv")
    rows = list(csv.DictReader((tmp_path / "r.csv").open()))
    assert [row["ranges"] for row in rows[:4]] == ["as given", "as given", "per layer", "per channel"]


def test_the_calibrated_page_shows_the_value_before(calibrated: Record, tmp_path: Path) -> None:
    page = write_report(calibrated, tmp_path, "page").page.read_text(encoding="utf-8")
    assert "50.00 % → 90.00 %" in page and "12 bits, float32, calibrated per channel" in page
    assert "Calibration: ranges chosen on training examples" in page and "Ranges “per …”" in page
    assert calibrated.before(calibrated.rows[-1]) is None  # a template cannot be measured before
    calibrated.rows = calibrated.rows[-1:]
    page = write_report(calibrated, tmp_path, "page").page.read_text(encoding="utf-8")
    assert "<dd>80.00 %</dd>" in page


def test_the_best_is_the_highest_accuracy_and_the_lowest_perplexity(calibrated: Record) -> None:
    assert calibrated.best is calibrated.rows[2]
    for row in [calibrated.baseline, *calibrated.rows]:
        row.metrics = {"perplexity": 100 * row.metrics["accuracy"]}
    assert calibrated.best is calibrated.rows[4]  # of those with a file
    calibrated.rows = calibrated.rows[:1]
    assert calibrated.best is None


@pytest.mark.parametrize("count", [1, 3])
def test_markers_stand_in_the_middle_of_their_columns(record: Record, count: int) -> None:
    record.rows = record.rows[1 : 1 + count] if count == 1 else record.rows
    axes = draw(record).axes[0]
    low, high = axes.get_xlim()
    assert (low, high) == (-0.5, len(axes.get_xticks()) - 0.5)
    places = [float(x) for line in axes.get_lines() for x in line.get_xdata() if line.get_marker() in "o^Ds"]
    assert places and all(abs(x - round(x)) <= 0.25 for x in places)


def test_a_page_calls_dual_stages_what_they_are(record: Record, tmp_path: Path) -> None:
    def page() -> str:
        return " ".join(write_report(record, tmp_path, "page").page.read_text(encoding="utf-8").split())

    words = "Without underflow, sums below the accumulator's smallest magnitude are kept."
    assert words.replace("'", "&#39;") in page() or words in page()
    for one in record.rows[1].tuned["stages"]:
        one["stage"]["underflow"] = True
    assert "Without underflow, sums" not in page()


def test_a_record_of_nothing_is_refused(record: Record, tmp_path: Path) -> None:
    record.rows = []
    with pytest.raises(ValueError, match="the record of <digits> & more has no rows yet"):
        write_report(record, tmp_path, "page")
    path = tmp_path / "r.json"
    for metrics, message in (({}, "its baseline has no metrics"), ({"accuracy": None}, "float")):
        record.baseline.metrics = metrics
        record.save(path)
        with pytest.raises(ValueError, match=rf"r.json is no record of a run, such as evaluate.json: .*{message}"):
            Record.load(path)
