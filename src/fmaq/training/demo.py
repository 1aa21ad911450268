"""The demo: digits in float32, then FP8 with ever smaller accumulators, then dual-stage fine-tuning of two of them.

Biases follow the paper's rule from a product bias for each number of exponent bits (arXiv 2401.14110, section 3):
b_acc = b_prod − ½·log2(chunk). The two accumulators to fine-tune are chosen from what was measured; as a control, the
same schedule also runs with float32 sums, so that more training is not mistaken for recovery.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save

from fmaq.emulation import Policy, attach, detach
from fmaq.numerics import Accumulator, paper_bias
from fmaq.training.data import digits
from fmaq.training.examples import Examples
from fmaq.training.files import write_bytes
from fmaq.training.loop import finetune
from fmaq.training.progress import Bars
from fmaq.training.provenance import provenance
from fmaq.training.record import Record, Row, show
from fmaq.training.residual_cnn import ResidualCNN, residual_cnn
from fmaq.training.schedule import Schedule, Stage
from fmaq.training.tasks import Metrics, evaluate

FP8 = "M4E3"
CHUNK = 16
PRODUCT_BIAS = {5: 16, 4: 12, 3: 7}
"""By exponent bits: fewer exponents leave less room below, so the range moves up to keep the largest sums."""
LADDER = ("M10E5", "M8E5", "M7E4", "M6E4", "M5E4", "M5E3", "M4E3", "M3E3", "M2E3")
"""16, 14, 12, 11, 10, 9, 8, 7 and 6 bits."""

FLOAT32 = Schedule((Stage(epochs=12, learning_rate=3e-3),), weight_decay=1e-2)
DUAL = Schedule.dual(epochs=(8, 4), learning_rates=(2e-3, 5e-4))
QUICK_FLOAT32 = Schedule((Stage(epochs=3, learning_rate=3e-3),), weight_decay=1e-2)
QUICK_DUAL = Schedule.dual(epochs=(1, 1), learning_rates=(2e-3, 5e-4))
CHANCE = 0.1
NOTES = [
    "Fine-tuned: the two accumulators that lost most, of those still above twice chance; and, as a control, "
    "float32 sums by the same schedule, which shows what more training alone does.",
    f"Biases: products as listed, sums by the paper's rule, b_acc = b_prod − ½·log2({CHUNK}).",
]


def ladder() -> list[Accumulator]:
    """The accumulators that are tried, widest first."""
    accumulators = []
    for name in LADDER:
        bias = PRODUCT_BIAS[int(name[-1])]
        accumulators.append(Accumulator(f"{name}b{paper_bias(bias, CHUNK)}", product=f"{name}b{bias}", chunk=CHUNK))
    return accumulators


def choose(record: Record, count: int = 2) -> list[Row]:
    """The rows to fine-tune: those that lost most, of those still twice as good as chance; widest first."""
    able = [row for row in record.rows if row.accumulator != "fp32" and row.metrics["accuracy"] > 2 * CHANCE]
    worst = sorted(able, key=lambda row: row.metrics["accuracy"])[:count]
    return [row for row in record.rows if row in worst]


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
        quick: fewer epochs and one accumulator to fine-tune, to see that everything runs.
    Returns:
        The record: the float32 baseline, then a row for each accumulator, two of them fine-tuned, and the control.
    """
    schedule = schedule or (QUICK_DUAL if quick else DUAL)
    train, test = digits()
    bars = bars or Bars(False)
    with bars:
        say(f"{len(train):,} training and {len(test)} test images of digits, 8×8; seed {seed}")
        model, record = _float32(train, test, output, seed, bars, QUICK_FLOAT32 if quick else FLOAT32)
        if quick:
            record.notes = [
                *record.notes,
                "Quick form: fewer epochs than the demo's, and one accumulator to fine-tune.",
            ]
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        say(f"float32: accuracy {_accuracy(record.baseline.metrics)}")
        _zero_shot(record, model, test, bars, say)
        record.save(output / "demo.json")
        for row in [record.rows[0], *choose(record, 1 if quick else 2)]:
            detach(model)
            model.load_state_dict(start)
            folder = output / ("control" if row.accumulator == "fp32" else f"{row.bits}-bit")
            epochs = " + ".join(str(stage.epochs) for stage in schedule.stages)
            say(f"fine-tuning {row.accumulator}{' as a control' if row.accumulator == 'fp32' else ''}: {epochs} epochs")
            result = finetune(
                model,
                _policy(row.accumulator),
                train,
                test,
                schedule,
                output=folder,
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
    for accumulator in ("fp32", *(str(acc) for acc in ladder())):
        metrics, seconds = _measure(model, accumulator, test, bars)
        record.rows.append(Row(FP8, accumulator, metrics, seconds))
        say(f"{record.rows[-1].bits:>2} bits zero-shot: accuracy {_accuracy(metrics):>8}  {accumulator}")


def _measure(model: ResidualCNN, accumulator: str, test: Examples, bars: Bars) -> tuple[Metrics, float]:
    detach(model)
    attach(model, _policy(accumulator))
    start = time.monotonic()
    metrics = evaluate(model, test, progress=bars)
    return metrics, time.monotonic() - start
