"""calibrate under torch.distributed: every process has the policy that one with all batches would have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import fmaq

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch lacks gloo")
TEMPLATE = "M5E4 product=M5E4"


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)).eval()


def batches(rank: int) -> list[torch.Tensor]:
    """The second process meets larger inputs, and more of them."""
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(32, 16, generator=generator) * 2.0**rank for _ in range(1 + rank)]


def run(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        wrapped = nn.parallel.DistributedDataParallel(network())
        fmaq.calibrate(wrapped, TEMPLATE, batches(rank)).save(f"{folder}/together-{rank}.yaml")
        alone = fmaq.calibrate(network(), TEMPLATE, batches(rank), together=False)
        alone.save(f"{folder}/alone-{rank}.yaml")
        try:
            fmaq.calibrate(network(), TEMPLATE, batches(0) if rank == 0 else 3)
        except TypeError as error:
            Path(f"{folder}/error-{rank}").write_text(str(error))
    finally:
        dist.destroy_process_group()


def test_two_processes_agree_on_what_one_would_choose(tmp_path):
    mp.spawn(run, args=(str(tmp_path),), nprocs=2)
    first, second = (fmaq.Policy.load(tmp_path / f"together-{rank}.yaml") for rank in range(2))
    expected = fmaq.calibrate(network(), TEMPLATE, [*batches(0), *batches(1)])
    assert first == second
    assert {name.removeprefix("module."): entry for name, entry in first.layers.items()} == expected.layers
    for rank in range(2):
        alone = fmaq.Policy.load(tmp_path / f"alone-{rank}.yaml")
        assert alone == fmaq.calibrate(network(), TEMPLATE, batches(rank)) != expected
        message = "rank 1: batches must be an iterable of batches, such as [x], got int"
        assert (tmp_path / f"error-{rank}").read_text() == message
