"""What products accept and refuse, by message; and the names of the package, which load when they are used."""

import subprocess
import sys

import pytest
import torch

import fmaq
from fmaq.ops.operands import OPERAND_DTYPES, check, widen

X = torch.ones(2, 2)


@pytest.mark.parametrize("dtype", OPERAND_DTYPES, ids=str)
def test_widening_is_exact(dtype):
    x = torch.tensor([0.0, 0.5, -1.5, 2.0**-6, 240.0]).to(dtype)
    assert widen(x, "x").dtype == torch.float32
    assert widen(x, "x").tolist() == [float(v) for v in x.double()]


def test_float32_is_not_copied():
    assert widen(X, "x") is X


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([1.0], TypeError, "weight must be a tensor, got list"),
        (X.double(), TypeError, r"weight has dtype torch.float64; products take float32, .*with weight\.float\(\)"),
        (X.int(), TypeError, "weight has dtype torch.int32"),
        (torch.ones(2, dtype=torch.complex64), TypeError, "weight has dtype torch.complex64"),
        (X.to("meta"), ValueError, r"weight is on meta; .* with weight\.cpu\(\)"),
        (X.to_sparse(), ValueError, r"weight is a sparse_coo tensor; .*weight\.to_dense\(\)"),
    ],
    ids=["list", "float64", "int32", "complex", "meta", "sparse"],
)
def test_operands_that_are_refused(x, error, message):
    with pytest.raises(error, match=message):
        widen(x, "weight")


def test_an_unknown_estimator_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="got 'recursive/dif'; did you mean 'recursive/diff'"):
        check("paper12", "recursive/dif")


def test_every_operation_checks_the_estimator_and_the_accumulator():
    image, filters, heads = torch.ones(1, 1, 3), torch.ones(1, 1, 2), torch.ones(1, 2, 2)
    calls = (
        lambda acc, e: fmaq.linear(X, X, None, acc, e),
        lambda acc, e: fmaq.conv1d(image, filters, None, acc, estimator=e),
        lambda acc, e: fmaq.conv_transpose1d(image, filters, None, acc, estimator=e),
        lambda acc, e: fmaq.scaled_dot_product_attention(heads, heads, heads, acc, estimator=e),
    )
    for call in calls:
        with pytest.raises(ValueError, match="did you mean 'identity'"):
            call("paper12", "identiti")
        with pytest.raises(ValueError, match="template"):
            call("M7E4", "identity")


# --- The package ------------------------------------------------------------------------------------------------------


def test_importing_the_package_loads_no_kernels():
    code = "import sys, fmaq; print([m for m in ('llvmlite', 'yaml', 'rich', 'fmaq.ops') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_packages_load_when_they_are_named():
    code = "import fmaq; print(fmaq.numerics.reference.matmul.__name__, fmaq.analysis.reorder.__name__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found == "matmul reorder\n"


def test_names_of_the_package():
    assert set(fmaq.__all__) <= set(dir(fmaq))
    for name in fmaq.ops.__all__:
        if name in fmaq.__all__:
            assert getattr(fmaq, name) is getattr(fmaq.ops, name)
    assert callable(fmaq.quantize)
    with pytest.raises(AttributeError, match="module 'fmaq' has no attribute 'matmull'"):
        _ = fmaq.matmull
