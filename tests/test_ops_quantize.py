"""Tensor quantization: the reference by equality, channels, gradients and messages."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fmaq
from fmaq import ops
from fmaq.numerics import FloatFormat, reference
from ops_cases import same, values


def expected(x, format):
    """The reference's, of a float or integer format."""
    if isinstance(format, str) and format.startswith("int"):
        return reference.quantize_integer(x, int(format[3:]))
    return reference.quantize_tensor(x, format if isinstance(format, FloatFormat) else FloatFormat.parse(format))


@st.composite
def formats(draw):
    exponent = draw(st.integers(1, 8))
    lowest = max(-700, 2**exponent - 128)
    bias = draw(st.one_of(st.none(), st.integers(lowest, min(700, lowest + 300))))
    return FloatFormat(draw(st.integers(0, 23)), exponent, bias)


@st.composite
def tensors(draw):
    """Any finite float32 numbers, mostly of one scale."""
    seed, scale = draw(st.integers(0, 2**32 - 1)), draw(st.integers(-148, 126))
    rng = np.random.default_rng(seed)
    spread = draw(st.sampled_from([0, 3, 40]))
    with np.errstate(over="ignore", under="ignore"):
        x = np.ldexp(rng.normal(size=draw(st.integers(1, 40))), scale + rng.integers(-spread, spread + 1))
        x = x.astype(np.float32)
    extra = draw(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=3))
    return np.concatenate([np.where(np.isfinite(x), x, 0), np.array(extra, np.float32)]).astype(np.float32)


@settings(max_examples=300)
@given(tensors(), st.one_of(formats(), st.sampled_from(["M4E3", "M3E4", "M7E8", "int8", "int4", "int2", "int16"])))
def test_equals_the_reference(x, format):
    same(fmaq.quantize(torch.from_numpy(x), format), expected(x, format))


@settings(max_examples=200)
@given(
    tensors(),
    st.one_of(formats().filter(lambda format: format.bias is None), st.sampled_from(["M4E3", "int8", "int4", "int16"])),
    st.floats(2.0**-100, 2.0**100, width=32),
)
def test_a_static_range_is_in_place_of_the_largest(x, format, amax):
    found = fmaq.quantize(torch.from_numpy(x), format, amax=amax)
    if isinstance(format, str) and format.startswith("int"):
        same(found, reference.quantize_integer(x, int(format[3:]), amax))
        codes, scale = ops.integer_codes(torch.from_numpy(x), format, amax=amax)
        expected_codes, expected_scale = reference.integer_codes(x, int(format[3:]), amax)
        same(codes, expected_codes)
        assert scale.item() == expected_scale
    else:
        same(
            found, reference.quantize_tensor(x, FloatFormat.parse(format) if isinstance(format, str) else format, amax)
        )


@pytest.mark.parametrize("format", ["M4E3", "int8"])
def test_a_static_range_by_channel(format):
    x = values(np.random.default_rng(3), (3, 4, 5)) * 10
    amax = torch.tensor([0.5, 3.0, 100.0, 7.0])
    found = fmaq.quantize(x, format, 1, amax)
    for i in range(4):
        assert torch.equal(found[:, i], fmaq.quantize(x[:, i], format, amax=float(amax[i])))
    assert torch.equal(fmaq.quantize(x, format, 1, 3.0), fmaq.quantize(x, format, amax=3.0))


@pytest.mark.parametrize("channel", [None, 0, -1])
@pytest.mark.parametrize("is_static", [False, True])
def test_vmap_of_codes_and_of_static_ranges(channel, is_static):
    x = values(np.random.default_rng(2), (3, 4, 5)) * torch.tensor([1e-3, 1.0, 50.0])[:, None, None]
    amax = None
    if is_static:
        amax = 2.0 if channel is None else torch.arange(1.0, 1.0 + x.shape[1:][channel])
    codes, scale = torch.vmap(lambda one: ops.integer_codes(one, "int8", channel, amax))(x)
    static = torch.vmap(lambda one: fmaq.quantize(one, "M4E3", channel, amax))(x)
    for i, one in enumerate(x):
        expected_codes, expected_scale = ops.integer_codes(one, "int8", channel, amax)
        assert torch.equal(codes[i], expected_codes) and torch.equal(scale[i], expected_scale)
        assert torch.equal(static[i], fmaq.quantize(one, "M4E3", channel, amax))


def test_the_gradient_of_codes_is_that_of_their_value():
    x = values(np.random.default_rng(2), (4, 3)).requires_grad_()
    codes, scale = ops.integer_codes(x, "int8", 1)
    grad = torch.arange(12.0).reshape(4, 3)
    (codes * scale.float()).backward(grad)
    torch.testing.assert_close(x.grad, grad)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: fmaq.quantize(x, "int8", amax=[1.0, 2.0]), r"amax must be a number, got \(2,\)"),
        (lambda x: fmaq.quantize(x, "int8", 1, [1.0]), r"amax must be a number, or \(3,\), one a slice, got \(1,\)"),
        (lambda x: fmaq.quantize(x, "int8", amax=-1.0), "amax must be finite and at least 0, got -1"),
        (lambda x: fmaq.quantize(x, "int8", amax=float("nan")), "amax must be finite and at least 0, got nan"),
        (lambda x: fmaq.quantize(x, "M4E3b7", amax=1.0), "M4E3b7 has a bias, .* amax must be None"),
        (lambda x: ops.integer_codes(x, "M4E3"), "codes are integers, and 'M4E3' is a float"),
    ],
)
def test_messages_about_ranges(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 3))


@pytest.mark.parametrize("mantissa", [0, 1, 4, 22])
@pytest.mark.parametrize("bias", [None, 3])
def test_ties_go_to_even(mantissa, bias):
    """Halfway between neighbours, in every binade and among the subnormals; without a mantissa, halfway is 1.5·2^e."""
    format = FloatFormat(mantissa, 3, bias)
    steps = np.arange(2 ** min(mantissa, 6)) / 2**mantissa
    halfway = np.concatenate([2.0**e * (1 + steps + 2.0 ** -(mantissa + 1)) for e in range(-12, 5)])
    x = np.concatenate([halfway, -halfway]).astype(np.float32)
    same(fmaq.quantize(torch.from_numpy(x), format), expected(x, format))
    same(fmaq.quantize(torch.from_numpy(x)[None], format, 0)[0], expected(x, format))


@pytest.mark.parametrize("format", ["M4E3", "M0E5", "int4"])
@pytest.mark.parametrize("channel", [None, 0, 1, -1])
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_vmap_quantizes_every_example_on_its_own(format, channel, batch):
    x = values(np.random.default_rng(2), (3, 4, 5)) * torch.tensor([1e-3, 1.0, 50.0])[:, None, None]
    found = torch.vmap(lambda one: fmaq.quantize(one, format, channel), in_dims=batch)(x)
    assert torch.equal(found, torch.stack([fmaq.quantize(one, format, channel) for one in x.unbind(batch)]))
    weights = torch.randn(4, 5)
    gradient = torch.func.vmap(torch.func.grad(lambda one: (fmaq.quantize(one, format, channel) * weights).sum()))(x)
    assert torch.equal(gradient, weights.expand(3, 4, 5))


@pytest.mark.parametrize("format", ["M4E3", "M4E3b6", "M3E8", "int8"])
@pytest.mark.parametrize("channel", [0, 1, 2, -1])
def test_every_channel_has_its_own_scale(format, channel):
    x = values(np.random.default_rng(1), (3, 4, 5)) * torch.tensor([1e-3, 1.0, 50.0])[:, None, None]
    q = fmaq.quantize(x, format, channel)
    for part, whole in zip(q.unbind(channel), x.unbind(channel), strict=True):
        same(part, expected(whole.numpy(), format))


def test_a_vector_with_a_scale_an_element():
    x = torch.tensor([0.3, -5.0, 0.0])
    torch.testing.assert_close(fmaq.quantize(x, "int8", 0), x)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
@pytest.mark.parametrize("format", ["M4E3", "int8"])
def test_scalars_and_empty_tensors(shape, format):
    x = torch.full(shape, 0.3)
    same(fmaq.quantize(x, format), expected(x.numpy(), format))


@pytest.mark.parametrize("format", ["M4E3", "M4E3b4", "M7E8", "int8"])
def test_non_finite_values_stay_and_do_not_count(format):
    x = torch.tensor([1.0, torch.nan, 0.3, torch.inf, -torch.inf])
    q = fmaq.quantize(x, format)
    same(q[[0, 2]], expected(x[[0, 2]].numpy(), format))
    assert q[1].isnan() and q[3] == torch.inf and q[4] == -torch.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("format", ["M2E3", "M2E2b3", "int4"])
def test_the_gradient_passes_straight_through(dtype, format):
    x = values(np.random.default_rng(2), (4, 3)).to(dtype).requires_grad_()
    q = fmaq.quantize(x, format)
    q.backward(torch.arange(12.0).reshape(4, 3))
    assert q.dtype == torch.float32
    assert x.grad.dtype == dtype
    assert torch.equal(x.grad.float(), torch.arange(12.0).reshape(4, 3).to(dtype).float())


def test_the_operand_is_left_as_it_was():
    x = values(np.random.default_rng(3), (20,))
    before = x.clone()
    for format in ("M4E3", "M7E8", "int8"):
        fmaq.quantize(x, format)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("format", "channel", "error", "message"),
    [
        ("M4", None, ValueError, "'M4' is not a tensor format; write a float like \"M4E3\""),
        ("M4E3z", None, ValueError, "'M4E3z' is not a tensor format"),
        ("M4E3h", None, ValueError, 'M4E3h is a half-unit format: one of sums and products.*Write "M4E3"'),
        ("M4E3b5h", None, ValueError, "M4E3b5h is a half-unit format"),
        ("I8f4", None, ValueError, "'I8f4' is not a tensor format"),
        ("int1", None, ValueError, "integers have 2 to 24 bits, got 'int1'"),
        ("M4E3b-121", None, ValueError, "values above float32's: .* 128, .* bias must be at least -120"),
        (8, None, TypeError, "got 8"),
        ("M4E3", 2, ValueError, r"channel must be a dimension of x \(2, 2\), got 2"),
    ],
)
def test_messages(format, channel, error, message):
    with pytest.raises(error, match=message):
        fmaq.quantize(torch.ones(2, 2), format, channel)


def test_double_precision_is_refused():
    with pytest.raises(TypeError, match=r"x has dtype torch\.float64"):
        fmaq.quantize(torch.ones(2).double(), "M4E3")


def test_the_gradient_passes_where_values_saturate():
    """So weights beyond the largest value, 2 · (2 − 2^−2) here, go on moving though the product stays what it is."""
    x = torch.tensor([1.0, 3.5, 4.0, -1e4]).requires_grad_()
    y = fmaq.quantize(x, "M2E2b2")
    y.sum().backward()
    assert y.tolist() == [1.0, 3.5, 3.5, -3.5] and x.grad.tolist() == [1.0, 1.0, 1.0, 1.0]
    x.grad = None
    fmaq.quantize(x.clamp(-3.5, 3.5), "M2E2b2").sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 0.0, 0.0]


def test_the_format_that_was_meant_is_named():
    for name, meant in {"E4M3": "M3E4", "float8_e5m2": "M2E5", "INT8": "int8", "m4e3": "M4E3"}.items():
        with pytest.raises(ValueError, match=f"'{name}' is not a tensor format.*did you mean \"{meant}\""):
            fmaq.quantize(torch.ones(3), name)
