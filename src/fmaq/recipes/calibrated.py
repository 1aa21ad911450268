"""A recipe's network under each of its accumulators: as given, and calibrated on its training examples."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fmaq.analysis.calibration import Per, calibrate, check_choices
from fmaq.emulation import Policy, detach
from fmaq.recipes.explain import RecipeError
from fmaq.recipes.policies import all_policies, emulates, is_template, nothing_emulated, operands_of, quantizes
from fmaq.recipes.recipe import Recipe
from fmaq.recipes.record import Record, Row
from fmaq.recipes.run import Prepared, Say, batches_of, line, prepare
from fmaq.training.progress import Bars


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
        **how: `rule`, `gain`, `shift`, `chunks` and `ranges` of `fmaq.calibrate`.

    Raises:
        RecipeError: the recipe's data have no training examples, or it neither emulates nor quantizes anything.
    """
    for per in pers:
        check_choices(per, how.get("rule", "trial"), ranges=how.get("ranges", "static"))
    policies = all_policies(recipe)
    if not any(emulates(policy) or quantizes(policy) for policy in policies):
        raise nothing_emulated(recipe)
    ready = prepare(recipe, device, bars)
    inputs = training_inputs(ready, batches)
    record = ready.record("calibrate")
    say(line(record, record.baseline))

    def measure(policy: Policy, asked: Policy, chosen: str | None = None, file: str | None = None) -> None:
        with ready.bars:
            metrics, seconds = ready.measure(policy)
        row = Row(operands_of(asked), str(asked.accumulator), metrics, seconds, chosen=chosen, policy=file)
        record.rows.append(row)
        say(line(record, row))
        record.save(output / "calibrate.json")
        record.save_csv(output / "calibrate.csv")

    for policy in policies:
        if not is_template(policy):
            measure(policy, policy)
        if not (emulates(policy) or (quantizes(policy) and how.get("ranges", "static") == "static")):
            continue
        detach(ready.model)
        ready.model.eval()
        for per in pers:
            start = time.monotonic()
            found = calibrate(ready.model, policy, inputs, per, **how)
            seconds = time.monotonic() - start
            path = output / f"{_file_name(policy)}-{per}.yaml"
            found.save(path)
            record.notes.append(
                f"{path.name}: {policy.accumulator}, {operands_of(policy)}, per {per}, chosen in {seconds:.1f} s; the "
                f"policy's own accumulator became {found.accumulator}."
            )
            say(f"chosen in {seconds:.1f} s: {path}")
            measure(found, policy, f"per {per}", path.name)
            detach(ready.model)
    return record


def training_inputs(ready: Prepared, batches: int) -> list[Any]:
    """The first batches of the recipe's training examples, as the model takes them."""
    if ready.train is None:
        raise RecipeError("this recipe cannot be calibrated: its data have no training examples; give data.train")
    return batches_of(ready.train, ready.recipe.data.batch_size, batches)


def _file_name(policy: Policy) -> str:
    return re.sub(r"[^\w.]+", "-", f"{policy.accumulator}-{operands_of(policy)}").strip("-")
