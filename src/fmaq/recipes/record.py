"""The record of a run: what was measured, under which accumulator, and where it came from; kept as one JSON file."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fmaq.numerics import Accumulator
from fmaq.training.files import write_json, write_text
from fmaq.training.tasks import Metrics

PERCENT = {"accuracy", "f1", "exact_match"}
LOWER_IS_BETTER = {"perplexity", "loss"}
AS_GIVEN = "as given"
"""How a table calls ranges that calibration did not choose."""


def show(name: str, value: float | None) -> str:
    """A metric's value as people read it: accuracies in per cent, the rest with three decimals."""
    if value is None:
        return "–"
    if name in PERCENT:
        return f"{100 * value:.2f} %"
    return f"{value:.3f}" if abs(value) < 1e4 else f"{value:.3g}"


@dataclass
class Row:
    """One accumulator's line of a table.

    Args:
        operands: format of weights and activations, `"M4E3"`, or `"M4E3/int8"` if they differ.
        accumulator: `"fp32"` or an accumulator as a string.
        metrics: without any fine-tuning.
        seconds: that measuring took.
        tuned: what fine-tuning reached, as `FinetuneResult.to_mapping`.
        chosen: how calibration chose the accumulator's ranges, "per channel" say; None: it is as it was given.
        policy: name of the file, beside the record, with the policy that was measured, where it has one of its own.
        series: what the accumulator is one of, where a run compares kinds of accumulators width by width: a column of
            its table and a line of its plot.
    """

    operands: str
    accumulator: str
    metrics: Metrics
    seconds: float
    tuned: dict[str, Any] | None = None
    chosen: str | None = None
    policy: str | None = None
    series: str | None = None

    @property
    def parsed(self) -> Accumulator | None:
        """The accumulator; None for torch's own product."""
        return None if self.accumulator == "fp32" else Accumulator.parse(self.accumulator)

    @property
    def bits(self) -> int:
        """Width of the accumulator; float32's own is 32."""
        return 32 if self.parsed is None else self.parsed.bits

    def after(self, stage: int, metric: str) -> float | None:
        """A metric under this row's accumulator after stage 0, 1, ...; None if there was no such stage."""
        stages = self.tuned["stages"] if self.tuned else []
        return stages[stage]["metrics"].get(metric) if stage < len(stages) else None


@dataclass
class Record:
    """A run: its float32 baseline, its rows, and its provenance."""

    kind: str
    name: str
    task: str
    seed: int
    baseline: Row
    rows: list[Row] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def metric(self) -> str:
        """The name of the most telling metric, the first."""
        return next(iter(self.baseline.metrics))

    @property
    def series(self) -> list[str]:
        """The kinds of accumulators that the run compares width by width; none, where it just lists accumulators."""
        return list(dict.fromkeys(row.series for row in self.rows if row.series))

    @property
    def is_calibrated(self) -> bool:
        """Whether any row's ranges were chosen by calibration."""
        return any(row.chosen for row in self.rows)

    def before(self, row: Row) -> Row | None:
        """The row of the same accumulator and operands as given, before calibration; None if it was not measured."""
        same = (r for r in self.rows if (r.operands, r.accumulator, r.chosen) == (row.operands, row.accumulator, None))
        return next(same, None) if row.chosen else None

    @property
    def best(self) -> Row | None:
        """The row of the best metric, of those whose policy is in a file; None if there are none."""
        sign = -1 if self.metric in LOWER_IS_BETTER else 1
        rows = [row for row in self.rows if row.policy]
        return max(rows, key=lambda row: sign * row.metrics[self.metric], default=None)

    @property
    def stages(self) -> int:
        """The most stages that any row was fine-tuned in."""
        return max((len(row.tuned["stages"]) for row in self.rows if row.tuned), default=0)

    def save(self, path: Path) -> None:
        """Write the record as JSON, atomically."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read a record that `save` wrote.

        Raises:
            OSError: there is no such file.
            ValueError: it holds something else.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            rows = [Row(**row) for row in values.pop("rows")]
            record = cls(baseline=Row(**values.pop("baseline")), rows=rows, **values)
            if not record.baseline.metrics:
                raise ValueError("its baseline has no metrics")
            for row in [record.baseline, *rows]:
                row.metrics = {name: float(value) for name, value in row.metrics.items()}
            return record
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is no record of a run, such as evaluate.json: {error}") from None

    def save_csv(self, path: Path) -> None:
        """Write the rows, the baseline first, as CSV: one column a metric, and one a metric and stage."""
        metrics = list(self.baseline.metrics)
        text = io.StringIO()
        writer = csv.writer(text)
        after = [(stage, name) for stage in range(self.stages) for name in metrics]
        tuned_names = [f"{name} after stage {stage + 1}" for stage, name in after]
        ranges = ["ranges"] if self.is_calibrated else []
        series = ["series"] if self.series else []
        writer.writerow(["operands", "accumulator", "bits", *series, *ranges, *metrics, *tuned_names, "seconds"])
        for row in [self.baseline, *self.rows]:
            tuned = [row.after(stage, name) for stage, name in after]
            values = [row.metrics.get(name) for name in metrics]
            chosen = [row.chosen or AS_GIVEN] if self.is_calibrated else []
            kind = [row.series or ""] if self.series else []
            own = [row.operands, row.accumulator, row.bits, *kind, *chosen]
            writer.writerow([*own, *values, *tuned, f"{row.seconds:.2f}"])
        write_text(path, text.getvalue())
