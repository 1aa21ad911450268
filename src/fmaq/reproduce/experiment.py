"""Experiments: one YAML file names a grid of short trainings, or of timed training steps, checked before it starts.

An experiment of trainings with every key it may have:

    name: mlp-fashion
    kind: training
    title: An MLP from scratch on Fashion-MNIST
    question: Which estimator trains best under the narrowest accumulators?
    notes: [What was reduced, and why.]
    task, model, data: ...                   # as in a recipe, see fmaq.recipes.recipe
    policy: {weight: M4E3, activation: M4E3} # of every cell; the grid gives the accumulator and the estimator
    pretrain: {stages: ..., batch_size: 64}  # in float32, once a seed; cells start there, else from random weights;
                                             # with `seed` once for all seeds, with `data` on other data
    schedules:                               # by name; each as a recipe's `finetune`, `calibrate` too
      from scratch: {stages: [{epochs: 3, learning_rate: 1e-3}]}
    grid:                                    # blocks, each the product of its lists
      - {accumulators: [fp32, M7E4b10 product=M7E4b12], estimators: [identity], seeds: [0, 1, 2]}
      - {accumulators: [M2E3b5 product=M2E3b7], estimators: [identity, immediate/diff], only: [from scratch]}
    across: accumulator                      # goes along the plot; or variant: the schedules do
    quick:                                   # the quick form: each key takes the place of the file's
      title: On digits, in short             # title and notes say what it really ran
      notes: [Not the experiment.]
      data: {kind: digits}
      grid: ...

An experiment of costs (`kind: cost`) has in place of task, model, data, pretrain and schedules

    networks:                                # by name
      MLP: {model: ..., data: ..., batch_size: 64}
    rounds: 9                                # how often a step is timed in turn with torch's

and its grid's blocks may name with `only` some of the networks, as the above some of the schedules.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import AfterValidator, Field, model_validator

from fmaq.emulation.rule import FP32
from fmaq.numerics import Accumulator
from fmaq.numerics.reference import ESTIMATORS
from fmaq.recipes.document import Document, Strict
from fmaq.recipes.explain import RecipeError, read_yaml
from fmaq.recipes.recipe import DataRecipe, FinetuneRecipe, ModelRecipe
from fmaq.recipes.values import Accumulators, PolicySource, TaskName
from fmaq.report.tables import name_of

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "reproduce"


def _known_estimators(values: list[str]) -> list[str]:
    for value in values:
        _one_of(value, ESTIMATORS, "estimator")
    return values


def _one_of(value: str, known: Any, what: str) -> None:
    if value not in known:
        near = difflib.get_close_matches(value, known, 1, 0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"no {what} {value!r}; {hint}It may be {', '.join(known)}")


@dataclass(frozen=True)
class Cell:
    """One point of a grid: a training, or a timed step.

    Attributes:
        accumulator: as a string, or "fp32".
        estimator: of the gradients; "identity" where the accumulator is "fp32".
        variant: the name of the schedule, or of the network.
        seed: of the weights, of the order of the examples and of augmentation.
    """

    accumulator: str
    estimator: str
    variant: str
    seed: int

    @property
    def parsed(self) -> Accumulator | None:
        """The accumulator; None for torch's own product."""
        return None if self.accumulator == FP32 else Accumulator.parse(self.accumulator)

    @property
    def bits(self) -> int:
        """Width of the accumulator; float32's own is 32."""
        return 32 if self.parsed is None else self.parsed.bits

    @property
    def label(self) -> str:
        """In words."""
        how = "float32" if self.parsed is None else f"{name_of(self.parsed)} {self.estimator}"
        return f"{how}, {self.variant}, seed {self.seed}"


class Block(Strict):
    """A block of a grid: every accumulator with every estimator and seed, and every schedule or network."""

    accumulators: Annotated[Accumulators, Field(min_length=1)]
    estimators: Annotated[list[str], AfterValidator(_known_estimators)] = Field(["identity"], min_length=1)
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field([0], min_length=1)
    only: list[str] = Field([])
    """The names of the schedules or networks; empty: all."""

    def cells(self, variants: list[str], seed: int | None = None) -> Iterator[Cell]:
        """The product of the lists; `variants` where the block names none, `seed` in place of its own."""
        for own_seed in self.seeds if seed is None else [seed]:
            for accumulator in self.accumulators:
                plain = accumulator == FP32
                name = FP32 if plain else str(Accumulator.parse(accumulator))
                for variant in self.only or variants:
                    for estimator in ["identity"] if plain else self.estimators:
                        yield Cell(name, estimator, variant, own_seed)


class Experiment(Document):
    """What all experiments have; the module's text shows every key."""

    what: ClassVar[str] = "experiment"
    variants_are: ClassVar[str]
    """What a table calls the variants of its cells."""

    name: str = Field(pattern=r"^[\w.-]+$")
    title: str
    question: str
    notes: list[str] = Field([])
    policy: PolicySource = Field({})
    grid: list[Block] = Field(min_length=1)
    across: Literal["accumulator", "variant"] = "accumulator"
    quick: dict[str, Any] = Field({})

    @property
    def variants(self) -> list[str]:
        """The names of the schedules, or of the networks."""
        raise NotImplementedError

    def cells(self, seed: int | None = None) -> list[Cell]:
        """The grid's cells, each once, in the order in which they run: by seed, so that a first answer comes early.

        Args:
            seed: in place of the grid's.
        """
        found = dict.fromkeys(cell for block in self.grid for cell in block.cells(self.variants, seed))
        return sorted(found, key=lambda cell: cell.seed)

    @model_validator(mode="after")
    def _blocks_name_variants(self) -> Experiment:
        for block in self.grid:
            for name in block.only:
                _one_of(name, self.variants, self.variants_are)
        return self


class Pretrain(FinetuneRecipe):
    """What cells start from: training in float32, once for each of their seeds."""

    seed: int | None = Field(None, ge=0, lt=2**32)
    """One for all cells, whose own seeds then decide their order of examples alone."""
    data: DataRecipe | None = None
    """In place of the experiment's training data."""


class TrainingExperiment(Experiment):
    """A grid of trainings over one model and its data."""

    variants_are: ClassVar[str] = "schedule"

    kind: Literal["training"] = "training"
    task: TaskName = "classification"
    model: ModelRecipe
    data: DataRecipe
    pretrain: Pretrain | None = None
    schedules: dict[str, FinetuneRecipe] = Field(min_length=1)

    @property
    def variants(self) -> list[str]:
        """The names of the schedules."""
        return list(self.schedules)


class Network(Strict):
    """A classifier whose training step is measured, and where its batch comes from."""

    model: ModelRecipe
    data: DataRecipe
    batch_size: int = Field(64, ge=1)


class CostExperiment(Experiment):
    """A grid of timed training steps."""

    variants_are: ClassVar[str] = "network"

    kind: Literal["cost"]
    networks: dict[str, Network] = Field(min_length=1)
    rounds: int = Field(9, ge=1)

    @property
    def variants(self) -> list[str]:
        """The names of the networks."""
        return list(self.networks)


KINDS: dict[str, type[TrainingExperiment] | type[CostExperiment]] = {
    "training": TrainingExperiment,
    "cost": CostExperiment,
}


def available(folder: Path = EXAMPLES) -> dict[str, tuple[str, str]]:
    """The experiments of a folder by name, with their title and question; nothing else of them is checked."""
    found = {}
    for path in sorted(folder.glob("*.yaml")):
        values, _ = read_yaml(path.read_text(encoding="utf-8"), str(path))
        found[path.stem] = (str(values.get("title", "")), str(values.get("question", "")))
    return found


def find(name: str, folder: Path = EXAMPLES) -> Path:
    """The file of an experiment: a path that ends in .yaml, or a name.

    Raises:
        RecipeError: there is none; names the nearest.
    """
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    if not folder.is_dir():
        raise RecipeError(f"{folder} is missing: the experiments are in the source tree only; or give a .yaml file")
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    try:
        _one_of(name, names, "experiment")
    except ValueError as error:
        raise RecipeError(f"{error}, or the path of a .yaml file") from None
    return folder / f"{name}.yaml"


def load(path: Path, quick: bool = False) -> TrainingExperiment | CostExperiment:
    """Read and check an experiment, in its whole or its quick form.

    Raises:
        RecipeError: the file is missing, is not YAML, or a key or value in it is wrong.
    """
    values, node = read_yaml(Experiment.read(path), str(path))
    if quick and isinstance(values, Mapping):
        values, node = _quick(values, node, str(path))
    kind = values.get("kind", "training") if isinstance(values, Mapping) else "training"
    try:
        _one_of(str(kind), KINDS, "kind of experiment")
    except ValueError as error:
        raise RecipeError(f"{path}: kind: {error}") from None
    return KINDS[str(kind)].check(values, node, path.parent, str(path))


def _quick(values: Mapping[str, Any], node: yaml.Node | None, source: str) -> tuple[dict[str, Any], yaml.Node | None]:
    """The quick form's values, and nodes, which know their lines; it is called <name>-quick, and titled by itself."""
    changes = values.get("quick")
    if not isinstance(changes, Mapping) or not changes:
        raise RecipeError(f"{source}: quick: this experiment has no quick form; give the keys that differ in it")
    if lacking := [key for key in ("title", "notes") if key not in changes]:
        raise RecipeError(
            f"{source}: quick: give it its own {' and '.join(lacking)}, which say what it runs: other data or sizes "
            f"than the experiment"
        )
    merged = {**values, "name": f"{values.get('name')}-quick", **changes}
    del merged["quick"]
    if isinstance(node, yaml.MappingNode):
        own = {str(key.value): (key, value) for key, value in node.value}
        inner = own.pop("quick")[1]
        own |= {str(key.value): (key, value) for key, value in inner.value}
        node = yaml.MappingNode(node.tag, list(own.values()), node.start_mark, node.end_mark)
    return merged, node
