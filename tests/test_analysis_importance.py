"""What errors matter: gradients by the sums of all products, against autograd's own, and what calibrate makes of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fmaq
from fmaq.analysis import likelihood, projection
from fmaq.analysis.importance import gradients
from fmaq.emulation import Policy
from fmaq.emulation.products import Place


class Network(nn.Module):
    """A convolution, attention with two heads, and a linear layer; what each product gives is kept."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.out = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.kept: list[torch.Tensor] = []

    def keep(self, x):
        if x.requires_grad and self.training:
            x.retain_grad()
            self.kept.append(x)
        return x

    def forward(self, x):
        y = self.keep(self.conv(x)).relu().flatten(2).mT.unflatten(2, (2, 4)).transpose(1, 2)
        scores = self.keep(y @ y.mT)
        values = self.keep(scores.softmax(-1) @ y)
        return self.keep(self.out(values.transpose(1, 2).flatten(2).mean(1)))


def loss(output: torch.Tensor) -> torch.Tensor:
    return output.logsumexp(-1).sum()


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_autograds(frozen):
    network = Network()
    batches = [torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    wanted = [torch.zeros(())] * 4
    network.train()
    for x in batches:
        network.kept.clear()
        loss(network(x)).backward()
        squares = [x.grad.double().square() for x in network.kept]
        dims = ((0, 2, 3), (0, 2, 3), (0, 2, 3), (0,))
        wanted = [old + s.sum(d) for old, s, d in zip(wanted, squares, dims, strict=True)]
    network.eval().requires_grad_(not frozen).zero_grad(set_to_none=True)
    found = gradients(network, Policy.parse("M4E4 product=M4E4"), batches, loss)
    places = [Place("conv", "conv2d", 0), Place("", "matmul", 0), Place("", "matmul", 1), Place("out", "linear", 0)]
    assert sorted(map(str, found)) == sorted(map(str, places))
    for place, expected in zip(places, wanted, strict=True):
        torch.testing.assert_close(found[place].flatten(), expected, rtol=1e-4, atol=0)
    assert found[places[1]].shape == (2, 1)
    assert all(p.grad is None for p in network.parameters())


def test_the_channel_that_matters_is_served():
    """Products that the two channels share a bias for: one channel's are far below its sums, the other's are not."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(256, 2, bias=False)
    x = torch.randn(128, 256, generator=generator).abs()
    x[:, 0] = 0.0
    with torch.no_grad():
        layer.weight[0] = 0.01 * torch.rand(256, generator=generator)  # a sum of many alike
        layer.weight[1] = torch.randn(256, generator=generator) * (torch.arange(256) % 64 == 1)  # of a few
    wanted = layer(x).detach()

    def errors(importance):
        fmaq.attach(layer, fmaq.calibrate(layer, "M5E2 product=M5E2 chunk=16", [x], importance=importance))
        found = layer(x).detach()
        fmaq.detach(layer)
        return (found - wanted).square().mean(0) / wanted.square().mean(0)

    first, second = (errors(lambda y, i=i: y[:, i].sum()) for i in (0, 1))
    assert first[0] <= second[0] and second[1] <= first[1]
    assert (first != second).any()


@pytest.mark.parametrize("scalar", [likelihood, projection])
def test_no_labels_are_needed_and_random_numbers_stay(scalar):
    network, x = Network().eval(), torch.randn(4, 3, 6, 6)
    torch.manual_seed(5)
    policy = fmaq.calibrate(network, "M5E4 product=M5E4", [x], importance=scalar)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert str(policy) == str(fmaq.calibrate(network, "M5E4 product=M5E4", [x], importance=scalar))


@pytest.mark.parametrize("scalar", [lambda y: y, lambda y: 1.0, lambda y: torch.zeros(())])
def test_anything_but_a_scalar_of_the_output_is_refused(scalar):
    with pytest.raises(ValueError, match="importance must give one number that depends on the model's output"):
        fmaq.calibrate(nn.Linear(8, 4), "M5E4 product=M5E4", [torch.randn(30, 8)], importance=scalar)


@pytest.mark.parametrize("per", ["layer", "model"])
def test_one_bias_for_all_channels_weighs_none(per):
    with pytest.raises(ValueError, match="importance weighs channels with offsets of their own"):
        fmaq.calibrate(nn.Linear(8, 4), "M5E4 product=M5E4", [torch.randn(30, 8)], per, importance=projection)
