"""The demo: digits in float32, then FP8 with ever smaller accumulators of three kinds, then dual-stage fine-tuning.

The kinds are truncation, as in the paper; half-unit formats, whose truncation is rounding to the nearest; and half-unit
formats with a wider one that adds up the chunks. All have the biases of the paper's rule (arXiv 2401.14110, section 3),
from a product bias for each number of exponent bits: b_acc = b_prod − ½·log2(chunk). What to fine-tune is chosen from
what was measured; as a control, the same schedule also runs with float32 sums, so that more training is not mistaken
for recovery.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save

from fmaq.emulation import Policy, attach, detach
from fmaq.numerics import Accumulator, paper_bias
from fmaq.recipes.data import digits
from fmaq.recipes.provenance import provenance
from fmaq.recipes.record import Record, Row, show
from fmaq.recipes.residual_cnn import ResidualCNN, residual_cnn
from fmaq.training.examples import Examples
from fmaq.training.files import write_bytes
from fmaq.training.loop import finetune
from fmaq.training.progress import Bars
from fmaq.training.schedule import Schedule, Stage
from fmaq.training.tasks import Metrics, evaluate

FP8 = "M4E3"
CHUNK = 16
PRODUCT_BIAS = {5: 16, 4: 12, 3: 7}
"""By exponent bits: fewer exponents leave less room below, so the range moves up to keep the largest sums."""
LADDER = ("M10E5", "M8E5", "M7E4", "M6E4", "M5E4", "M5E3", "M4E3", "M3E3", "M2E3", "M1E3")
"""16, 14, 12, 11, 10, 9, 8, 7, 6 and 5 bits."""
OUTER = "M10E5"
KINDS = {"truncated": ("", False), "half-unit": ("h", False), f"half-unit, chunks added in {OUTER}": ("h", True)}
"""What each kind adds to a format's name, and whether chunks are added in `OUTER`."""

FLOAT32 = Schedule((Stage(epochs=12, learning_rate=3e-3),), weight_decay=1e-2)
DUAL = Schedule.dual(epochs=(8, 4), learning_rates=(2e-3, 5e-4))
QUICK_FLOAT32 = Schedule((Stage(epochs=3, learning_rate=3e-3),), weight_decay=1e-2)
QUICK_DUAL = Schedule.dual(epochs=(1, 1), learning_rates=(2e-3, 5e-4))
CHANCE = 0.1
NOTES = [
    "Truncated: toward zero, as in the paper. Half-unit: half a unit of the last place is implied, so that to drop "
    f"bits is to round to the nearest. Chunks of {CHUNK} products are added in the same format, or in the one named.",
    f"All have the paper's biases: products as listed, sums b_acc = b_prod − ½·log2({CHUNK}). None is calibrated.",
    "Fine-tuned: of each kind the accumulator that lost most, of those still above twice chance; and, as a control, "
    "float32 sums by the same schedule, which shows what more training alone does.",
]


def ladder() -> list[tuple[str, Accumulator]]:
    """The accumulators that are tried, widest first, and the kind that each is of."""
    found = []
    for name in LADDER:
        product, outer = (PRODUCT_BIAS[int(format[-1])] for format in (name, OUTER))
        for kind, (suffix, has_outer) in KINDS.items():
            accumulator = Accumulator(
                f"{name}b{paper_bias(product, CHUNK)}{suffix}",
                product=f"{name}b{product}{suffix}",
                chunk=CHUNK,
                outer=f"{OUTER}b{paper_bias(outer, CHUNK)}" if has_outer else None,
            )
            found.append((kind, accumulator))
    return found


def choose(record: Record) -> list[Row]:
    """The rows to fine-tune: of each kind the one that lost most, of those still twice as good as chance."""
    able = [row for row in record.rows if row.series and row.metrics["accuracy"] > 2 * CHANCE]
    of_kinds = ([row for row in able if row.series == kind] for kind in record.series)
    return [min(rows, key=lambda row: row.metrics["accuracy"]) for rows in of_kinds if rows]


def run_demo(
    output: Path,
    seed: int = 0,
    bars: Bars | None = None,
    say: Callable[[str], None] = print,
    schedule: Schedule | None = None,
    quick: bool = False,
) -> Record:
    """Run the demo from the start.

    Args:
        output: folder for the weights, `demo.json`, `demo.csv` and a log and model for each fine-tuning.
        seed: of the weights and of the order of the examples.
        say: told one line a step of the way.
        schedule: of each fine-tuning, in place of the demo's own.
        quick: fewer epochs, to see that everything runs.
    Returns:
        The record: the float32 baseline, the control, then a row for each accumulator, one of each kind fine-tuned.
    """
    schedule = schedule or (QUICK_DUAL if quick else DUAL)
    train, test = digits()
    bars = bars or Bars(False)
    with bars:
        say(f"{len(train):,} training and {len(test)} test images of digits, 8×8; seed {seed}")
        model, record = _float32(train, test, output, seed, bars, QUICK_FLOAT32 if quick else FLOAT32)
        if quick:
            record.notes = [*record.notes, "Quick form: fewer epochs than the demo's."]
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        say(f"float32: accuracy {_accuracy(record.baseline.metrics)}")
        _zero_shot(record, model, test, bars, say)
        record.save(output / "demo.json")
        for row in [record.rows[0], *choose(record)]:
            detach(model)
            model.load_state_dict(start)
            name = f"{row.series}, {row.bits} bits" if row.series else "control, float32 sums"
            epochs = " + ".join(str(stage.epochs) for stage in schedule.stages)
            say(f"fine-tuning {name}: {epochs} epochs")
            result = finetune(
                model,
                _policy(row.accumulator),
                train,
                test,
                schedule,
                output=output / re.sub(r"\W+", "-", name),
                resume=False,
                seed=seed,
                progress=bars,
            )
            row.tuned = result.to_mapping()
            say(f"  accuracy {_accuracy(row.metrics)} → {_accuracy(result.metrics)}")
            record.save(output / "demo.json")
    detach(model)
    record.save_csv(output / "demo.csv")
    return record


def _accuracy(metrics: Metrics) -> str:
    return show("accuracy", metrics["accuracy"])


def _policy(accumulator: str) -> Policy:
    return Policy(accumulator=accumulator, weight=FP8, activation=FP8)


def _float32(
    train: Examples, test: Examples, output: Path, seed: int, bars: Bars, schedule: Schedule
) -> tuple[ResidualCNN, Record]:
    torch.manual_seed(seed)
    start = time.monotonic()
    model = residual_cnn()
    result = finetune(model, Policy(), train, test, schedule, seed=seed, progress=bars)
    detach(model)
    model.eval()
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_bytes(output / "float32.safetensors", save(weights))
    baseline = Row("float32", "fp32", result.metrics, time.monotonic() - start)
    return model, Record("demo", "digits", "classification", seed, baseline, [], provenance(), notes=NOTES)


def _zero_shot(record: Record, model: ResidualCNN, test: Examples, bars: Bars, say: Callable[[str], None]) -> None:
    for kind, accumulator in [(None, "fp32"), *((kind, str(acc)) for kind, acc in ladder())]:
        metrics, seconds = _measure(model, accumulator, test, bars)
        record.rows.append(row := Row(FP8, accumulator, metrics, seconds, series=kind))
        say(f"{row.bits:>2} bits zero-shot: accuracy {_accuracy(metrics):>8}  {kind or 'float32 sums'}")


def _measure(model: ResidualCNN, accumulator: str, test: Examples, bars: Bars) -> tuple[Metrics, float]:
    detach(model)
    attach(model, _policy(accumulator))
    start = time.monotonic()
    metrics = evaluate(model, test, progress=bars)
    return metrics, time.monotonic() - start
