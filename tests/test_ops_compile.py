"""Products in a function that is compiled: one graph, with the bits of eager mode; counts break it."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import fmaq
from fmaq.numerics import Accumulator

ACC = Accumulator("M5E4b8", product="M5E4b9", chunk=4)
NOISY = Accumulator("M3E5b16", rounding="stochastic", seed=3)
A, B, IMAGE, FILTER = torch.randn(3, 5), torch.randn(5, 2), torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)
Q = torch.randn(2, 3, 4)

PUBLIC = {
    "matmul": lambda: fmaq.matmul(A, B, ACC) * 2,
    "matmul, stochastic": lambda: fmaq.matmul(A, B, NOISY) * 2,
    "matmul by channel": lambda: fmaq.matmul(A, B, ACC, offset=torch.tensor([0, 1]), gain=1.5) * 2,
    "linear": lambda: fmaq.linear(A, B.T, B[0], ACC) * 2,
    "conv1d": lambda: fmaq.conv1d(IMAGE[0, :, 0], FILTER[:, :, 0], None, ACC) * 2,
    "conv2d": lambda: fmaq.conv2d(IMAGE, FILTER, None, ACC, stride=2, padding=1) * 2,
    "conv3d": lambda: fmaq.conv3d(IMAGE[None], FILTER[None, :1], None, ACC) * 2,
    "conv_transpose1d": lambda: fmaq.conv_transpose1d(IMAGE[0, :, 0], FILTER[:2, :, 0], None, ACC) * 2,
    "conv_transpose2d": lambda: fmaq.conv_transpose2d(IMAGE, FILTER[:2], None, ACC) * 2,
    "conv_transpose3d": lambda: fmaq.conv_transpose3d(IMAGE[None], FILTER[None, :1], None, ACC) * 2,
    "attention": lambda: fmaq.scaled_dot_product_attention(Q, Q, Q, ACC) * 2,
    "quantize": lambda: fmaq.quantize(A, "M4E3") * 2,
    "integer_codes": lambda: fmaq.ops.integer_codes(A, "int8")[0] * 2,
    "quantize to integers": lambda: fmaq.quantize(A, "int8", channel=0) * 2,
}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "eager") for name in PUBLIC), ("matmul", "aot_eager"), ("conv2d", "aot_eager")]
)
def test_a_compiled_function_gives_the_same_bits(name, backend) -> None:
    function = PUBLIC[name]
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    assert torch.equal(compiled(), function())
    assert torch.equal(compiled(), function())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("estimator", ["identity", "recursive/diff"])
def test_a_compiled_training_step_gives_the_same_gradients(backend, estimator) -> None:
    def step(w: torch.Tensor, is_compiled: bool) -> torch.Tensor:
        def forward(w):
            y = fmaq.matmul(fmaq.quantize(A.cos(), "M4E3"), w.sin(), ACC, estimator=estimator)
            return (y.relu() + y).square().sum()

        def whole(w):
            loss = forward(w)
            loss.backward()
            return loss

        w = w.clone().requires_grad_()
        (torch.compile(whole, backend=backend) if is_compiled else whole)(w)
        return w.grad

    assert torch.equal(step(B, True), step(B, False))


def test_a_module_around_a_product_compiles() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(B.clone())

        def forward(self, x):
            return fmaq.matmul(x.tanh(), self.w, ACC).tanh()

    layer = Layer()
    assert torch.equal(torch.compile(layer, backend="eager")(A), layer(A))


def test_counts_break_the_graph() -> None:
    def function() -> torch.Tensor:
        return A.sum() * fmaq.count_events(A, B, ACC).steps

    assert torch.equal(torch.compile(function, backend="eager")(), function())
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="fmaq counts in plain numbers"):
        torch.compile(function, backend="eager", fullgraph=True)()


def test_nothing_of_the_compiler_is_imported() -> None:
    code = (
        "import sys, torch, fmaq; fmaq.matmul(torch.ones(2, 3), torch.ones(3, 2), 'paper12'); "
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_and_signatures_stay() -> None:
    import inspect

    assert fmaq.matmul.__name__ == "matmul" and next(iter(inspect.signature(fmaq.quantize).parameters)) == "x"
    assert fmaq.conv2d.__module__ == "fmaq.ops.conv"
