"""What is wrong with a recipe, in words: the file, the line, the key's place and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import yaml

from fmaq.emulation.yaml_text import load_yaml

DATA_KINDS = ("digits", "npz", "image_folder", "huggingface", "squad", "callable")


class RecipeError(ValueError):
    """A recipe that cannot be run; the message names the file, the line, the key and the fix."""


def read_yaml(text: str, source: str) -> tuple[Any, yaml.Node | None]:
    """The values of YAML text, and its nodes, which know their lines.

    Raises:
        RecipeError: it is not YAML, or a key is given twice; with the line and column.
    """
    try:
        return load_yaml(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise RecipeError(f"{source}{where}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: not valid YAML: {error}") from None


def _line(node: yaml.Node | None, place: list[str | int]) -> int | None:
    """The line of the innermost part of `place` that the file has."""
    line = None
    for step in place:
        if isinstance(node, yaml.MappingNode):
            found = [(k, v) for k, v in node.value if k.value == str(step)]
            if not found:
                break
            line, node = found[0][0].start_mark.line + 1, found[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = node.start_mark.line + 1
        else:
            break
    return line


def explain(error: Any, source: str, node: yaml.Node | None) -> str:
    """One of pydantic's errors as a line of text that names the file, the line and the key."""
    place: list[str | int] = list(error["loc"])
    member = place.index("data") + 1 if "data" in place else len(place)
    if member < len(place) and place[member] in DATA_KINDS:
        del place[member]  # pydantic's name of the union's member, not a key of the file
    context = error.get("ctx", {})
    if error["type"] == "unknown_key":
        place.append(context["key"])
    elif error["type"].startswith("union_tag"):
        place.append("kind")
    line = _line(node, place)
    where = f"{source}, line {line}" if line else source
    name = ".".join(str(p) for p in place).replace("..", ".") or "recipe"
    return f"{where}: {name}: {_message(error, context)}"


def _message(error: Any, context: Mapping[str, Any]) -> str:
    kind = error["type"]
    if kind == "missing":
        return "this key is missing"
    if kind == "union_tag_not_found":
        return f"this key is missing; it may be {', '.join(DATA_KINDS)}"
    if kind == "union_tag_invalid":
        near = difflib.get_close_matches(str(context["tag"]), DATA_KINDS, 1, 0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"no kind {context['tag']!r}; {hint}It may be {', '.join(DATA_KINDS)}"
    if kind == "value_error":
        return str(context.get("error", error["msg"]))
    message = str(error["msg"])
    given = error.get("input")
    if kind == "unknown_key" or isinstance(given, (Mapping, list)):
        return message
    return f"{message}, got {given!r}"
