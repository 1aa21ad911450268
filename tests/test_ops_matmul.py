"""`matmul` and `linear`: the reference by equality, torch's shapes, torch's own gradients, and messages."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fmaq
from fmaq.numerics import Accumulator
from ops_cases import ACCUMULATORS, EXACT, accumulators, reference_matmul, same, spoiled, torch_gradients, values

SHAPES = [
    ((5,), (5,)),
    ((3, 5), (5,)),
    ((5,), (5, 4)),
    ((3, 5), (5, 4)),
    ((2, 3, 5), (5, 4)),
    ((2, 3, 5), (1, 5, 4)),
    ((3, 5), (2, 5, 4)),
    ((5,), (2, 5, 4)),
    ((2, 3, 5), (5,)),
    ((3, 5), (1, 1, 5, 4)),
    ((2, 1, 3, 5), (3, 5, 4)),
    ((2, 1, 3, 5), (1, 3, 5, 1)),
    ((0, 5), (5, 4)),
    ((3, 5), (5, 0)),
    ((3, 0), (0, 4)),
    ((0, 3, 5), (5, 4)),
    ((0, 3, 5), (0, 5, 4)),
    ((2, 3, 0), (2, 0, 4)),
    ((0,), (0,)),
]


@pytest.mark.parametrize(("a_shape", "b_shape"), SHAPES, ids=str)
@pytest.mark.parametrize("acc", ACCUMULATORS, ids=str)
def test_shapes_of_torch_and_values_of_the_reference(a_shape, b_shape, acc):
    rng = np.random.default_rng(1)
    a, b = values(rng, a_shape), values(rng, b_shape)
    y = fmaq.matmul(a, b, acc)
    assert y.shape == torch.matmul(a, b).shape
    same(y, reference_matmul(a, b, acc))


@st.composite
def batches(draw):
    """Two batch shapes that broadcast."""
    common = draw(st.lists(st.integers(0, 3), max_size=3))
    pair = [[draw(st.sampled_from([n, n, 1])) for n in common] for _ in range(2)]
    return [tuple(shape[draw(st.integers(0, len(shape))) :]) for shape in pair]


@settings(max_examples=80)
@given(
    batches(),
    st.tuples(*[st.integers(0, 6)] * 3),
    accumulators,
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]),
    st.integers(0, 2),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_broadcasts_strides_dtypes_and_non_finite(batch, sizes, acc, dtype, bad, is_transposed, seed):
    rng = np.random.default_rng(seed)
    m, k, n = sizes
    a = spoiled(rng, values(rng, (*batch[0], m, k)), bad).to(dtype)
    b = spoiled(rng, values(rng, (*batch[1], k, n)), bad).to(dtype)
    if is_transposed:
        a, b = a.mT.clone(memory_format=torch.contiguous_format).mT, b.mT.clone().mT
    same(fmaq.matmul(a, b, acc), reference_matmul(a, b, acc))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_torchs_default_type_is_of_no_consequence(default):
    rng = np.random.default_rng(9)
    a, b, x, w = (
        torch.from_numpy(rng.normal(size=s).astype(np.float32)) for s in ((5, 9), (9, 3), (2, 3, 6, 6), (4, 3, 3, 3))
    )
    mask = torch.ones(5, 5, dtype=torch.bool).tril()

    def results() -> list[torch.Tensor]:
        found = [fmaq.matmul(a, b, "paper12"), fmaq.conv2d(x, w, None, "paper12"), fmaq.quantize(x.mT[::2], "M4E3")]
        found.append(fmaq.scaled_dot_product_attention(a, a, a, "paper12", attn_mask=mask))
        for operation, operands in (
            (fmaq.matmul, (a, b)),
            (lambda *o, **how: fmaq.conv2d(o[0], o[1], None, *o[2:], **how), (x, w)),
        ):
            leaves = [operand.clone().requires_grad_() for operand in operands]
            operation(*leaves, "M4E3b5 product=M4E3b6", estimator="immediate/diff").sum().backward()
            found += [leaf.grad for leaf in leaves]
        return found

    expected = results()
    torch.set_default_dtype(default)
    try:
        found = results()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(
        mine.dtype == torch.float32 and torch.equal(mine, other) for mine, other in zip(found, expected, strict=True)
    )


def test_strides_of_zero_and_of_every_second_column():
    rng = np.random.default_rng(2)
    a, b = values(rng, (1, 7)).expand(4, 7), values(rng, (7, 10))[:, ::2]
    same(fmaq.matmul(a, b, "paper12"), reference_matmul(a, b, Accumulator.paper12))


def test_a_view_that_is_negated_when_read():
    x = torch.complex(torch.ones(2, 2), torch.arange(4.0).reshape(2, 2)).conj().imag
    assert x.is_neg()
    same(fmaq.matmul(x, torch.eye(2), EXACT), -np.arange(4.0).reshape(2, 2))


@pytest.mark.parametrize("acc", ["paper12", "M7E4b10 product=M7E4b12", {"format": "M7E4b10"}, Accumulator.paper12])
def test_every_description_of_an_accumulator(acc):
    rng = np.random.default_rng(3)
    a, b = values(rng, (3, 20)), values(rng, (20, 2))
    same(fmaq.matmul(a, b, acc), reference_matmul(a, b, Accumulator.parse(acc)))


# --- Gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("a_shape", "b_shape"), SHAPES, ids=str)
def test_gradients_are_those_of_torch(a_shape, b_shape):
    rng = np.random.default_rng(4)
    a, b = (values(rng, shape).requires_grad_() for shape in (a_shape, b_shape))
    y = fmaq.matmul(a, b, "paper12")
    grad = values(rng, y.shape)
    for mine, theirs in zip(
        torch_gradients(y, (a, b), grad), torch_gradients(torch.matmul(a, b), (a, b), grad), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_gradients_have_the_operands_dtype(dtype):
    rng = np.random.default_rng(5)
    a, b = (values(rng, shape).to(dtype).requires_grad_() for shape in ((3, 5), (5, 2)))
    fmaq.matmul(a, b, "paper12").sum().backward()
    expected = torch.ones(3, 2) @ b.detach().float().T
    assert a.grad.dtype == b.grad.dtype == dtype
    assert torch.equal(a.grad.float(), expected.to(dtype).float())


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_only_the_gradient_that_is_wanted_is_computed_and_kept(wanted):
    a, b = torch.ones(2, 3, requires_grad=wanted[0]), torch.ones(3, 4, requires_grad=wanted[1])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        y = fmaq.matmul(a, b, EXACT)
    assert kept == ([(1, 3, 4)] if wanted[0] else [(1, 2, 3)])
    y.sum().backward()
    assert (a.grad is not None, b.grad is not None) == wanted


def test_second_derivatives():
    rng = np.random.default_rng(6)
    a, b = values(rng, (2, 3, 4)).requires_grad_(), values(rng, (4, 2)).requires_grad_()

    def curvature(product):
        (first,) = torch.autograd.grad(product(a, b).pow(2).sum(), a, create_graph=True)
        return torch_gradients(first.pow(2).sum(), (a, b), torch.ones(()))

    exact = curvature(torch.matmul)
    for mine, theirs in zip(curvature(lambda a, b: fmaq.matmul(a, b, EXACT)), exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_vmap_and_per_example_gradients():
    rng = np.random.default_rng(7)
    weight, x = values(rng, (5, 4)), values(rng, (6, 3, 5))
    stacked = torch.func.vmap(lambda x: fmaq.matmul(x, weight, "paper12"))(x)
    assert torch.equal(stacked, fmaq.matmul(x, weight, "paper12"))

    def loss(weight, x):
        return fmaq.matmul(x, weight, "paper12").sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, x)
    torch.testing.assert_close(each, x.sum(1)[:, :, None].expand(6, 5, 4))


def test_autocast_changes_neither_result_nor_gradient():
    rng = np.random.default_rng(8)
    a, b = values(rng, (3, 40)).requires_grad_(), values(rng, (40, 5)).requires_grad_()
    y = fmaq.matmul(a, b, "paper12")
    expected = torch_gradients(y, (a, b), torch.ones(3, 5) / 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = fmaq.matmul(a, b, "paper12")
        inside = torch_gradients(under, (a, b), torch.ones(3, 5) / 3)
    assert under.dtype == torch.float32
    assert torch.equal(under, y)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(inside, expected, strict=True))


# --- linear -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x_shape", "weight_shape", "bias_shape"),
    [
        ((5,), (4, 5), (4,)),
        ((3, 5), (4, 5), (4,)),
        ((2, 3, 5), (4, 5), None),
        ((2, 3, 5), (5,), ()),
        ((0, 5), (4, 5), (4,)),
    ],
)
def test_linear(x_shape, weight_shape, bias_shape):
    rng = np.random.default_rng(9)
    x, weight = values(rng, x_shape), values(rng, weight_shape)
    bias = None if bias_shape is None else values(rng, bias_shape)
    y = fmaq.linear(x, weight, bias, "paper12")
    assert y.shape == torch.nn.functional.linear(x, weight, bias).shape
    product = reference_matmul(x, weight.t(), Accumulator.paper12).astype(np.float32)
    same(y, product if bias is None else product + bias.numpy())


def test_linear_gradients_with_a_half_precision_bias():
    rng = np.random.default_rng(10)
    x, weight, bias = (values(rng, s).requires_grad_() for s in ((6, 5), (4, 5), (4,)))
    half = bias.detach().half().requires_grad_()
    grad = values(rng, (6, 4))
    mine = torch_gradients(fmaq.linear(x, weight, half, "paper12"), (x, weight, half), grad)
    theirs = torch_gradients(torch.nn.functional.linear(x, weight, bias), (x, weight, bias), grad)
    torch.testing.assert_close(mine[:2], theirs[:2])
    torch.testing.assert_close(mine[2], theirs[2].half())


# --- Messages ---------------------------------------------------------------------------------------------------------

A, B = torch.ones(2, 3), torch.ones(3, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fmaq.matmul(B, B, "paper12"), ValueError, r"a \(3, 4\) and b \(3, 4\): a's last dimension and b's"),
        (lambda: fmaq.matmul(torch.ones(2, 2, 3), torch.ones(3, 3, 4), "paper12"), ValueError, "do not broadcast"),
        (lambda: fmaq.matmul(torch.ones(()), B, "paper12"), ValueError, "at least one dimension"),
        (lambda: fmaq.matmul(A, B, "M7E4"), ValueError, 'format "M7E4" is a template'),
        (lambda: fmaq.matmul(A, B, "M7E4b200"), ValueError, "does not fit in float32"),
        (lambda: fmaq.linear(A, B, None, "paper12"), ValueError, r"weight \(3, 4\) to x \(2, 3\): their last dimens"),
        (lambda: fmaq.linear(A, A, torch.ones(3), "paper12"), ValueError, r"bias must be \(2,\), got \(3,\)"),
        (lambda: fmaq.linear(A, torch.ones(1, 2, 3), None, "paper12"), ValueError, r"weight must be \(N, K\) or"),
    ],
)
def test_messages(call, error, message):
    with pytest.raises(error, match=message):
        call()
