"""What an experiment shows: its tables in Markdown, its plot, and one self-contained page."""

from __future__ import annotations

from pathlib import Path

from fmaq.report import Written
from fmaq.reproduce.results import Results
from fmaq.reproduce.tables import cell_text, grids, save_markdown


def write_report(results: Results, folder: Path) -> Written:
    """Write `<name>.md`, `<name>.png` and `<name>.html` into a folder.

    Args:
        results: with at least one cell that did not fail.
    """
    from fmaq.report.plot import save_png, to_svg
    from fmaq.reproduce.plot import draw
    from fmaq.training.files import write_text

    save_markdown(results, folder / f"{results.name}.md")
    figure = draw(results)
    written = Written(folder / f"{results.name}.png", folder / f"{results.name}.html")
    save_png(figure, written.plot)
    write_text(written.page, render(results, to_svg(figure)))
    return written


def render(results: Results, plot: str) -> str:
    """The page as HTML text; `plot` is an SVG element."""
    from fmaq.report.page import fill

    return fill(
        "fmaq.reproduce",
        "experiment.html.jinja",
        title=results.title,
        kind=results.question,
        facts=_facts(results),
        plot=plot,
        label=f"{results.metrics[0]} by accumulator and estimator",
        grids=grids(results),
        notes=results.notes,
        seed=None,
        provenance=results.provenance,
        recipe=results.experiment,
    )


def _facts(results: Results) -> list[tuple[str, str]]:
    """The figures at the head of the page: float32's, and the size of the grid."""
    metric = results.metrics[0]
    found = [spread for key, spread in results.spread(metric).items() if key[0] == "fp32"]
    facts = [(f"float32 {metric}", cell_text(metric, found[0]))] if found else []
    done = len(results.cells)
    return [*facts, ("cells", str(done) if done == results.total else f"{done} of {results.total}")]
