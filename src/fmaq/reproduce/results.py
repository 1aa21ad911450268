"""What an experiment found: a result for each cell, kept as JSON, and the spread over seeds that tables show."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fmaq.reproduce.experiment import Cell
from fmaq.training.files import write_json, write_text
from fmaq.training.tasks import Metrics


@dataclass
class CellResult:
    """A finished cell.

    Attributes:
        metrics: in the end, under the cell's own accumulator; empty where it failed.
        failure: why there are none: the training diverged.
        stages: of a training, as `FinetuneResult.to_mapping` has them.
        seconds: that it took.
        commit: of the source tree that it ran in.
    """

    cell: Cell
    metrics: Metrics
    failure: str | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    commit: str | None = None

    def save(self, folder: Path) -> None:
        """Write it into the cell's folder, atomically."""
        write_json(folder / "cell.json", asdict(self))

    @classmethod
    def kept(cls, folder: Path) -> CellResult | None:
        """What `save` wrote into a folder, if it did."""
        path = folder / "cell.json"
        return cls.from_mapping(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> CellResult:
        """A result from what `asdict` made of it."""
        return cls(**{**values, "cell": Cell(**values["cell"])})


def folder_name(label: str, identity: Mapping[str, Any]) -> str:
    """A folder's name, to read and, by a hash, for this identity alone: whatever changes it gets a new folder.

    Args:
        identity: all that decides what the folder keeps; JSON.
    """
    text = json.dumps(identity, sort_keys=True, ensure_ascii=False)
    return f"{re.sub(r'[^A-Za-z0-9.]+', '-', label)}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Spread:
    """A metric over the seeds of otherwise equal cells.

    Attributes:
        values: of the seeds that did not fail.
        failed: how many did.
    """

    values: tuple[float, ...]
    failed: int = 0

    @property
    def mean(self) -> float | None:
        """None where all failed."""
        return sum(self.values) / len(self.values) if self.values else None

    @property
    def low(self) -> float:
        """The least."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The largest."""
        return max(self.values)


Key = tuple[str, str, str]
"""Accumulator, estimator, variant."""


@dataclass
class Results:
    """An experiment's results so far.

    Attributes:
        variants_are: what the variants are, "schedule" or "network".
        across: what goes along the plot, "accumulator" or "variant".
        total: how many cells the grid has.
    """

    name: str
    title: str
    question: str
    kind: str
    variants_are: str
    across: str
    total: int
    notes: list[str] = field(default_factory=list)
    cells: list[CellResult] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    experiment: dict[str, Any] = field(default_factory=dict)

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics, the most telling first."""
        return next((list(result.metrics) for result in self.cells if result.metrics), [])

    def spread(self, metric: str) -> dict[Key, Spread]:
        """The metric by accumulator, estimator and variant, in the cells' order."""
        groups: dict[Key, list[CellResult]] = {}
        for result in self.cells:
            cell = result.cell
            groups.setdefault((cell.accumulator, cell.estimator, cell.variant), []).append(result)
        return {
            key: Spread(
                tuple(result.metrics[metric] for result in group if metric in result.metrics),
                sum(result.failure is not None for result in group),
            )
            for key, group in groups.items()
        }

    def save(self, path: Path) -> None:
        """Write everything as JSON, atomically."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read what `save` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        cells = [CellResult.from_mapping(result) for result in values.pop("cells")]
        return cls(cells=cells, **values)

    def save_csv(self, path: Path) -> None:
        """Write a line for each cell, atomically."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(
            ["accumulator", "bits", "estimator", self.variants_are, "seed", *self.metrics, "failure", "cell_seconds"]
        )
        for result in self.cells:
            cell = result.cell
            own = [cell.accumulator, cell.bits, cell.estimator, cell.variant, cell.seed]
            values = [result.metrics.get(name) for name in self.metrics]
            writer.writerow([*own, *values, result.failure, f"{result.seconds:.2f}"])
        write_text(path, text.getvalue())
