"""Processes that calibrate together: all batches for each, and one policy for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def are_several() -> bool:
    """torch.distributed runs, with more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def everyones(own: Callable[[], list[Any]]) -> list[Any]:
    """What each process has, rank by rank, on the device of this one's; an error of one is an error of all."""
    found: tuple[list[Any], Exception | None]
    try:
        found = own(), None
    except (TypeError, ValueError) as error:
        found = [], error
    except Exception as error:  # of a loader, say: the others are not to wait for this process
        found = [], RuntimeError(f"{type(error).__name__}: {error}")
    device = next((x.device for x in _tensors(found[0])), torch.device("cpu"))
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (_moved(found[0], torch.device("cpu")), found[1]))
    for rank, (_, problem) in enumerate(gathered):
        if problem is not None:
            raise type(problem)(f"rank {rank}: {problem}")
    return [_moved(item, device) for items, _ in gathered for item in items]


def the_first_ones(value: T) -> T:
    """What rank 0 has."""
    shared: list[Any] = [value]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return [x for part in parts for x in _tensors(part)]


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(part, device) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [_moved(part, device) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    return value
