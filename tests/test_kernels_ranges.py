"""The range of a tensor against NumPy: largest and smallest magnitude, significant bits, any strides."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fmaq.kernels import available_targets
from fmaq.kernels.ranges import Range, measure
from strategies import examples, laid_out

TARGETS = st.sampled_from(available_targets())
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
shapes = arrays.array_shapes(min_dims=1, max_dims=5, max_side=7)


def significant_bits(values: np.ndarray) -> int:
    """Bits from a significand's leading one to the last bit that any number needs, as float32 stores them."""
    stored = values.view(np.uint32) & 0x7FFFFF
    union = int(np.bitwise_or.reduce(stored, axis=None))
    return 1 if union == 0 else 24 - ((union & -union).bit_length() - 1)


@examples(150)
@given(values=arrays.arrays(np.float32, shapes, elements=finite), target=TARGETS, seed=st.integers(0, 2**32 - 1))
def test_equals_numpy(values, target, seed):
    x = laid_out(np.random.default_rng(seed), torch.from_numpy(values))
    found = measure(x, target)
    magnitudes = np.abs(x.numpy().astype(np.float64))
    assert found.largest == magnitudes.max()
    assert found.is_whole == bool(np.all((magnitudes == np.floor(magnitudes)) & (magnitudes < 2.0**31)))
    assert found.smallest == magnitudes[magnitudes > 0].min(initial=np.inf)
    if found.largest > 0:
        assert found.significant == significant_bits(np.ascontiguousarray(x.numpy()))
        assert 2.0 ** (found.above - 1) <= found.largest < 2.0**found.above
        assert 2.0**found.below <= found.smallest < 2.0 ** (found.below + 1)


@examples(60)
@given(values=arrays.arrays(np.float32, shapes, elements=finite), target=TARGETS)
def test_significant_bits_suffice(values, target):
    """Every number is an integer of so many bits times a power of two."""
    found = measure(torch.from_numpy(values), target)
    significands, _ = np.frexp(values.astype(np.float64))
    units = np.ldexp(significands, found.significant)
    normal = np.abs(values) >= np.finfo(np.float32).tiny
    assert np.all((units == np.floor(units)) | ~normal)


@pytest.mark.parametrize("target", available_targets(), ids=lambda t: t.name)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 33, 1000])
def test_one_number_among_zeros_is_found_wherever_it_is(target, length):
    for at in {0, length // 2, length - 1}:
        x = torch.zeros(length)
        x[at] = -5.0
        assert measure(x, target) == Range(5.0, 5.0, 3, True)


def test_zeros_alone():
    assert measure(torch.tensor([0.0, -0.0]), available_targets()[0]) == Range(0.0, math.inf, 1, True)


def test_expanded_tensors_are_read_once():
    x = torch.tensor([3.0]).expand(1 << 40)
    assert measure(x, available_targets()[0]) == Range(3.0, 3.0, 2, True)


def test_subnormal_numbers_count_under_flushing():
    """The caller's flushing of subnormals changes neither end."""
    x = torch.tensor([2.0**-149, 3 * 2.0**-130])
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush")
    try:
        found = measure(x, available_targets()[0])
    finally:
        torch.set_flush_denormal(False)
    assert (found.smallest, found.largest) == (2.0**-149, 3 * 2.0**-130)
