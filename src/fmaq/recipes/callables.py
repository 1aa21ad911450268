"""Functions named in recipes: `package.module:function`, or `path/to/file.py:function`."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def load_callable(name: str) -> Callable[..., Any]:
    """Import the function that `name` says.

    Args:
        name: `module:function`, or `file.py:function`; a file may import its neighbours.
    Raises:
        ValueError: the name is malformed, or the module, file or function does not exist or cannot be imported.
    """
    source, separator, attribute = name.rpartition(":")
    if not separator or not source or not attribute:
        raise ValueError(f"{name!r} does not name a function; write module:function or file.py:function")
    path = Path(source)
    if source.endswith(".py") and not path.is_file():
        raise ValueError(f"the file {path} does not exist")
    try:
        module = _from_file(path) if source.endswith(".py") else importlib.import_module(source)
    except ImportError as error:
        raise ValueError(f"cannot import {source}: {error}") from error
    except Exception as error:
        raise ValueError(f"importing {source} failed: {type(error).__name__}: {error}") from error
    function = getattr(module, attribute, None)
    if function is None:
        near = difflib.get_close_matches(attribute, [n for n in dir(module) if not n.startswith("_")], 1, 0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{source} has no function {attribute!r}{hint}")
    if not callable(function):
        raise ValueError(f"{name} is not a function but a {type(function).__name__}")
    return function


def made_by(name: str, key: str, **arguments: Any) -> Any:
    """What the function of a recipe's key returns.

    Raises:
        ValueError: it raised something; the message names the key, the function and what it raised.
    """
    function = load_callable(name)
    try:
        return function(**arguments)
    except Exception as error:
        raise ValueError(f"{key}: {name} raised {type(error).__name__}: {error}") from error


def resolve(name: str, base: str | Path) -> str:
    """The same name, its file made absolute from `base` if it has one; whether it exists is for `load_callable`."""
    source, separator, attribute = name.rpartition(":")
    return f"{(Path(base) / source).resolve()}:{attribute}" if separator and source.endswith(".py") else name


def _from_file(path: Path) -> ModuleType:
    path = path.resolve()
    # A name of its own for each file, so that two model.py do not meet; kept, so that its classes can be pickled.
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.parent))
    return module
