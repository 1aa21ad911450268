"""One call for a model and the policy that was saved with it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fmaq.emulation.attach import attach
from fmaq.emulation.policy import POLICY_FILE, Policy
from fmaq.emulation.vector_files import named_by

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
"""Arguments of `from_pretrained` that say where a checkpoint's files are."""


def from_pretrained(cls: Any, source: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
    """The model of `cls.from_pretrained(source, *args, **kwargs)`, attached to the policy that was saved with it.

    Args:
        cls: a class of transformers or PEFT, such as `AutoModelForCausalLM`.
        source: a folder to which an attached model was saved by its `save_pretrained`, or the name of a repository on
            the hub with the same files.

    Raises:
        FileNotFoundError: no policy was saved there.
        ValueError: the policy cannot be read, or does not fit the model; names the file and the entry.
    """
    path = _policy_file(source, {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name)})
    policy = Policy.load(path)
    model = cls.from_pretrained(source, *args, **kwargs)
    try:
        return attach(model, policy)
    except ValueError as error:
        raise ValueError(f"{path} does not fit {type(model).__name__}: {error}") from error


def _policy_file(source: str | os.PathLike[str], options: dict[str, Any]) -> Path:
    """The policy's file in a folder, or as downloaded from the hub, with its vectors beside it."""
    folder = Path(source, options.get("subfolder", ""))
    if folder.is_dir():
        if (folder / POLICY_FILE).is_file():
            return folder / POLICY_FILE
        raise FileNotFoundError(_has_none(source))
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        path = Path(hf_hub_download(os.fspath(source), POLICY_FILE, **options))
    except LocalEntryNotFoundError:  # it may be on the hub
        raise
    except EntryNotFoundError as error:
        raise FileNotFoundError(_has_none(source)) from error
    vectors = named_by(path)
    if vectors is not None:
        hf_hub_download(os.fspath(source), vectors, **options)
    return path


def _has_none(source: str | os.PathLike[str]) -> str:
    return (
        f"{os.fspath(source)} has no {POLICY_FILE}, which save_pretrained of an attached model writes; a model without "
        "one is attached by fmaq.attach(model, policy)"
    )
