"""Tables for the terminal: a report's rows, and two reports side by side."""

from __future__ import annotations

from collections.abc import Callable

from rich import box
from rich.table import Table
from rich.text import Text

from fmaq.bench.rows import Report, Row

SAME = ("processor", "threads", "target", "torch", "torch_capability")


def report_table(report: Report) -> Table:
    """Every row with its figures, its target and whether it is met."""
    machine = report.machine
    title = f"{machine.get('processor')}, {machine.get('threads')} thread(s), {machine.get('target')}"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for heading in ("work", "case"):
        table.add_column(heading)
    for heading in (
        "value",
        "quartiles",
        "target",
        "",
        "GMAC/s",
        "against",
        "instructions",
        "bound, GMAC/s",
        "at the bound",
    ):
        table.add_column(heading, justify="right")
    suite = None
    for row in report.rows:
        if suite not in (None, row.suite):
            table.add_section()
        suite = row.suite
        table.add_row(*_cells(row))
    return table


def _cells(row: Row) -> list[str | Text]:
    if row.skipped is not None:
        return [row.work, row.case, Text("skipped", style="yellow")]
    return [
        row.work,
        row.case if row.against == "torch float32" else f"{row.case} (to {row.against})",
        value_text(row.value, row.unit),
        "" if row.quartiles is None else f"{row.quartiles[0]:.2f} – {row.quartiles[1]:.2f}",
        _target(row),
        _verdict(row),
        _number(row.rate),
        _number(row.against_rate),
        _number(row.instructions),
        _number(row.bound),
        value_text(row.least, "x"),
    ]


def _target(row: Row) -> str:
    return "" if row.target is None else ("≥ " if row.at_least else "≤ ") + value_text(row.target, row.unit)


def _verdict(row: Row) -> Text:
    if row.is_met is None:
        return Text("")
    return Text("met", style="green") if row.is_met else Text("missed", style="red")


def value_text(value: float | None, unit: str) -> str:
    """A figure with its unit."""
    if value is None:
        return ""
    return {"x": f"{value:.2f}×", "MiB": f"{value:.1f} MiB", "s": f"{value:.3f} s"}[unit]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def summary(report: Report) -> list[str]:
    """How many targets are met, and why rows were skipped, a line each."""
    judged = [row for row in report.rows if row.is_met is not None]
    skipped = [f"skipped: {row.work}, {row.case}: {row.skipped}" for row in report.rows if row.skipped is not None]
    return [f"{sum(bool(row.is_met) for row in judged)} of {len(judged)} targets met", *skipped]


def comparison_table(old: Report, new: Report) -> Table:
    """Rows of both, and the change; it is coloured where the quartiles of the two do not overlap."""
    table = Table(title=f"{_version(old)} → {_version(new)}", box=box.SIMPLE_HEAD)
    for heading in ("work", "case"):
        table.add_column(heading)
    for heading in ("old", "new", "change", "target", ""):
        table.add_column(heading, justify="right")
    before, after = ({row.key: row for row in report.rows} for report in (old, new))
    for key in [*before, *(key for key in after if key not in before)]:
        was, now = before.get(key), after.get(key)
        one = now or was
        assert one is not None  # the key is from one of the two
        table.add_row(
            one.work,
            one.case,
            _figure(was),
            _figure(now),
            _change(was, now),
            _target(one),
            Text("") if now is None else _verdict(now),
        )
    return table


def differences(old: Report, new: Report) -> list[str]:
    """What makes two reports hard to compare: another processor, number of threads, …; one line each."""
    lines = [
        f"{name.replace('_', ' ')} differs: {old.machine.get(name)} and {new.machine.get(name)}"
        for name in SAME
        if old.machine.get(name) != new.machine.get(name)
    ]
    unfinished = [which for which, report in (("old", old), ("new", new)) if not report.is_complete]
    return lines + [f"the {which} run was interrupted" for which in unfinished]


def _version(report: Report) -> str:
    commit = str(report.machine.get("commit") or "")
    named = f"fmaq {report.machine.get('fmaq')}" + (f" ({commit[:10]}{'+' * commit.endswith('+')})" if commit else "")
    return f"{named}, {report.machine.get('target')}"


def _figure(row: Row | None) -> str:
    if row is None:
        return "–"
    return "skipped" if row.value is None else value_text(row.value, row.unit)


def _change(was: Row | None, now: Row | None) -> Text:
    if was is None or now is None or was.value is None or now.value is None:
        return Text("")
    text = f"{(now.value / was.value - 1) * 100:+.0f} %" if was.value else ""
    worse: Callable[[float, float], bool] = (lambda x, y: x < y) if now.at_least else (lambda x, y: x > y)
    if not _is_clear(was, now):
        return Text(text, style="dim")
    return Text(text, style="red" if worse(now.value, was.value) else "green")


def _is_clear(was: Row, now: Row) -> bool:
    if was.quartiles is None or now.quartiles is None:
        return was.value != now.value
    return was.quartiles[1] < now.quartiles[0] or now.quartiles[1] < was.quartiles[0]
