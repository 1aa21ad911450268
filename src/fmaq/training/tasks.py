"""What is measured: accuracy of a classifier, exact match of spans, correlation of similarities, perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fmaq.training.examples import IGNORED, Examples, Inputs, Pairs, Windows, as_examples, to_device
from fmaq.training.progress import Advance, Bars
from fmaq.training.spans import Finder, Spans, marks

Metrics = dict[str, float]


class BatchError(ValueError):
    """A model failed on a batch; the message describes the batch, and says what may help."""


def forward(model: nn.Module, inputs: Inputs) -> Tensor:
    """The model's logits or embeddings: its output, or that output's `logits` or `last_hidden_state`.

    Scores of the ends of spans, `start_logits` and `end_logits`, come as one tensor (windows, 2, tokens): to each end,
    tokens are what classes are elsewhere.

    Raises:
        BatchError: the model failed on these inputs.
        TypeError: it returned neither a tensor nor such an output.
    """
    with telling_of_the_batch(model, inputs):
        output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    if getattr(output, "start_logits", None) is not None:
        output = torch.stack([output.start_logits, output.end_logits], 1)
    for name in ("logits", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            output = getattr(output, name)
    if isinstance(output, tuple):
        output = output[0]
    if not isinstance(output, Tensor):
        raise TypeError(f"the model returned a {type(output).__name__}; expected a tensor, or an output with logits")
    return output


@contextmanager
def telling_of_the_batch(model: nn.Module, inputs: Inputs) -> Iterator[None]:
    """Raise what a model raises on a batch of the data as a `BatchError`; but not that memory ran out, or a loss."""
    try:
        yield
    except (BatchError, FloatingPointError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise BatchError(
            f"{type(model).__name__} cannot take this batch of the data: {_described(inputs)}; "
            f"{type(error).__name__}: {error}{_what_may_help(model, inputs)}"
        ) from error


def _described(inputs: Inputs) -> str:
    """The tensors' names, types and shapes, and the range of integers, such as tokens are."""
    named = inputs if isinstance(inputs, dict) else {"": inputs}
    return ", ".join(f"{name} {_of_tensor(tensor)}".strip() for name, tensor in named.items())


def _of_tensor(tensor: Tensor) -> str:
    kind = str(tensor.dtype).removeprefix("torch.")
    whole = tensor.numel() and not tensor.is_floating_point() and not tensor.is_complex()
    values = f" from {int(tensor.min())} to {int(tensor.max())}" if whole and tensor.dtype != torch.bool else ""
    return f"{kind} of shape {tuple(tensor.shape)}{values}"


def _what_may_help(model: nn.Module, inputs: Inputs) -> str:
    tensors = inputs.values() if isinstance(inputs, dict) else [inputs]
    theirs = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    ours = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if len(theirs) == len(ours) == 1 and theirs != ours:
        weights, name = (str(dtype).removeprefix("torch.") for dtype in (next(iter(ours)), next(iter(theirs))))
        return f". The data are {name} and the model's weights {weights}: convert the data, x.to(torch.{weights})"
    return ""


def check_classes(targets: Tensor, logits: Tensor) -> None:
    """Refuse classes that logits (examples, classes) do not have.

    Raises:
        ValueError: there is not one class for each row of logits, or one is out of range; names it.
    """
    if logits.dim() < 2 or len(targets) != len(logits):
        raise ValueError(
            f"{len(targets)} classes do not fit the model's outputs, {tuple(logits.shape)}: classification needs an "
            f"output (examples, classes), and one whole number for each example (of one-hot classes, y.argmax(1))"
        )
    counted = targets[targets != IGNORED]
    wrong = counted[(counted < 0) | (counted >= logits.shape[1])]
    if len(wrong):
        raise ValueError(
            f"the class {int(wrong[0])} is not one of the model's {logits.shape[1]}, 0 to {logits.shape[1] - 1}; check "
            f"the data's classes, or give the model more outputs"
        )


def loss(model: nn.Module, data: Examples | Windows, inputs: Inputs, targets: Tensor) -> Tensor:
    """Mean cross-entropy of a batch of `data`: of the classes that count, or of each window's next tokens."""
    logits = forward(model, inputs).float()
    if isinstance(data, Windows):
        logits, targets = logits[:, :-1], targets[:, 1:]
    logits, targets = _by_row(logits), targets.flatten()
    check_classes(targets, logits)
    return nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED)


def _by_row(logits: Tensor) -> Tensor:
    return logits.flatten(0, -2) if logits.dim() > 1 else logits


def _form(data: Any, form: type, task: str) -> Any:
    if not isinstance(data, form):
        raise TypeError(f"the task {task} runs on {form.__name__}, but the data are {type(data).__name__}")
    return data


def classification(model: nn.Module, data: Any, device: str, batch_size: int, advance: Advance) -> Metrics:
    """`accuracy`, the share of classes that have the largest logit, and the mean cross-entropy `loss`.

    A class an example, or, where targets are (N, tokens), a class a token, but for those that do not count.
    """
    data = _form(data, Examples, "classification")
    right, count, total = 0, 0, 0.0
    for start in range(0, len(data), batch_size):
        inputs, targets = data.batch(slice(start, start + batch_size))
        logits = _by_row(forward(model, to_device(inputs, device)).float())
        advance(len(targets))
        targets = targets.flatten().to(device)
        check_classes(targets, logits)
        right += int((logits.argmax(1) == targets).sum())
        count += int((targets != IGNORED).sum())
        total += float(nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum"))
    if count == 0:
        raise ValueError(f"no example has a class: all targets are {IGNORED}, that of tokens which do not count")
    return {"accuracy": right / count, "loss": _finite(total / count)}


def _finite(mean: float) -> float:
    """The mean loss, which a metric beside it depends on.

    Raises:
        FloatingPointError: it is NaN or infinite.
    """
    if not math.isfinite(mean):
        raise FloatingPointError(f"the loss is {mean}: an input, a weight or an output of the model is not finite")
    return mean


def perplexity(model: nn.Module, data: Any, device: str, batch_size: int, advance: Advance) -> Metrics:
    """`perplexity`, the exponential of `loss`, the mean cross-entropy in nats of all tokens but each window's first."""
    data = _form(data, Windows, "perplexity")
    total, count = 0.0, 0
    for start in range(0, len(data), batch_size):
        inputs, targets = data.batch(slice(start, start + batch_size))
        targets = targets[:, 1:].flatten().to(device)
        logits = _by_row(forward(model, to_device(inputs, device)).float()[:, :-1])
        check_classes(targets, logits)
        total += float(nn.functional.cross_entropy(logits, targets, reduction="sum"))
        count += len(targets)
        advance(len(next(iter(inputs.values()))) if isinstance(inputs, dict) else len(inputs))
    mean = _finite(total / count)
    return {"perplexity": math.exp(mean) if mean < 700 else math.inf, "loss": mean}


def span_extraction(model: nn.Module, data: Any, device: str, batch_size: int, advance: Advance) -> Metrics:
    """`f1` and `exact_match` of the spans found, as SQuAD counts them; the mean cross-entropy `loss` of their ends."""
    data = _form(data, Spans, "span_extraction")
    finder, total = Finder(data), 0.0
    for start in range(0, len(data), batch_size):
        inputs, targets = data.batch(slice(start, start + batch_size))
        scores = forward(model, to_device(inputs, device)).float()
        if scores.shape[:2] != targets.shape or scores.dim() != 3:
            raise ValueError(
                f"span extraction needs a model with start_logits and end_logits, such as one of "
                f"AutoModelForQuestionAnswering; the output of this has the shape {tuple(scores.shape)}"
            )
        check_classes(targets.flatten(), logits := scores.flatten(0, 1))
        total += float(nn.functional.cross_entropy(logits, targets.flatten().to(device), reduction="sum"))
        finder.add(start, scores)
        advance(len(targets))
    exact, overlap = marks(finder.texts(), data.answers)
    return {"f1": overlap, "exact_match": exact, "loss": _finite(total / data.targets.numel())}


def similarity(model: nn.Module, data: Any, device: str, batch_size: int, advance: Advance) -> Metrics:
    """`pearson` and `spearman` correlation of the cosines of mean-pooled embeddings with the scores."""
    data = _form(data, Pairs, "similarity")
    pooled = []
    for start in range(0, len(data), batch_size):
        inputs = {k: v[start : start + batch_size].to(device) for k, v in data.inputs.items()}
        states = forward(model, inputs).float()
        if states.dim() == 3:
            mask = (
                inputs["attention_mask"][..., None] if "attention_mask" in inputs else torch.ones_like(states[..., :1])
            )
            states = (states * mask).sum(1) / mask.sum(1)
        pooled.append(nn.functional.normalize(states, dim=1).cpu())
        advance(len(states))
    embedded = torch.cat(pooled)
    cosines = (embedded[data.first] * embedded[data.second]).sum(1)
    return {
        "pearson": _correlation(cosines, data.scores),
        "spearman": _correlation(_ranks(cosines), _ranks(data.scores)),
    }


def _correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1])


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0, ties sharing their mean rank."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts.double() + 1) / 2)[inverse]


TASKS: dict[str, Callable[[nn.Module, Any, str, int, Advance], Metrics]] = {
    "classification": classification,
    "span_extraction": span_extraction,
    "similarity": similarity,
    "perplexity": perplexity,
}

Task = str | Callable[[nn.Module, Any, str], Metrics]


def evaluate(
    model: nn.Module,
    data: Any,
    task: Task = "classification",
    *,
    device: str = "cpu",
    batch_size: int = 128,
    progress: bool | Bars = True,
    label: str = "Evaluating",
) -> Metrics:
    """Measure a model, as it is attached now; without gradients, in eval mode, which is put back afterwards.

    Args:
        model: takes a batch of the data's inputs.
        data: `Examples`, `Spans`, `Windows` or `Pairs`; a pair (inputs, classes) of tensors; a torch data set of such
            pairs.
        task: `"classification"`, `"span_extraction"`, `"similarity"`, `"perplexity"`, or a function
            (model, data, device) → metrics.
        progress: draw a bar when standard error is a terminal.

    Returns:
        Metrics by name, the most telling first.

    Raises:
        BatchError: the model failed on a batch of the data.
        ValueError: the data are empty, or have a class that the model has not.
        TypeError: the task does not run on such data, or a task of one's own returned no metrics.
    """
    data = as_examples(data)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    bars = progress if isinstance(progress, Bars) else Bars(progress)
    try:
        with torch.no_grad(), bars:
            if callable(task):
                return _own(task, model, data, device)
            if hasattr(data, "__len__") and len(data) == 0:
                raise ValueError("there is nothing to measure on: the test data are empty")
            with bars.bar(label, len(data)) as advance:
                return TASKS[task](model, data, device, batch_size, advance)
    finally:
        for module, mode in modes.items():
            module.training = mode


def _own(task: Callable[..., Any], model: nn.Module, data: Any, device: str) -> Metrics:
    """The metrics of a task of the user's own, as numbers."""
    name = getattr(task, "__name__", str(task))
    try:
        found = task(model, data, device)
    except (BatchError, FloatingPointError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(f"the task {name} raised {type(error).__name__}: {error}") from error
    if not isinstance(found, Mapping) or not found:
        raise TypeError(f"the task {name} returned {found!r}; expected metrics by name, like {{'accuracy': 0.9}}")
    return {name: float(value) for name, value in found.items()}
