"""From a recipe's `model` to a module, with its weights in it and its tokenizer beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from fmaq.recipes.callables import made_by
from fmaq.recipes.explain import RecipeError
from fmaq.recipes.recipe import ModelRecipe

HEADS = {
    "classification": "AutoModelForSequenceClassification",
    "span_extraction": "AutoModelForQuestionAnswering",
    "similarity": "AutoModel",
    "perplexity": "AutoModelForCausalLM",
}


def build_model(recipe: ModelRecipe, task: str = "classification") -> tuple[nn.Module, Any]:
    """The module, in eval mode, and its tokenizer or None.

    Args:
        recipe: the model's part of a recipe.
        task: the recipe's task, which says which head a transformers checkpoint gets if the recipe does not.
    Raises:
        RecipeError: the function returned something else, or the weights are not this model's; says which.
    """
    if recipe.callable is not None:
        model, tokenizer = _from_callable(recipe, recipe.callable)
    else:
        model, tokenizer = _from_transformers(recipe, task)
    if recipe.weights is not None:
        load_weights(model, recipe.weights)
    return model.eval(), tokenizer


def _from_callable(recipe: ModelRecipe, name: str) -> tuple[nn.Module, Any]:
    made = made_by(name, "model.callable", **recipe.arguments)
    model, tokenizer = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise RecipeError(f"model.callable: {name} returned a {type(model).__name__}, not a torch.nn.Module")
    return model, tokenizer


def _from_transformers(recipe: ModelRecipe, task: str) -> tuple[nn.Module, Any]:
    try:
        import transformers
    except ImportError:
        raise RecipeError("model.transformers needs the package transformers: pip install 'fmaq[hf]'") from None
    head = recipe.head or HEADS.get(task, "AutoModel")
    loader = getattr(transformers, head, None)
    if loader is None or not hasattr(loader, "from_pretrained"):
        raise RecipeError(f"model.head: transformers has no {head!r}; use a class such as {HEADS['classification']}")
    source = str(recipe.transformers)
    gguf = {"gguf_file": recipe.gguf_file} if recipe.gguf_file else {}
    try:
        model = loader.from_pretrained(source, dtype="float32", **gguf, **recipe.arguments)
    except Exception as error:  # of transformers, and of the packages that it needs for a kind of file
        raise RecipeError(f"model.transformers: cannot load {source}: {error}") from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **gguf)
    except (OSError, ValueError):
        tokenizer = None  # a vision checkpoint has none; data that need one say so
    return model, tokenizer


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a safetensors file into a model; every key must match.

    Raises:
        RecipeError: the file cannot be read, or has missing, further or differently shaped tensors; names them.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise RecipeError(f"cannot read the weights {path}: {error}") from None
    own = model.state_dict()
    # A counter of batches, which old checkpoints lack and inference does not use.
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    further = [k for k in state if k not in own]
    shapes = [k for k in state if k in own and state[k].shape != own[k].shape]
    problems = [
        f"{what} {', '.join(keys[:5])}{f' and {len(keys) - 5} more' if len(keys) > 5 else ''}"
        for what, keys in (("lacks", missing), ("has unknown", further), ("has other shapes for", shapes))
        if keys
    ]
    if problems:
        raise RecipeError(f"{path} does not fit {type(model).__name__}: it {'; it '.join(problems)}")
    model.load_state_dict(state, strict=False)
