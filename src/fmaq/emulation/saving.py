"""A policy is saved with its model: an attached model's `save_pretrained` writes `fmaq-policy.yaml`, too.

A model that has the method (transformers', PEFT's, a hub mixin's) gets one in its own `__dict__`, which calls its
class's and then saves the policy. So whoever saves the model, a Trainer or `push_to_hub`, saves the policy. Classes
stay as they are, copies and pickles of the model save themselves, and `fmaq.detach` takes it away again.
"""

from __future__ import annotations

import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import nn

from fmaq.emulation.calls import STATE
from fmaq.emulation.layer_names import layer_names
from fmaq.emulation.policy import POLICY_FILE, Policy
from fmaq.emulation.vector_files import no_longer_named

METHOD = "save_pretrained"


def save_policies_with(modules: Iterable[nn.Module]) -> None:
    """Have attached modules that are a model, and not a part of one, save their policies; others no longer."""
    for module in modules:
        state = module.__dict__.get(STATE)
        if state is not None and state[0].name == "" and callable(getattr(type(module), METHOD, None)):
            module.__dict__.setdefault(METHOD, _Saving(module))
        elif isinstance(module.__dict__.get(METHOD), _Saving):
            del module.__dict__[METHOD]


class _Saving:
    """`save_pretrained` of one model, which it does not keep alive: it would be freed late, in a cycle."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        functools.update_wrapper(self, getattr(type(model), METHOD))

    def __reduce__(self) -> tuple[Callable[[nn.Module], _Saving], tuple[nn.Module | None]]:
        return _Saving, (self._model(),)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Save the weights as the class does, then the policy.

        Raises:
            ValueError: `push_to_hub=True`, which uploads before the policy is there.
        """
        model = self._model()
        if model is None:
            raise ReferenceError(
                f"the model whose {METHOD} this is does not exist any more: keep it in a variable, model = "
                f"fmaq.attach(...), and then call model.{METHOD}(folder)"
            )
        save = getattr(type(model), METHOD)
        _, folder, *_ = inspect.signature(save).bind(model, *args, **kwargs).arguments.values()
        if kwargs.get("push_to_hub"):
            raise ValueError(
                "push_to_hub=True would leave the policy behind: call model.push_to_hub(name), or save the model and "
                "upload the folder"
            )
        result = save(model, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            _save_policy(model, Path(folder))
        return result


def _save_policy(model: nn.Module, folder: Path) -> None:
    """Write a model's policy; where it could not be attached again, warn, and leave none in the folder."""
    path = folder / POLICY_FILE
    policy = model.__dict__[STATE][0].policy
    try:
        _check(model, policy)
    except ValueError as error:
        if path.is_file():
            vectors = no_longer_named(path)
            path.unlink()
            if vectors is not None:
                vectors.unlink(missing_ok=True)
        warnings.warn(f"{folder} has the weights, but no policy: {error}", UserWarning, stacklevel=3)
    else:
        policy.save(path)


def _check(model: nn.Module, policy: Policy) -> None:
    """Refuse a policy that is not that of all of the model.

    Raises:
        ValueError: a part has another one, or an entry matches no module any more.
    """
    names = layer_names(model)
    for module, own in names.items():
        state = module.__dict__.get(STATE)
        if state is not None and state[0].policy is not policy and state[0].policy != policy:
            raise ValueError(f"{own[0]} was attached to a policy of its own; attach the whole model to one")
    policy.check_names(name for own in names.values() for name in own)
