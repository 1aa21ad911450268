"""What the values of a recipe may be: paths, with variables in them, names of functions, policies, accumulators."""

from __future__ import annotations

import difflib
import inspect
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ValidationInfo

from fmaq.emulation import Policy
from fmaq.emulation.rule import FP32
from fmaq.numerics import Accumulator
from fmaq.recipes.callables import load_callable, resolve
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
        raise ValueError(f"{os.path.normpath(path)} does not exist{what_may_help(value)}")
    return Path(os.path.normpath(path)) if isinstance(path, Path) else path


def what_may_help(value: Any) -> str:
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
        attempt(Policy.parse, value)
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
        if item != FP32 and not (accumulator := attempt(Accumulator.parse, item)).is_template:
            accumulator.check_float32()
    return value


def attempt(make: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
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


def check_arguments(name: str, arguments: Mapping[str, Any], given: tuple[str, ...] = ()) -> None:
    """Refuse arguments that a function named in a recipe cannot be called with; `given` are those that fmaq adds."""
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
