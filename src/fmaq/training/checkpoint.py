"""Checkpoints: one safetensors file with every tensor of a run, and the rest of its state as JSON in the file's header.

One file, so that one rename replaces the whole state. It holds the model, the optimizer, the states of each process's
random generators, the place in the schedule, and the identity of the run: a checkpoint of another run is refused.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fmaq.training.files import write_bytes
from fmaq.training.processes import Processes, like, whole

FORMAT = "fmaq checkpoint 2"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or belongs to another run; the message says what differs and what to do."""


def model_signature(model: nn.Module) -> str:
    """A hash of the model's class and the names, shapes and types of its tensors (not their values)."""
    parts = [f"{name} {tuple(t.shape)} {t.dtype}" for name, t in model.state_dict().items()]
    return hashlib.sha256("\n".join([type(model).__qualname__, *parts]).encode()).hexdigest()[:16]


def write(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    state: Mapping[str, Any],
    processes: Processes,
) -> None:
    """Write a checkpoint atomically; `state` is JSON. All processes take part, and the main one writes."""
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    if optimizer is not None:
        for index, values in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in values.items() if isinstance(v, Tensor)}
    # A copy each: safetensors refuses tensors that share memory, as tied weights do.
    plain = {name: whole(t.detach()).cpu().contiguous().clone() for name, t in tensors.items()}
    generators = processes.gathered(_generators())
    if not processes.is_main:
        return
    for rank, (found, _) in enumerate(generators):
        plain |= {f"{_of_rank(rank)}.{name}": t for name, t in found.items()}
    states = {_of_rank(rank): rest for rank, (_, rest) in enumerate(generators)}
    header = {"format": FORMAT, "state": json.dumps({**state, "generators": states})}
    write_bytes(path, save(plain, metadata=header))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the state of a checkpoint.

    Raises:
        CheckpointError: it cannot be read, or is not a checkpoint of this package.
    """
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise CheckpointError(
                    f"{path} is not a checkpoint of this version of fmaq; delete it, or choose another output"
                )
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(header["state"])  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"cannot read the checkpoint {path}: {error}; delete it, or choose another output"
        ) from None


def check_identity(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another run.

    Raises:
        CheckpointError: naming what differs: model, policy, schedule, data or seed.
    """
    differing = [name for name in wanted if found.get(name) != wanted[name]]
    if differing:
        sides = {name: _differing(found.get(name), wanted[name]) for name in differing}
        details = "; ".join(
            f"{name}: it has {_short(its)}, this run {_short(ours)}" for name, (its, ours) in sides.items()
        )
        raise CheckpointError(
            f"{path} is the checkpoint of a run with another {' and another '.join(differing)} ({details}). "
            f"Choose another output folder, or start over with resume=False (--fresh), which overwrites it"
        )


def _differing(found: Any, wanted: Any) -> tuple[Any, Any]:
    """Of two mappings, the keys in which they differ."""
    if not (isinstance(found, Mapping) and isinstance(wanted, Mapping)):
        return found, wanted
    keys = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    return {key: found.get(key) for key in keys}, {key: wanted.get(key) for key in keys}


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else text[:157] + "..."


def restore_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put a checkpoint's model back, in place."""
    model.load_state_dict({name[6:]: t for name, t in tensors.items() if name.startswith("model.")})


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put a checkpoint's optimizer back, in place."""
    values: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            values.setdefault(int(index), {})[key] = tensor
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for n, parameter in enumerate(parameters):
        for key, tensor in values.get(n, {}).items():
            if tensor.shape == parameter.shape:
                values[n][key] = like(tensor, parameter)
    state = optimizer.state_dict()
    optimizer.load_state_dict({"state": values, "param_groups": state["param_groups"]})


def _of_rank(rank: int) -> str:
    """What the generators of a process are called."""
    return f"generator{rank}"


def _generators() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """States of torch's, NumPy's and Python's global generators of this process, as tensors and JSON."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    version, words, python_gauss = random.getstate()
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "python": torch.tensor(words, dtype=torch.int64),
    }
    if torch.cuda.is_initialized():
        tensors |= {f"cuda.{i}": t for i, t in enumerate(torch.cuda.get_rng_state_all())}
    rest = {"numpy": [str(name), int(position), int(has_gauss), float(gauss)], "python": [version, python_gauss]}
    return tensors, rest


def restore_generators(tensors: Mapping[str, Tensor], state: Mapping[str, Any], rank: int) -> None:
    """Put the global generators of a process back."""
    of_rank = _of_rank(rank)
    rest = state["generators"][of_rank]
    torch.set_rng_state(tensors[f"{of_rank}.torch"])
    name, position, has_gauss, gauss = rest["numpy"]
    np.random.set_state((name, tensors[f"{of_rank}.numpy"].numpy().astype(np.uint32), position, has_gauss, gauss))
    version, python_gauss = rest["python"]
    random.setstate((version, tuple(tensors[f"{of_rank}.python"].tolist()), python_gauss))
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"{of_rank}.cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"{of_rank}.cuda.{index}"], index)
