"""The page: a record's table, plot, schedule and provenance in one HTML file that needs nothing else."""

from __future__ import annotations

import importlib.resources
from typing import Any

from fmaq.recipes.record import Record, show
from fmaq.report.tables import cells, headings, lines, name_of, words

KINDS = {
    "demo": "Demo: digits under ever smaller accumulators",
    "evaluate": "Zero-shot evaluation",
    "finetune": "Fine-tuning",
    "calibrate": "Calibration: ranges chosen on training examples, without training",
}


def fill(package: str, template: str, **values: Any) -> str:
    """A page as HTML text, from a template of `package` that extends this package's layout.

    Args:
        values: of the template's variables; those of the layout are `title`, `kind`, `facts` (names and values), `plot`
            (an SVG element), `label` (of the plot, in words), `seed`, `provenance` and `recipe`.
    """
    import jinja2

    def source(name: str) -> str | None:
        found = (importlib.resources.files(where).joinpath(name) for where in (package, "fmaq.report"))
        return next((file.read_text(encoding="utf-8") for file in found if file.is_file()), None)

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(source),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(**values)


def render(record: Record, plot: str) -> str:
    """The page as HTML text; `plot` is an SVG element."""
    return fill(
        "fmaq.report",
        "page.html.jinja",
        title=record.name,
        kind=KINDS.get(record.kind, record.kind),
        record=record,
        plot=plot,
        label=f"{record.metric} by accumulator",
        seed=record.seed,
        provenance=record.provenance,
        recipe=record.recipe,
        headings=headings(record),
        words=words(record),
        baseline=cells(record, record.baseline),
        rows=lines(record),
        facts=_facts(record),
        schedules=_schedules(record),
    )


def _facts(record: Record) -> list[tuple[str, str]]:
    """The figures at the head of the page: name and value."""
    metric = record.metric
    facts = [(f"float32 {metric}", show(metric, record.baseline.metrics[metric]))]
    for row in record.rows:
        if row.tuned and row.parsed:
            before, after = row.metrics[metric], row.after(record.stages - 1, metric)
            facts.append(
                (
                    f"{row.bits} bits, {f'{row.series}, ' if row.series else ''}fine-tuned",
                    f"{show(metric, before)} → {show(metric, after)}",
                )
            )
    best = record.best
    if best is not None:
        shown = [show(metric, row.metrics[metric]) for row in (record.before(best), best) if row is not None]
        facts.append((f"{best.bits} bits, {best.operands}, calibrated {best.chosen}", " → ".join(shown)))
    return facts


def _schedules(record: Record) -> list[dict[str, str]]:
    """A line for each stage of each fine-tuning."""
    found = []
    for row in record.rows:
        for index, stage in enumerate(row.tuned["stages"] if row.tuned else []):
            plan = stage["stage"]
            found.append(
                {
                    "accumulator": name_of(row.parsed),
                    "stage": str(index + 1),
                    "underflow": _underflow(plan),
                    "epochs": str(plan["epochs"]),
                    "rate": f"{plan['learning_rate']:g}{', cosine' if plan['cosine'] else ''}",
                    "loss": "–" if stage["loss"] is None else f"{stage['loss']:.4f}",
                    "own": show(record.metric, stage["own_metrics"].get(record.metric)),
                    "target": show(record.metric, stage["metrics"].get(record.metric)),
                }
            )
    return found


def _underflow(plan: dict[str, Any]) -> str:
    begins = plan.get("underflow_from", 0.0)  # records from before there was such a key lack it
    return "no" if not plan["underflow"] else f"from {begins:.0%} on" if begins else "yes"
