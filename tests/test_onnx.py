"""Attached models as ONNX: run by onnxruntime with fmaq's operators, and plain."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import fmaq
import fmaq.onnx
from test_attach_compile import NARROW, Net, hugging_face

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))


def outputs(session, *inputs: Tensor) -> np.ndarray:
    return session.run(
        None, dict(zip((i.name for i in session.get_inputs()), (x.numpy() for x in inputs), strict=True))
    )[0]


class Products(nn.Module):
    """Products, and nothing that onnxruntime computes in another way than torch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.conv = (
            nn.Linear(6, 8),
            nn.Linear(8, 4, bias=False),
            nn.Conv2d(1, 2, (3, 2), (2, 1), 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        return self.conv((self.second(hidden) @ hidden[:, :4].mT)[None, None])


POLICIES = [
    NARROW,
    fmaq.Policy(accumulator="I16f0", weight="int8", activation="int8", weight_per_channel=True),
    fmaq.Policy(accumulator="M3E5b14 rounding=stochastic seed=18446744073709551615", noise="repeated"),
    fmaq.Policy(accumulator="M5E4b9", per_token=True, weight="M4E3", weight_per_channel=True),
]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_the_bits_of_torch(policy, tmp_path) -> None:
    model = fmaq.attach(Products(), policy)
    path = fmaq.onnx.export(model, (X,), tmp_path / "model.onnx")
    operators = {node.op_type for node in onnx.load(path).graph.node if node.domain == "fmaq"}
    assert {"MatMul", "Conv"} <= operators
    assert np.array_equal(outputs(fmaq.onnx.session(path), X), model(X).detach().numpy())


def test_a_calibrated_model(tmp_path) -> None:
    model = Products()
    policy = fmaq.calibrate(model, fmaq.Policy(accumulator="M4E3 product=M4E3", weight="M4E3", activation="M4E3"), [X])
    fmaq.attach(model, policy)
    session = fmaq.onnx.session(fmaq.onnx.export(model, (X,), tmp_path / "model.onnx"))
    assert np.array_equal(outputs(session, X), model(X).detach().numpy())


@pytest.mark.slow
def test_bert(tmp_path) -> None:
    make, inputs = hugging_face("bert", "eager")
    torch.manual_seed(0)
    model = fmaq.attach(make().eval(), NARROW)
    path = fmaq.onnx.export(model, (inputs["input_ids"],), tmp_path / "model.onnx")
    found = outputs(fmaq.onnx.session(path), inputs["input_ids"])
    assert np.abs(found - model(**inputs)[0].detach().numpy()).max() < 0.5  # GELU and softmax differ in their last bits
    assert fmaq.onnx.operators.DOMAIN in {one.domain for one in onnx.load(path).opset_import}


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_plain(policy, tmp_path) -> None:
    model = fmaq.attach(Products(), policy)
    path = fmaq.onnx.export(model, (X,), tmp_path / "model.onnx", plain=True)
    assert {node.domain for node in onnx.load(path).graph.node} == {""}
    fmaq.attach(model, fmaq.Policy(weight=policy.weight, weight_per_channel=policy.weight_per_channel))
    found = outputs(onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]), X)
    assert np.allclose(found, model(X).detach().numpy(), atol=1e-5)
    assert fmaq.emulation.policy_of(model) is not None


def test_what_cannot_be_plain_is_named(tmp_path) -> None:
    class Made(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.w * x.mean())

    model = fmaq.attach(Made(), NARROW)
    with pytest.raises(ValueError, match="computed from the inputs"):
        fmaq.onnx.export(model, (X,), tmp_path / "model.onnx", plain=True)


def test_errors(tmp_path) -> None:
    with pytest.raises(ValueError, match="attached to no policy"):
        fmaq.onnx.export(Net(), (X,), tmp_path / "model.onnx")
    with pytest.raises(FileNotFoundError, match="there is no ONNX model"):
        fmaq.onnx.session(tmp_path / "nothing.onnx")
