"""Recipes: one YAML file that names a run's model, data, policy and schedule, checked before anything starts.

    name: mine-12bit                         # names the output folder, runs/<name>
    model: {callable: model.py:network, weights: trained.safetensors}
    data: {kind: npz, train: train.npz, test: test.npz}
    policy: {accumulator: paper12, weight: M4E3, activation: M4E3}

`docs/training.md` shows every key; the classes below are what is checked. Which accumulators a command takes from a
recipe is in `fmaq.training.policies`. Paths are relative to the recipe's own folder, and may use `~`, `${NAME}` and
`${NAME:-default}`.
"""

from __future__ import annotations

import difflib
import inspect
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from fmaq.analysis.calibration import Per, Ranges
from fmaq.emulation import Policy
from fmaq.emulation.policy import FP32
from fmaq.numerics import Accumulator
from fmaq.training.callables import load_callable, resolve
from fmaq.training.explain import RecipeError, explain, read_yaml
from fmaq.training.schedule import Schedule, Stage
from fmaq.training.tasks import TASKS

EXAMPLES_CACHE = ".cache/examples"
"""The folder of what `make fetch` downloads, in the source tree."""

VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def expand(text: str) -> str:
    """Put in the values of `${NAME}` and `${NAME:-default}`, and of a leading `~`."""

    def value(match: re.Match[str]) -> str:
        name, default = match.groups()
        found = os.environ.get(name) or default
        if found is None:
            raise ValueError(f"the environment variable {name} is not set; set it, or write ${{{name}:-default}}")
        return found

    return os.path.expanduser(VARIABLE.sub(value, text))


def _located(value: Any, info: ValidationInfo) -> Any:
    base = (info.context or {}).get("base", Path("."))
    return base / expand(value) if isinstance(value, str) else value


def _existing(value: Any, info: ValidationInfo) -> Any:
    path = _located(value, info)
    if isinstance(path, Path) and not path.exists():
        raise ValueError(f"{os.path.normpath(path)} does not exist{_what_may_help(value)}")
    return Path(os.path.normpath(path)) if isinstance(path, Path) else path


def _what_may_help(value: Any) -> str:
    """Where a file that is missing may come from: the variables in its name, and `make fetch`."""
    found = VARIABLE.finditer(value) if isinstance(value, str) else ()
    hints = [
        _of_variable(name, default, rest=str(value)[match.end() :].lstrip("/"))
        for match in found
        for name, default in [match.groups()]
    ]
    if EXAMPLES_CACHE in str(value):
        hints.append("; `make fetch` downloads it")
    return "".join(hints)


def _of_variable(name: str, default: str | None, rest: str) -> str:
    now = f"now {os.environ[name]}" if os.environ.get(name) else f"which is not set (its default here is {default})"
    return f"; set the environment variable {name}, {now}, to the folder that has {rest or 'it'}"


def _is_callable(value: str, info: ValidationInfo) -> str:
    name = resolve(expand(value), (info.context or {}).get("base", Path(".")))
    load_callable(name)
    return name


def _policy_source(value: Any, info: ValidationInfo) -> Any:
    if isinstance(value, str | Path):
        value = _existing(value, info)
        Policy.load(value)
    else:
        _try(Policy.parse, value)
    return value


def load_policy(source: dict[str, Any] | Path) -> Policy:
    """The policy that a recipe's `policy` describes, or its file."""
    return Policy.load(source) if isinstance(source, Path) else Policy.parse(source)


def _known_task(value: str, info: ValidationInfo) -> str:
    if ":" in value:
        return _is_callable(value, info)
    if value not in TASKS:
        near = difflib.get_close_matches(value, TASKS, 1, 0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"no task {value!r}; {hint}It may be {', '.join(TASKS)}, or module:function")
    return value


def _readable_accumulators(value: list[Any]) -> list[Any]:
    for item in value:
        if item != FP32 and not (accumulator := _try(Accumulator.parse, item)).is_template:
            accumulator.check_float32()
    return value


def _try(make: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call it; a TypeError becomes the ValueError that pydantic reports."""
    try:
        return make(*arguments, **named)
    except TypeError as error:
        raise ValueError(str(error)) from error


AnyPath = Annotated[Path, BeforeValidator(_located)]
ExistingPath = Annotated[Path, BeforeValidator(_existing)]
CallableName = Annotated[str, AfterValidator(_is_callable)]
TaskName = Annotated[str, AfterValidator(_known_task)]
PolicySource = Annotated[dict[str, Any] | Path, BeforeValidator(_policy_source)]
Accumulators = Annotated[list[str | dict[str, Any]], AfterValidator(_readable_accumulators)]


class Strict(BaseModel):
    """A part of a recipe: an unknown key is an error that names the nearest valid one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            for key in values:
                if key not in cls.model_fields:
                    near = difflib.get_close_matches(str(key), cls.model_fields, 1, 0.4)
                    hint = f"did you mean {near[0]!r}? " if near else ""
                    known = ", ".join(cls.model_fields)
                    raise PydanticCustomError(
                        "unknown_key",
                        "unknown key; {hint}It may be: {known}",
                        {"key": str(key), "hint": hint, "known": known},
                    )
        return values


def _check_arguments(name: str, arguments: Mapping[str, Any], given: tuple[str, ...] = ()) -> None:
    function = load_callable(name)
    try:
        signature = inspect.signature(function)
    except ValueError:  # some C functions have none
        return
    try:
        signature.bind_partial(**arguments)
        missing = [
            p.name
            for p in signature.parameters.values()
            if p.default is p.empty
            and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
            and p.name not in arguments
            and p.name not in given
        ]
    except TypeError as error:
        raise ValueError(f"{name}{signature} cannot be called with these arguments: {error}") from None
    if missing:
        raise ValueError(f"{name}{signature} also needs arguments: {', '.join(missing)}")


class ModelRecipe(Strict):
    """The network: a function of yours, or a transformers checkpoint."""

    callable: CallableName | None = None
    arguments: dict[str, Any] = {}
    weights: ExistingPath | None = None
    transformers: str | None = None
    head: str | None = None
    gguf_file: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> ModelRecipe:
        if (self.callable is None) == (self.transformers is None):
            raise ValueError(
                "give exactly one of callable (a function that returns a module) and transformers (a checkpoint)"
            )
        if self.callable is not None and (self.head or self.gguf_file):
            raise ValueError("head and gguf_file belong to transformers checkpoints; leave them out with callable")
        if self.weights is not None and self.weights.suffix != ".safetensors":
            raise ValueError(f"weights must be a .safetensors file, got {self.weights.name}")
        if self.callable is not None:
            _check_arguments(self.callable, self.arguments)
        return self

    @field_validator("transformers")
    @classmethod
    def _folder_or_id(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None:
            return None
        text = expand(value)
        folder = (info.context or {}).get("base", Path(".")) / text
        if folder.is_dir():
            return os.path.normpath(folder)
        if text.startswith((".", "/")) or text.count("/") > 1:
            hint = _what_may_help(value)
            raise ValueError(f"{os.path.normpath(folder)} is not a folder (a hub id is name or owner/name){hint}")
        return text


class _Data(Strict):
    batch_size: int = Field(128, ge=1)
    """Examples evaluated at once."""
    limit: int | None = Field(None, ge=1)
    """Take only the first of each split."""


class DigitsData(_Data):
    """scikit-learn's 1,797 digits, (N, 1, 8, 8) in [0, 1], the last `test_fraction` of a seeded shuffle held out."""

    kind: Literal["digits"]
    test_fraction: float = Field(0.2, gt=0, lt=1)
    split_seed: int = 0


class NpzData(_Data):
    """Arrays in .npz files: images or vectors `x`, classes `y`; x / scale, then (x − mean) / std by channel."""

    kind: Literal["npz"]
    test: ExistingPath
    train: ExistingPath | None = None
    x: str = "x"
    y: str = "y"
    layout: Literal["NHWC", "NCHW", "NC"] = "NCHW"
    scale: float = Field(1.0, gt=0)
    mean: list[float] | None = None
    std: list[float] | None = None


class ImageFolderData(_Data):
    """Folders of images, a folder a class, numbered in their names' order; resized, centre-cropped, normalised."""

    kind: Literal["image_folder"]
    test: ExistingPath
    train: ExistingPath | None = None
    resize: int | None = Field(None, ge=1)
    crop: int | None = Field(None, ge=1)
    scale: float = Field(255.0, gt=0)
    mean: list[float] | None = None
    std: list[float] | None = None


class HuggingFaceData(_Data):
    """A data set through `datasets`: a hub id, or a builder (csv, json, parquet, text, imagefolder) with local `files`.

    Columns by task: classification wants `text` (and perhaps `second`) or `image`, and `label`; similarity `text`,
    `second` and `score`; perplexity `text`, which is joined, tokenised and cut into `windows` of `window` tokens.
    """

    kind: Literal["huggingface"]
    id: str
    config: str | None = None
    files: dict[str, ExistingPath] | None = None
    train: str | None = None
    test: str = "test"
    columns: dict[Literal["text", "second", "image", "label", "score"], str] = {}
    max_length: int = Field(128, ge=1)
    window: int = Field(512, ge=2)
    windows: int | None = Field(None, ge=1)
    resize: int | None = Field(None, ge=1)
    crop: int | None = Field(None, ge=1)
    scale: float = Field(255.0, gt=0)
    mean: list[float] | None = None
    std: list[float] | None = None


class CallableData(_Data):
    """A function that returns `(train, test)`; train may be None.

    Each is `Examples`, `Pairs`, `Windows`, a pair of tensors (inputs, classes), or, for a task of your own, anything.
    The function is also given `tokenizer`, the model's, if it has such a parameter.
    """

    kind: Literal["callable"]
    callable: CallableName
    arguments: dict[str, Any] = {}

    @model_validator(mode="after")
    def _can_be_called(self) -> CallableData:
        _check_arguments(self.callable, self.arguments, ("tokenizer",))
        return self


DataRecipe = Annotated[
    DigitsData | NpzData | ImageFolderData | HuggingFaceData | CallableData, Field(discriminator="kind")
]


class StageRecipe(Strict):
    """One stage of fine-tuning; see `Stage`."""

    epochs: int = Field(ge=0)
    learning_rate: float = Field(gt=0)
    underflow: bool = True
    cosine: bool = True
    final_learning_rate: float = Field(0.0, ge=0)
    underflow_from: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _is_a_stage(self) -> StageRecipe:
        Stage(**self.model_dump())
        return self


class Augmentation(Strict):
    """Random changes of training images (N, C, H, W)."""

    flip: bool = False
    """Mirror left and right, one in two."""
    crop: int = Field(0, ge=0)
    """Pad by this many zeros a side, then crop to the old size at a random place."""


class CalibrateRecipe(Strict):
    """What `fmaq.calibrate` chooses on training examples before the first stage; the keys are its arguments."""

    per: Per = "channel"
    batches: int = Field(2, ge=1)
    """Of training examples, of the data's batch size."""
    rule: Literal["trial", "maximum"] = "trial"
    gain: bool = True
    """With gains, and shifts of means where they pay."""
    chunks: list[Annotated[int, Field(ge=1)]] = []
    ranges: Ranges = "static"

    def how(self) -> dict[str, Any]:
        """The arguments of `fmaq.calibrate` but the batches."""
        return self.model_dump(exclude={"batches"}) | {"shift": self.gain}


class FinetuneRecipe(Strict):
    """The schedule: `stages`, or the dual stages of arXiv 2401.14110, `without_underflow` then `with_underflow`.

    With `calibrate`, the policy's biases, offsets, gains and ranges are chosen first, and stay what they are.
    """

    calibrate: CalibrateRecipe | None = None
    stages: list[StageRecipe] | None = None
    without_underflow: StageRecipe | None = None
    with_underflow: StageRecipe | None = None
    batch_size: int = Field(64, ge=1)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = Field(0.0, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    clip_norm: float | None = Field(None, gt=0)
    augmentation: Augmentation = Field(default_factory=lambda: Augmentation(flip=False, crop=0))
    checkpoint_seconds: float = Field(60.0, ge=0)

    @model_validator(mode="after")
    def _some_stages(self) -> FinetuneRecipe:
        dual = self.without_underflow or self.with_underflow
        if bool(self.stages) == bool(dual):
            raise ValueError("give either stages (a list) or without_underflow and with_underflow")
        return self

    def schedule(self) -> Schedule:
        """The schedule that the training loop takes."""
        if self.stages:
            parts = [s.model_dump() for s in self.stages]
        else:
            pair = ((self.without_underflow, False), (self.with_underflow, True))
            parts = [stage.model_dump() | {"underflow": underflow} for stage, underflow in pair if stage is not None]
        rest = self.model_dump(exclude={"calibrate", "stages", "without_underflow", "with_underflow", "augmentation"})
        return Schedule(
            stages=tuple(Stage(**part) for part in parts),
            flip=self.augmentation.flip,
            crop=self.augmentation.crop,
            **rest,
        )


class Document(Strict):
    """A checked YAML file."""

    what: ClassVar[str] = "recipe"
    """What messages call it."""

    @classmethod
    def load(cls, path: str | Path, changes: Mapping[str, Any] | None = None) -> Self:
        """Read and check a file.

        Args:
            path: of the YAML file.
            changes: values in place of the file's, by key; a dot goes inside, as in `policy.accumulator`.

        Raises:
            RecipeError: the file is missing, is not YAML, or a key or value in it is wrong.
        """
        return cls.parse(cls.read(path), Path(path).parent, str(path), changes)

    @classmethod
    def read(cls, path: str | Path) -> str:
        """The text of a file.

        Raises:
            RecipeError: the file is missing or is not text.
        """
        try:
            return Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise RecipeError(f"cannot read the {cls.what} {path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise RecipeError(f"cannot read the {cls.what} {path}: it is not UTF-8 text ({error.reason})") from None

    @classmethod
    def parse(
        cls,
        text: str | Mapping[str, Any],
        base: str | Path = ".",
        source: str = "recipe",
        changes: Mapping[str, Any] | None = None,
    ) -> Self:
        """A checked document from YAML text or a mapping; relative paths start at `base`.

        Raises:
            RecipeError: as for `load`.
        """
        values, node = read_yaml(text, source) if isinstance(text, str) else (text, None)
        return cls.check(values, node, base, source, changes)

    @classmethod
    def check(
        cls,
        values: Any,
        node: yaml.Node | None,
        base: str | Path,
        source: str,
        changes: Mapping[str, Any] | None = None,
    ) -> Self:
        """A checked document from what `read_yaml` gives.

        Raises:
            RecipeError: a key or value is wrong; names the line, by `node`.
        """
        if not isinstance(values, Mapping):
            raise RecipeError(f"{source}: a {cls.what} is a mapping with the keys {', '.join(cls.model_fields)}")
        values = _changed(values, changes or {}, Path(base))
        try:
            return cls.model_validate(values, context={"base": Path(base)})
        except ValidationError as error:
            raise RecipeError("\n".join(explain(item, source, node) for item in error.errors())) from None


class Recipe(Document):
    """A whole recipe; `accumulators` and `operands` are what `fmaq.training.policies` says."""

    name: str = Field(pattern=r"^[\w.-]+$")
    seed: int = Field(0, ge=0, lt=2**32)
    task: TaskName = "classification"
    model: ModelRecipe
    data: DataRecipe
    policy: PolicySource = {}
    accumulators: Accumulators = []
    operands: list[str] = []
    finetune: FinetuneRecipe | None = None
    output: AnyPath | None = None

    @field_validator("operands")
    @classmethod
    def _readable_operands(cls, value: list[str]) -> list[str]:
        value = ["float32" if item == "fp32" else item for item in value]
        for item in value:
            if item != "float32":
                _try(Policy, weight=item, activation=item)
        return value

    def load_policy(self) -> Policy:
        """The policy, from the recipe or from its file."""
        return load_policy(self.policy)


def _changed(values: Mapping[str, Any], changes: Mapping[str, Any], base: Path) -> dict[str, Any]:
    new = dict(values)
    for key, value in changes.items():
        outer, dot, inner = key.partition(".")
        if not dot:
            new[key] = value
            continue
        part = new.get(outer, {})
        if isinstance(part, str):  # the path of a file
            part = read_yaml((base / expand(part)).read_text(encoding="utf-8"), part)[0]
        new[outer] = {**part, inner: value}
    return new
