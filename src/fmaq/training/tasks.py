"""What is measured: accuracy of a classifier, correlation of similarities, perplexity of a language model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fmaq.training.examples import IGNORED, Examples, Inputs, Pairs, Windows, as_examples, to_device
from fmaq.training.progress import Advance, Bars

Metrics = dict[str, float]


def forward(model: nn.Module, inputs: Inputs) -> Tensor:
    """The model's logits or embeddings: its output, or that output's `logits` or `last_hidden_state`."""
    output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    for name in ("logits", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            output = getattr(output, name)
    if isinstance(output, tuple):
        output = output[0]
    if not isinstance(output, Tensor):
        raise TypeError(f"the model returned a {type(output).__name__}; expected a tensor, or an output with logits")
    return output


def loss(model: nn.Module, data: Examples | Windows, inputs: Inputs, targets: Tensor) -> Tensor:
    """Mean cross-entropy of a batch of `data`: of the classes that count, or of each window's next tokens."""
    logits = forward(model, inputs).float()
    if isinstance(data, Windows):
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
    return nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED)


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
        logits = forward(model, to_device(inputs, device)).float().flatten(0, -2)
        advance(len(targets))
        targets = targets.flatten().to(device)
        right += int((logits.argmax(1) == targets).sum())
        count += int((targets != IGNORED).sum())
        total += float(nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum"))
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
        logits = forward(model, to_device(inputs, device)).float()[:, :-1].flatten(0, 1)
        total += float(nn.functional.cross_entropy(logits, targets, reduction="sum"))
        count += len(targets)
        advance(len(next(iter(inputs.values()))) if isinstance(inputs, dict) else len(inputs))
    mean = _finite(total / count)
    return {"perplexity": math.exp(mean) if mean < 700 else math.inf, "loss": mean}


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
        data: `Examples`, `Windows` or `Pairs`; a pair (inputs, classes) of tensors; a torch data set of such pairs.
        task: `"classification"`, `"similarity"`, `"perplexity"`, or a function (model, data, device) → metrics.
        progress: draw a bar when standard error is a terminal.

    Returns:
        Metrics by name, the most telling first.
    """
    data = as_examples(data)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    bars = progress if isinstance(progress, Bars) else Bars(progress)
    try:
        with torch.no_grad(), bars:
            if callable(task):
                return {name: float(value) for name, value in task(model, data, device).items()}
            with bars.bar(label, len(data)) as advance:
                return TASKS[task](model, data, device, batch_size, advance)
    finally:
        for module, mode in modes.items():
            module.training = mode
