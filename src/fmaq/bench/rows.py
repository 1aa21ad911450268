"""What a benchmark found: rows with their targets, the machine, and the file that holds them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from fmaq.bench.timing import Comparison, compare
from fmaq.training.files import write_json

KIND = "fmaq bench"


class Unavailable(Exception):
    """Something that a measurement needs is not here; the message says what, and how to get it."""


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        suite, work, case: name it; together they are its key in a comparison of two files.
        value: the figure, in `unit`; "x" is a ratio, seconds to `against_seconds` (or, `at_least`, the inverse).
        against: what the ratio is to.
        seconds, against_seconds: of one run, medians.
        quartiles: first and third of the rounds' ratios.
        macs: multiply-accumulates of one run.
        target: the most (`at_least`: the least) that `value` should be; None where no target is set.
        instructions: vector instructions that compute, a step and vector of lanes, in the kernel's inner loop.
        moves: loads, stores and copies of vectors, likewise.
        bound: GMAC/s if the inner loop did nothing but issue `instructions` at the machine's rate, on every thread.
        skipped: why there is no figure.
    """

    suite: str
    work: str
    case: str
    target: float | None = None
    at_least: bool = False
    unit: Literal["x", "MiB", "s"] = "x"
    against: str = "torch float32"
    macs: int | None = None
    value: float | None = None
    seconds: float | None = None
    against_seconds: float | None = None
    quartiles: tuple[float, float] | None = None
    instructions: float | None = None
    moves: float | None = None
    bound: float | None = None
    skipped: str | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What names the row."""
        return self.suite, self.work, self.case

    @property
    def is_met(self) -> bool | None:
        """The target is met; None without a target or a figure."""
        if self.target is None or self.value is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target

    @property
    def rate(self) -> float | None:
        """GMAC/s."""
        return None if self.macs is None or self.seconds is None else self.macs / self.seconds / 1e9

    @property
    def against_rate(self) -> float | None:
        """GMAC/s of what it is compared with."""
        return None if self.macs is None or self.against_seconds is None else self.macs / self.against_seconds / 1e9

    @property
    def least(self) -> float | None:
        """The ratio to what it is compared with, were it as fast as `bound`."""
        return None if self.bound is None or self.against_rate is None else self.against_rate / self.bound

    def timed(self, found: Comparison) -> Row:
        """The row with a comparison's figures."""
        return replace(
            self, value=found.ratio, seconds=found.ours, against_seconds=found.theirs, quartiles=found.quartiles
        )


@dataclass(frozen=True)
class Case:
    """A row to be, and what fills it in; the argument is the number of rounds.

    `measure` makes its operands itself, so that a list of cases holds none.
    """

    row: Row
    measure: Callable[[Row, int], Row]

    def run(self, rounds: int) -> Row:
        """The row with its figures, or with the reason why it has none."""
        try:
            return self.measure(self.row, rounds)
        except Unavailable as reason:
            return replace(self.row, skipped=str(reason))


Operation = Callable[[], object]


def comparing(prepare: Callable[[], tuple[Operation, Operation]]) -> Callable[[Row, int], Row]:
    """A `Case.measure` that times two operations, ours and the other, against each other."""

    def measure(row: Row, rounds: int) -> Row:
        ours, theirs = prepare()
        return row.timed(compare(ours, theirs, rounds))

    return measure


@dataclass
class Report:
    """The rows of a run.

    Attributes:
        machine: what they were measured on, and how (`machine.describe`).
        is_complete: False in the file of a run that was interrupted.
    """

    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    is_complete: bool = False

    def save(self, path: Path) -> None:
        """Write JSON, atomically."""
        rows = [{k: v for k, v in asdict(row).items() if v is not None} for row in self.rows]
        write_json(path, {"kind": KIND, "machine": self.machine, "is_complete": self.is_complete, "rows": rows})

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read what `save` wrote.

        Raises:
            ValueError: the file cannot be read, or is not one of these; says which and what to do.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}; give a file that `fmaq bench --json` wrote") from None
        if not isinstance(found, dict) or found.get("kind") != KIND:
            raise ValueError(f"{path} is not the result of a benchmark; give a file that `fmaq bench --json` wrote")
        try:
            rows = [_row(values) for values in found["rows"]]
            return cls(dict(found["machine"]), rows, bool(found["is_complete"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is of another version of fmaq ({error}); measure again") from None


def _row(values: dict[str, Any]) -> Row:
    unknown = set(values) - {f.name for f in fields(Row)}
    if unknown:
        raise ValueError(f"unknown keys {', '.join(sorted(unknown))}")
    if "quartiles" in values:
        first, third = values["quartiles"]
        values = values | {"quartiles": (first, third)}
    return Row(**values)
