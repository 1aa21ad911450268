"""What of a loader's batches a model is given: labels are left out with a warning, or refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fmaq
from fmaq.analysis import CalibrationWarning
from fmaq.analysis.batches import inputs_of

X, Y, MASK = torch.arange(12.0).reshape(6, 2), torch.arange(6), torch.ones(6, 2, dtype=torch.bool)


class One(nn.Module):
    def forward(self, x):
        return x


class Masked(nn.Module):
    def forward(self, x, mask=None):
        return x


class Two(nn.Module):
    def forward(self, x, t, y=None):
        return x


class Any(nn.Module):
    def forward(self, *parts, **named):
        return parts


def loader(*tensors: torch.Tensor) -> DataLoader:
    return DataLoader(TensorDataset(*tensors), batch_size=3)


def silently(model: nn.Module, batches) -> list:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return inputs_of(model, batches)


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.DataParallel(m)])
def test_labels_that_forward_has_no_parameter_for_are_left_out(wrap):
    text = (
        r"calibrate leaves out the last of the 2 parts of each batch, since One.forward takes \(x\): taken for labels"
    )
    for batches in (loader(X, Y), list(loader(X, Y)), (batch for batch in loader(X, Y)), TensorDataset(X, Y)):
        with pytest.warns(CalibrationWarning, match=text) as caught:
            found = inputs_of(wrap(One()), batches)
        assert len(caught) == 1 and torch.equal(torch.cat([x.reshape(-1, 2) for (x,) in found]), X)


def test_the_calibrated_policy_is_that_of_the_inputs_alone():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(2, 4)), torch.randn(64, 2)
    with pytest.warns(CalibrationWarning, match=r"Sequential.forward takes \(input\)") as caught:
        policy = fmaq.calibrate(model, "M7E4 product=M7E4", DataLoader(TensorDataset(x, torch.arange(64)), 32))
    assert policy == fmaq.calibrate(model, "M7E4 product=M7E4", list(x.split(32))) and len(caught) == 1


@pytest.mark.parametrize(
    "batches",
    [loader(X, Y), loader(X, Y.float()), list(loader(X, Y)), [(X, Y)], [(X[0], 3)], TensorDataset(X, Y)],
)
def test_labels_do_not_slip_into_an_optional_parameter(batches):
    message = (
        r"Masked.forward takes \(x, mask\), and a batch has a part for 'mask', which is optional: this may be labels"
    )
    with pytest.raises(ValueError, match=message) as caught:
        inputs_of(Masked(), batches)
    assert '[{"x": x, …} for x, … in loader]' in str(caught.value)


def test_what_is_meant_is_passed_on():
    for given in ([(X, MASK), (X,)], [{"x": X, "mask": Y}], [X, X]):
        found = silently(Masked(), given)
        assert found == given, "the very tensors"
    assert [len(batch) for batch in silently(Two(), loader(X, Y))] == [2, 2], "t is no option"
    (positional, named) = silently(Any(), [[X, Y, MASK], {"labels": Y}])
    assert len(positional) == 3 and list(named) == ["labels"]
    with pytest.raises(ValueError, match="a part for 'y', which is optional"):
        inputs_of(Two(), loader(X, Y, Y))


def test_keys_that_forward_does_not_have():
    with pytest.warns(CalibrationWarning, match="leaves out 'labels', which Masked.forward does not take"):
        assert list(inputs_of(Masked(), [{"x": X, "labels": Y}])[0]) == ["x"]
    with pytest.raises(ValueError, match=r"Masked\.forward has no parameter 'maks'; did you mean 'mask'"):
        inputs_of(Masked(), [{"x": X, "maks": MASK}])


def test_more_parts_than_labels_explain_are_refused():
    with pytest.raises(ValueError, match=r"One.forward takes \(x\), and a batch has 3 parts. Give the inputs alone"):
        inputs_of(One(), loader(X, Y, Y))
