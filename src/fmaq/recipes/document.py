"""A YAML file that is checked as a whole before anything starts; what is wrong in it is named with its line."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from fmaq.recipes.explain import RecipeError, explain, read_yaml
from fmaq.recipes.values import expand


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
