"""Long vectors of a policy, kept in a safetensors file beside its YAML file, where a name stands in their place.

The file's name ends with a hash of what is in it, and stands in the YAML file under `vectors`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fmaq.whole_files import write_bytes

KEY = "vectors"
NAMES = ("offset", "gain", "shift", "a_max", "b_max")
INLINE = 16
"""Numbers that a YAML file shows itself."""
IS_NUMBER = re.compile(r"[-+\d.eE]+")
"""A number in quotes, which names no vector."""


def taken_out(mapping: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A policy's plain mapping with names in place of its long vectors, and these by name."""
    vectors: dict[str, np.ndarray] = {}

    def walk(value: Any, place: tuple[str, ...]) -> Any:
        if isinstance(value, Mapping):
            return {key: walk(inner, (*place, str(key))) for key, inner in value.items()}
        if not place or place[-1] not in NAMES or not isinstance(value, list):
            return value
        array = np.array(value, np.int32 if place[-1] == "offset" else np.float32)
        if array.size <= INLINE:
            return value
        name = ".".join(part for part in place if part not in ("layers", "products"))
        while name in vectors:  # of modules that are called so, or have a number as a name
            name += "_"
        vectors[name] = array
        return name

    return walk(mapping, ()), vectors


def filled_in(content: Any, path: Path) -> Any:
    """What a policy's YAML file says, with the vectors of the file beside it in place of their names.

    Raises:
        ValueError: the file is missing, changed, or lacks a vector; names it.
    """
    if not isinstance(content, Mapping):
        return content
    vectors = _read(path.parent / str(content[KEY])) if KEY in content else {}

    def walk(value: Any, key: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: walk(inner, name) for name, inner in value.items()}
        if key in NAMES and isinstance(value, str) and (value in vectors or not IS_NUMBER.fullmatch(value)):
            if KEY not in content:
                raise ValueError(f"{key}: {value!r} names a vector, and no key {KEY} says in which file it is")
            if value not in vectors:
                raise ValueError(f"{key}: {content[KEY]} has no vector {value!r}")
            return vectors[value]
        return value

    return walk({name: value for name, value in content.items() if name != KEY}, None)


def no_longer_named(path: Path) -> Path | None:
    """The vectors' file that a policy's YAML file names and no other in its folder does; None where there is none."""
    name = named_by(path)
    is_own = name is not None and name == Path(name).name and name.startswith(f"{path.stem}.")
    if name is None or not is_own:
        return None
    others = (other for other in path.parent.iterdir() if other.suffix in (".yaml", ".yml") and other != path)
    return None if any(named_by(other) == name for other in others) else path.parent / name


def named_by(path: Path) -> str | None:
    """The vectors' file that a policy's YAML file names; None where it names none or cannot be read."""
    import yaml

    from fmaq.emulation.yaml_text import load_yaml

    try:
        content, _ = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    name = content.get(KEY) if isinstance(content, Mapping) else None
    return name if isinstance(name, str) else None


def write(path: Path, vectors: Mapping[str, np.ndarray]) -> str:
    """Write the vectors of the policy that will be at `path`; the file's name."""
    from safetensors.numpy import save

    content = save(dict(vectors))
    name = f"{path.stem}.{_digest(content)}.safetensors"
    write_bytes(path.with_name(name), content)
    return name


def _read(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{KEY}: cannot read {path}: {error.strerror}; it belongs beside this file") from None
    if path.name.split(".")[-2:-1] != [_digest(content)]:
        raise ValueError(f"{KEY}: {path} is not what was saved with this policy: its content has another hash")
    try:
        return load(content)
    except SafetensorError as error:
        raise ValueError(f"{KEY}: cannot read {path}: {error}") from None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]
