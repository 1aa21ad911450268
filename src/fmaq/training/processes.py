"""The processes that train together: one alone, or those that torchrun or accelerate launch started.

One alone needs nothing but torch. Several, and trackers, go through accelerate: it finds each process's rank and
device, opens the process group (gloo on CPU, NCCL on GPU) and wraps the model. Every process has all of the data; which
examples are its own, and what share of a step's loss they have, is decided by `parts_of`, the same in all.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")

TRACKERS = ("tensorboard", "wandb")


class Processes:
    """This process among those that train together; alone, its methods give back what they are given.

    Args:
        device: `"cpu"`, or a kind of accelerator, of which each process takes its own.

    Attributes:
        count: of the processes; `rank` is this one's number, from 0.
        device: this process's own.

    Raises:
        ValueError: a launcher started several, and accelerate is missing, or is set up for another kind of training.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device, self.rank, self.count = torch.device(device), 0, 1
        self._accelerator: Any = None
        self.asks_to_shard = _launcher_asks_to_shard()
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            self._join(device)

    def _join(self, device: str) -> None:
        accelerate = _accelerate("training in several processes")
        # Then buckets of gradients are not made anew after the first step, and a resumed run sums in the same order.
        of_ddp = accelerate.DistributedDataParallelKwargs(find_unused_parameters=True)
        is_cpu = torch.device(device).type == "cpu"
        try:
            with accelerate.utils.patch_environment(ACCELERATE_USE_FSDP="false"):  # sharding is `wrapped`'s
                self._accelerator = accelerate.Accelerator(cpu=is_cpu, mixed_precision="no", kwargs_handlers=[of_ddp])
        except RuntimeError as error:
            if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
                raise
            raise RuntimeError(
                f"the restarted processes did not find each other: {error}. Where torchrun restarts workers it needs "
                f"the environment variable TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1; what was trained is in the checkpoint"
            ) from error
        kind = str(self._accelerator.distributed_type).rpartition(".")[2]
        if not kind.startswith("MULTI_"):
            raise ValueError(f"fmaq trains in several processes by DDP or FSDP, and accelerate is set up for {kind}")
        self.device, self.rank = self._accelerator.device, self._accelerator.process_index
        self.count = self._accelerator.num_processes
        atexit.register(_leave)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and says how it goes."""
        return self.rank == 0

    def wrapped(self, model: nn.Module, shard: bool = False) -> nn.Module:
        """The model to call in training: itself where it is alone, else in DDP, or itself sharded by FSDP.

        Args:
            shard: each process keeps its share of parameters, gradients and optimizer state; changes the model in
                place. A container's layers (of a `ModuleList` or `Sequential`) are gathered one at a time.
        """
        if self.count == 1:
            return model
        if not (shard or self.asks_to_shard):
            wrapped: nn.Module = self._accelerator.prepare_model(model)
            return wrapped
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.count,))
        for module in list(model.modules()):
            if isinstance(module, nn.ModuleList | nn.Sequential) and module is not model:
                for layer in module:
                    if not isinstance(layer, nn.ModuleList | nn.ModuleDict) and _has_parameters(layer):
                        fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    def not_yet(self, wrapped: nn.Module) -> AbstractContextManager[Any]:
        """Inside, gradients stay each process's own: more of the step's examples are to come."""
        if self.count == 1:
            return nullcontext()
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else _NotYetSharded(wrapped)

    def sum(self, value: float) -> float:
        """The sum of each process's value, in float64."""
        if self.count == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total)

    def any(self, value: bool) -> bool:
        """Whether it is true in any process."""
        return self.sum(float(value)) > 0

    def shared(self, value: T) -> T:
        """The main process's value, in all: what each of them computed, and may have got in other bits."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gathered(self, value: T) -> list[T]:
        """Every process's value, by rank, in all."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            dist.barrier()


def is_main() -> bool:
    """Whether this is the main process, or alone, by what a launcher says."""
    return int(os.environ.get("RANK") or 0) == 0


class _NotYetSharded:
    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model

    def __enter__(self) -> None:
        self._model.set_requires_gradient_sync(False)

    def __exit__(self, *_: object) -> None:
        self._model.set_requires_gradient_sync(True)


def whole(tensor: Tensor) -> Tensor:
    """A tensor, or all of one of which this process has a share; all processes have to ask."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def like(tensor: Tensor, own: Tensor) -> Tensor:
    """This process's share of a tensor, split as `own` is."""
    if not hasattr(own, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = own
    return distribute_tensor(tensor.to(sharded.device), sharded.device_mesh, sharded.placements)


def parts_of(counted: Tensor, parts: int) -> list[tuple[Tensor, float]]:
    """A step's examples in equal parts, and the share of the step's mean loss that each part's mean has.

    Args:
        counted: for each example of the step, how many of its targets count.
        parts: how many.

    Returns:
        For each part the positions of its examples in the step, in order. One without a target that counts is the
        example that has most of them, with a share of 0: every process has to take part in the exchange of gradients.
    """
    total = int(counted.sum())
    if not total:  # no loss either: it is not a number
        return [(torch.arange(len(counted)), 1 / parts)] * parts
    found = []
    for at in torch.arange(len(counted)).tensor_split(parts):
        own = int(counted[at].sum())
        found.append((at, own / total) if own else (counted.argmax()[None], 0.0))
    return found


class Trackers:
    """What draws a run's curves elsewhere, through accelerate; the main process alone speaks to them.

    Args:
        names: of `TRACKERS`.
        folder: TensorBoard's files go to its `tensorboard/<project>`.
        config: what decides the run, kept beside its curves.
        done: steps that were made before; later ones that a stopped run drew are taken back, where a tracker can.

    Raises:
        ValueError: a name is unknown, or its package or accelerate is missing.
    """

    def __init__(
        self, names: Sequence[str], project: str, folder: Path | None, config: Mapping[str, Any], done: int = 0
    ) -> None:
        self._trackers: list[Any] = []
        if not names:
            return
        unknown = next((name for name in names if name not in TRACKERS), None)
        if unknown is not None:
            raise ValueError(f"no tracker {unknown!r}; known are {', '.join(TRACKERS)}")
        if folder is None:
            raise ValueError("a tracker needs an output folder")
        _accelerate("a tracker").PartialState()
        tracking = _accelerate("a tracker", "accelerate.tracking")
        for name in names:
            known = tracking.LOGGER_TYPE_TO_CLASS[name]
            try:
                made = known(project, folder / name, purge_step=done + 1) if name == "tensorboard" else known(project)
                made.start()
            except ImportError:
                raise ValueError(f"the tracker {name} needs the package {name}: pip install {name}") from None
            made.store_init_configuration(dict(config))
            self._trackers.append(made)

    def log(self, step: int, **values: float) -> None:
        """A point of each curve."""
        for tracker in self._trackers:
            tracker.log(values, step=step)

    def close(self) -> None:
        """Write what is still to be written."""
        for tracker in self._trackers:
            tracker.finish()


def _accelerate(what: str, name: str = "accelerate") -> ModuleType:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"{what} needs the package accelerate: pip install 'fmaq[trainers]'") from None


def _launcher_asks_to_shard() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
