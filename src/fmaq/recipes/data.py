"""From a recipe's `data` to training and test examples."""

from __future__ import annotations

import inspect
import zipfile
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from fmaq.recipes.callables import load_callable, made_by
from fmaq.recipes.explain import RecipeError
from fmaq.recipes.images import image_folder, normalised, table_of_images
from fmaq.recipes.recipe import CallableData, DigitsData, HuggingFaceData, NpzData, Role, SquadData
from fmaq.recipes.squad import encode, from_columns, read_squad
from fmaq.training.examples import Examples, Pairs, Windows, as_examples
from fmaq.training.spans import Spans


def load_data(recipe: Any, task: str = "classification", tokenizer: Any = None) -> tuple[Any, Any]:
    """Training and test data of a recipe's `data`; training data are None where the recipe names none.

    Args:
        recipe: one of the data classes of `fmaq.recipes.recipe`.
        task: decides the form: classes, windows of tokens, or pairs.
        tokenizer: the model's, for texts.
    Raises:
        RecipeError: the data are not as the recipe says; names the file and the key.
    """
    if isinstance(recipe, CallableData):
        train, test = _from_callable(recipe, tokenizer)
    elif isinstance(recipe, HuggingFaceData):
        train = None if recipe.train is None else _huggingface(recipe, recipe.train, task, tokenizer)
        test = _huggingface(recipe, recipe.test, task, tokenizer)
    elif isinstance(recipe, SquadData):
        train, test = (path and _squad(recipe, path, tokenizer) for path in (recipe.train, recipe.test))
    elif isinstance(recipe, DigitsData):
        train, test = digits(recipe.test_fraction, recipe.split_seed)
    else:
        read = _npz if isinstance(recipe, NpzData) else image_folder
        train = None if recipe.train is None else read(recipe, recipe.train)
        test = read(recipe, recipe.test)
    for split, data in (("training", train), ("test", test)):
        if isinstance(data, Examples | Windows | Pairs) and len(data) == 0:
            raise RecipeError(f"data: there are no {split} examples; {_where(recipe, split)}")
    return _first(train, recipe.limit), _first(test, recipe.limit)


def _where(recipe: Any, split: str) -> str:
    """What to look at where a split is empty."""
    if isinstance(recipe, CallableData):
        return f"{recipe.callable} returned none"
    if isinstance(recipe, DigitsData):
        return f"test_fraction {recipe.test_fraction:g} of 1,797 leaves none"
    return f"{recipe.train if split == 'training' else recipe.test} is empty"


def _first(data: Any, limit: int | None) -> Any:
    return data if limit is None or not isinstance(data, Examples | Windows) else data.first(limit)


def digits(test_fraction: float = 0.2, split_seed: int = 0) -> tuple[Examples, Examples]:
    """scikit-learn's 1,797 images of digits, (N, 1, 8, 8) in [0, 1]; a seeded shuffle's last part is the test set."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.from_numpy(bunch.images).float()[:, None] / 16
    y = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(split_seed))
    count = round(len(y) * test_fraction)
    train, test = order[: len(y) - count], order[len(y) - count :]
    return Examples(x[train], y[train]), Examples(x[test], y[test])


def _npz(recipe: NpzData, path: Path) -> Examples:
    try:
        with np.load(path) as arrays:
            for key, name in (("x", recipe.x), ("y", recipe.y)):
                if name not in arrays:
                    raise RecipeError(f"data.{key}: {path} has no array {name!r}; it has {', '.join(arrays)}")
            x, y = (_numbers(arrays[name], f"{name} in {path}") for name in (recipe.x, recipe.y))
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"cannot read {path}: {error}") from None
    if x.dim() != len(recipe.layout):
        raise RecipeError(f"data.layout is {recipe.layout}, but {recipe.x} in {path} has shape {tuple(x.shape)}")
    if recipe.layout == "NHWC":
        x = x.permute(0, 3, 1, 2)
    try:
        return Examples(normalised(x, recipe.scale, recipe.mean, recipe.std), y)
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from None


def _squad(recipe: SquadData, path: Path, tokenizer: Any) -> Spans:
    _need_tokenizer(tokenizer)
    return encode(read_squad(path)[: recipe.limit], tokenizer, recipe.max_length, recipe.stride)


def _numbers(array: np.ndarray, what: str) -> Tensor:
    if array.dtype.kind not in "biuf":
        raise RecipeError(f"{what} is an array of {array.dtype}; numbers are needed")
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))


def _from_callable(recipe: CallableData, tokenizer: Any) -> tuple[Any, Any]:
    function = load_callable(recipe.callable)
    takes = "tokenizer" in inspect.signature(function).parameters
    extra = {"tokenizer": tokenizer} if takes and "tokenizer" not in recipe.arguments else {}
    made = made_by(recipe.callable, "data.callable", **recipe.arguments, **extra)
    if not isinstance(made, tuple) or len(made) != 2:
        raise RecipeError(f"data.callable: {recipe.callable} must return (train, test), got a {type(made).__name__}")
    try:
        return as_examples(made[0]), as_examples(made[1])
    except (TypeError, ValueError) as error:
        raise RecipeError(f"data.callable: {recipe.callable}: {error}") from None


def _huggingface(recipe: HuggingFaceData, split: str, task: str, tokenizer: Any) -> Any:
    try:
        import datasets
    except ImportError:
        raise RecipeError("data.kind huggingface needs the package datasets: pip install 'fmaq[hf]'") from None
    files = None if recipe.files is None else {name: str(path) for name, path in recipe.files.items()}
    try:
        table = datasets.load_dataset(recipe.id, recipe.config, data_files=files, split=split)
    except Exception as error:  # of datasets, and of the builders that it loads
        raise RecipeError(f"data.id: cannot load {recipe.id} ({split}): {error}") from error
    if recipe.limit is not None and task != "perplexity":
        table = table.select(range(min(recipe.limit, len(table))))
    columns = {role: recipe.columns.get(role, role) for role in get_args(Role)}
    for role, name in recipe.columns.items():
        if name not in table.column_names:
            raise RecipeError(
                f"data.columns.{role}: {recipe.id} has no column {name!r}; it has {', '.join(table.column_names)}"
            )
    has = {role for role, name in columns.items() if name in table.column_names}
    if task == "perplexity":
        return _windows(recipe, _column(table, columns, has, "text"), tokenizer)
    if task == "similarity":
        texts = [*_column(table, columns, has, "text"), *_column(table, columns, has, "second")]
        index = torch.arange(len(table))
        scores = torch.tensor([float(score) for score in _column(table, columns, has, "score")], dtype=torch.float64)
        return Pairs(_tokenised(texts, None, recipe, tokenizer), index, index + len(table), scores)
    if task == "span_extraction":
        _need_tokenizer(tokenizer)
        parts = [_column(table, columns, has, role) for role in ("question", "context", "answers")]
        return encode(from_columns(*parts), tokenizer, recipe.max_length, recipe.stride)
    labels = _labels(recipe, _column(table, columns, has, "label"))
    if "image" in has:
        return table_of_images(recipe, table, columns["image"], labels)
    second = _column(table, columns, has, "second") if "second" in has else None
    return Examples(_tokenised(_column(table, columns, has, "text"), second, recipe, tokenizer), labels)


def _labels(recipe: HuggingFaceData, values: list[Any]) -> Tensor:
    for value in values:
        if not isinstance(value, int):
            raise RecipeError(
                f"data.columns.label: {recipe.id} has the label {value!r}; classes are whole numbers from 0"
            )
    return torch.tensor(values, dtype=torch.int64)


def _column(table: Any, columns: dict[str, str], has: set[str], role: str) -> list[Any]:
    if role not in has:
        raise RecipeError(
            f"data.columns: this task needs {role}; name one of the columns for it: {', '.join(table.column_names)}"
        )
    return list(table[columns[role]])


def _need_tokenizer(tokenizer: Any) -> None:
    if tokenizer is None:
        raise RecipeError(
            "these data are texts, and the model has no tokenizer; let model.callable return (module, tokenizer)"
        )


def _tokenised(
    texts: list[str], second: list[str] | None, recipe: HuggingFaceData, tokenizer: Any
) -> dict[str, Tensor]:
    _need_tokenizer(tokenizer)
    made = tokenizer(texts, second, padding=True, truncation=True, max_length=recipe.max_length, return_tensors="pt")
    return dict(made)


def _windows(recipe: HuggingFaceData, texts: list[str], tokenizer: Any) -> Windows:
    _need_tokenizer(tokenizer)
    tokens = torch.tensor(tokenizer("\n\n".join(texts))["input_ids"])
    count = len(tokens) // recipe.window
    if count == 0:
        raise RecipeError(f"data.window is {recipe.window} tokens, but the text has only {len(tokens)}")
    windows = tokens[: count * recipe.window].view(count, recipe.window)
    return Windows(windows if recipe.windows is None else windows[: recipe.windows])
