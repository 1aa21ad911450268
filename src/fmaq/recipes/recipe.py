"""Recipes: one YAML file that names a run's model, data, policy and schedule, checked before anything starts.

    name: mine-12bit                         # names the output folder, runs/<name>
    model: {callable: model.py:network, weights: trained.safetensors}
    data: {kind: npz, train: train.npz, test: test.npz}
    policy: {accumulator: paper12, weight: M4E3, activation: M4E3}

`docs/training.md` shows every key; the classes below are what is checked. Which accumulators a command takes from a
recipe is in `fmaq.recipes.policies`. Paths are relative to the recipe's own folder, and may use `~`, `${NAME}` and
`${NAME:-default}`.
"""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from fmaq.analysis.calibration import Per, Ranges
from fmaq.emulation import Policy
from fmaq.recipes.document import Document, Strict
from fmaq.recipes.values import (
    Accumulators,
    AnyPath,
    CallableName,
    ExistingPath,
    PolicySource,
    TaskName,
    attempt,
    check_arguments,
    expand,
    load_policy,
    what_may_help,
)
from fmaq.training.schedule import Schedule, Stage


class ModelRecipe(Strict):
    """The network: a function of yours, or a transformers checkpoint."""

    callable: CallableName | None = None
    arguments: dict[str, Any] = Field({})
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
            check_arguments(self.callable, self.arguments)
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
            hint = what_may_help(value)
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


Role = Literal["text", "second", "image", "label", "score", "question", "context", "answers"]
"""What a column of a table is to a task."""


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
    columns: dict[Role, str] = Field({})
    max_length: int = Field(128, ge=1)
    stride: int = Field(0, ge=0)
    window: int = Field(512, ge=2)
    windows: int | None = Field(None, ge=1)
    resize: int | None = Field(None, ge=1)
    crop: int | None = Field(None, ge=1)
    scale: float = Field(255.0, gt=0)
    mean: list[float] | None = None
    std: list[float] | None = None


class SquadData(_Data):
    """SQuAD's own files, of version 1.1 or 2.0, for span extraction; `limit` counts questions."""

    kind: Literal["squad"]
    test: ExistingPath
    train: ExistingPath | None = None
    max_length: int = Field(384, ge=8)
    """Tokens of a window: the question and a part of the passage."""
    stride: int = Field(128, ge=0)
    """Tokens that the next window of the passage repeats."""


class CallableData(_Data):
    """A function that returns `(train, test)`; train may be None.

    Each is `Examples`, `Spans`, `Pairs`, `Windows`, a pair of tensors (inputs, classes), or, for a task of your own,
    anything. The function is also given `tokenizer`, the model's, if it has such a parameter.
    """

    kind: Literal["callable"]
    callable: CallableName
    arguments: dict[str, Any] = Field({})

    @model_validator(mode="after")
    def _can_be_called(self) -> CallableData:
        check_arguments(self.callable, self.arguments, ("tokenizer",))
        return self


DataRecipe = Annotated[
    DigitsData | NpzData | ImageFolderData | HuggingFaceData | SquadData | CallableData, Field(discriminator="kind")
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
    chunks: list[Annotated[int, Field(ge=1)]] = Field([])
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
    accumulation: int = Field(1, ge=1)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = Field(0.0, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    clip_norm: float | None = Field(None, gt=0)
    augmentation: Augmentation = Field(default_factory=lambda: Augmentation(flip=False, crop=0))
    checkpoint_seconds: float = Field(60.0, ge=0)
    trackers: list[Literal["tensorboard", "wandb"]] = Field([])
    shard: bool = False
    """Of several processes, each keeps a share of the model."""

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
        shared = {field.name for field in fields(Schedule)} - {"stages"}
        rest = self.model_dump(include=shared)
        return Schedule(
            stages=tuple(Stage(**part) for part in parts),
            flip=self.augmentation.flip,
            crop=self.augmentation.crop,
            **rest,
        )


class Recipe(Document):
    """A whole recipe; `accumulators` and `operands` are what `fmaq.recipes.policies` says."""

    name: str = Field(pattern=r"^[\w.-]+$")
    seed: int = Field(0, ge=0, lt=2**32)
    task: TaskName = "classification"
    model: ModelRecipe
    data: DataRecipe
    policy: PolicySource = Field({})
    accumulators: Accumulators = Field([])
    operands: list[str] = Field([])
    finetune: FinetuneRecipe | None = None
    output: AnyPath | None = None

    @field_validator("operands")
    @classmethod
    def _readable_operands(cls, value: list[str]) -> list[str]:
        value = ["float32" if item == "fp32" else item for item in value]
        for item in value:
            if item != "float32":
                attempt(Policy, weight=item, activation=item)
        return value

    def load_policy(self) -> Policy:
        """The policy, from the recipe or from its file."""
        return load_policy(self.policy)
