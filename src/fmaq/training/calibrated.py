"""A recipe's network under each of its accumulators: as given, and calibrated on its training examples."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fmaq.analysis.calibration import Per, calibrate, check_choices
from fmaq.emulation import Policy, detach
from fmaq.numerics import Accumulator
from fmaq.training.examples import Examples, Pairs, Windows, as_examples
from fmaq.training.explain import RecipeError
from fmaq.training.progress import Bars
from fmaq.training.recipe import Recipe
from fmaq.training.record import Record, Row
from fmaq.training.run import Prepared, Say, line, operands_of, prepare, variants

AS_GIVEN = "as given"


def run_calibrate(
    recipe: Recipe,
    output: Path,
    pers: Sequence[Per] = ("channel",),
    batches: int = 2,
    device: str = "cpu",
    bars: Bars | None = None,
    say: Say = print,
    **how: Any,
) -> Record:
    """Measure the network in float32, and under each accumulator as given (if it has biases) and calibrated.

    Args:
        output: folder for `calibrate.json` and `.csv`, and for every calibrated policy as YAML.
        pers: see `per` of `fmaq.calibrate`; one policy each.
        batches: of training examples, of the recipe's batch size, to calibrate on.
        **how: `rule`, `gain`, `shift` and `chunks` of `fmaq.calibrate`.

    Raises:
        RecipeError: the recipe's data have no training examples.
    """
    for per in pers:
        check_choices(per, how.get("rule", "trial"))
    ready = prepare(recipe, device, bars)
    inputs = training_inputs(ready, batches)
    record = ready.record("calibrate")
    say(line(record, record.baseline))

    def measure(policy: Policy, how: str) -> None:
        with ready.bars:
            metrics, seconds = ready.measure(policy)
        record.rows.append(Row(f"{operands_of(policy)}, {how}", str(policy.accumulator), metrics, seconds))
        say(line(record, record.rows[-1]))
        record.save(output / "calibrate.json")
        record.save_csv(output / "calibrate.csv")

    for policy in variants(recipe, ready.policy):
        if isinstance(policy.accumulator, Accumulator) and not policy.accumulator.is_template:
            measure(policy, AS_GIVEN)
        detach(ready.model)
        ready.model.eval()
        for per in pers:
            start = time.monotonic()
            found = calibrate(ready.model, policy, inputs, per, **how)
            seconds = time.monotonic() - start
            path = output / f"{_file_name(policy)}-{per}.yaml"
            found.save(path)
            record.notes.append(
                f"{path.name}: {policy.accumulator}, {operands_of(policy)}, per {per}, chosen in {seconds:.1f} s"
            )
            say(f"chosen in {seconds:.1f} s: {path}")
            measure(found, f"per {per}")
            detach(ready.model)
    return record


def training_inputs(ready: Prepared, batches: int) -> list[Any]:
    """The first batches of the recipe's training examples, as the model takes them."""
    if ready.train is None:
        raise RecipeError("this recipe cannot be calibrated: its data have no training examples; give data.train")
    return batches_of(ready.train, ready.recipe.data.batch_size, batches)


def batches_of(data: Any, size: int, count: int) -> list[Any]:
    """The inputs of the first batches of examples, windows or pairs."""
    data = as_examples(data)
    if isinstance(data, Mapping):  # of a task of its own: the pairs among what it takes
        data = next((value for value in data.values() if isinstance(value, Pairs)), data)
    if not isinstance(data, Examples | Windows | Pairs):
        raise RecipeError(f"examples, windows or pairs are needed, and the data are {type(data).__name__}")
    slices = [slice(i * size, (i + 1) * size) for i in range(count) if i * size < len(data)]
    if isinstance(data, Pairs):
        return [{name: tensor[part] for name, tensor in data.inputs.items()} for part in slices]
    return [data.batch(part)[0] for part in slices]


def _file_name(policy: Policy) -> str:
    return re.sub(r"[^\w.]+", "-", f"{policy.accumulator}-{operands_of(policy)}").strip("-")
