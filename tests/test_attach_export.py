"""Attached models under torch.export: the bits of eager, also in a process that has not the model's code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fmaq
from test_attach_compile import NARROW, ONE_PROCESS, Net, hugging_face

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
DOCS = Path(__file__).parents[1] / "docs" / "pytorch.md"


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize("strict", [False, True])
def test_every_product_is_an_operator(strict) -> None:
    torch.manual_seed(0)
    model = fmaq.attach(Net().eval(), NARROW)
    program = torch.export.export(model, (X,), strict=strict)
    assert torch.equal(program.module()(X), model(X))
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum("fmaq.matmul" in target for target in targets) == 5
    assert sum("fmaq.convolution" in target for target in targets) == 1
    assert not any(word in target for target in targets for word in ("aten.matmul", "aten.linear", "aten.conv"))


def test_another_process_runs_it(tmp_path) -> None:
    torch.manual_seed(0)
    model = fmaq.attach(Net().eval(), NARROW)
    torch.export.save(torch.export.export(model, (X,)), tmp_path / "model.pt2")
    torch.save((X, model(X).detach()), tmp_path / "expected.pt")
    code = (
        "import sys, torch, fmaq.ops; x, expected = torch.load(sys.argv[2]); "
        "assert torch.equal(torch.export.load(sys.argv[1]).module()(x), expected)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt2", tmp_path / "expected.pt"], check=True)


def test_shapes_may_be_left_open() -> None:
    model = fmaq.attach(torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU()).eval(), NARROW)
    program = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim("rows", min=2, max=64)},))
    more = torch.randn(7, 6)
    assert torch.equal(program.module()(more), model(more))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "llama", "resnet"])
def test_known_classes(name) -> None:
    make, inputs = hugging_face(name, "sdpa" if name != "resnet" else "eager")
    torch.manual_seed(0)
    model = fmaq.attach(make().eval(), NARROW)
    program = torch.export.export(model, (), inputs)
    assert torch.equal(first(program.module()(**inputs)), first(model(**inputs)))


def test_the_documents_code_runs(tmp_path) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL))
    assert code.count("fmaq.") > 5
    environment = os.environ | ONE_PROCESS
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, env=environment, check=True)
    assert {path.suffix for path in tmp_path.iterdir()} == {".pt2", ".onnx"}
