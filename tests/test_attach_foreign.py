"""Operands of other packages' classes: multiplied by the values that they tell, else left to themselves and named."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attach_cases import ACC, POLICY, QUANTIZED, Called, fm
from fmaq import ops
from fmaq.emulation import FmaqCoverageWarning, Policy, attach, coverage, detach


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Int8(Tensor):
    """A weight that keeps codes and a scale, as torchao's do: a wrapper that implements little more than linear."""

    @staticmethod
    def __new__(cls, codes, scale):
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, scale) -> None:
        self.codes, self.scale = codes, scale

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, weight, *bias = args
            return F.linear(x, Int8.values(weight), *bias)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(f"{cls.__name__} has no {func}")

    def values(self) -> Tensor:
        return self.codes.float() * self.scale


class Told(Int8):
    """One that tells its values."""

    def dequantize(self, *_: object) -> Tensor:
        return self.values()


class QuantTuple(NamedTuple):
    """What a layer of brevitas hands on: no tensor, but taken by torch's functions."""

    value: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.value.shape

    def __torch_function__(self, func, types, args=(), kwargs=None):
        plain = [x.value if isinstance(x, QuantTuple) else x for x in args]
        return func(*plain, **(kwargs or {}))


class Secret:
    """No tensor, does not tell its values, and is multiplied by torch all the same."""

    shape = torch.Size((3, 4))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        plain = [torch.ones(3, 4) if isinstance(x, Secret) else x for x in args]
        return func(*plain, **(kwargs or {}))


def codes(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randint(-127, 128, shape, dtype=torch.int8), torch.tensor(0.013)


def layer_of(kind: type[Int8]) -> nn.Linear:
    layer = nn.Linear(6, 3)
    layer.weight = nn.Parameter(kind(*codes(3, 6)), requires_grad=False)
    return layer


def test_a_weight_that_tells_its_values_is_multiplied_by_them() -> None:
    layer, x = layer_of(Told), torch.randn(2, 6)
    values = layer.weight.values()
    assert torch.equal(attach(layer, POLICY)(x), ops.linear(x, values, layer.bias, ACC))
    assert coverage(layer, x).share == 1.0
    q = ops.quantize
    expected = ops.linear(q(x, "M2E3"), q(values, "M4E3"), layer.bias, ACC)
    assert torch.equal(attach(layer, QUANTIZED)(x), expected)
    for policy in (Policy(), Policy(accumulator=ACC, layers={"": None})):
        assert torch.equal(attach(layer, policy)(x), F.linear(x, values, layer.bias))
        assert [row.covered for row in coverage(layer, x)] == [False]
    assert torch.equal(detach(layer)(x), F.linear(x, values, layer.bias))


def test_a_weight_that_does_not_is_left_to_itself_and_named() -> None:
    layer, x = attach(layer_of(Int8), POLICY), torch.randn(2, 6)
    with pytest.warns(
        FmaqCoverageWarning, match=r"linear in the model itself is not emulated: operands of Int8, which"
    ):
        assert torch.equal(layer(x), F.linear(x, layer.weight.values(), layer.bias))
    table = coverage(layer, x)
    assert [(row.product, row.covered, row.macs) for row in table] == [("linear", False, 2 * 6 * 3)]
    assert table.share == 0


def test_things_that_are_no_tensors_are_multiplied_by_their_values() -> None:
    x, w = QuantTuple(torch.randn(2, 6), torch.tensor(1.0)), torch.randn(3, 6)
    model = attach(Called(lambda m, x: F.linear(x, m.w), w=w), POLICY)
    assert torch.equal(model(x), fm(x.value, w.mT))
    both = attach(Called(lambda m, x: torch.matmul(x, QuantTuple(2 * m.w.mT, x.scale)), w=w), QUANTIZED)
    q = ops.quantize
    assert torch.equal(both(x), fm(q(x.value, "M2E3"), q(2 * w.mT, "M4E3")))
    joined = attach(Called(lambda m, x: torch.einsum("ik,jk->ij", x, m.w), w=w), POLICY)
    assert torch.equal(joined(x), fm(x.value, w.mT))
    assert torch.equal(attach(model, {})(x), F.linear(x.value, w))
    secret = attach(Called(lambda m, x: torch.matmul(x, m.w), w=torch.randn(4, 2)), POLICY)
    with pytest.warns(FmaqCoverageWarning, match="matmul in the model itself is not emulated: operands of Secret"):
        assert torch.equal(secret(Secret()), torch.ones(3, 4) @ secret.w)


def test_subclasses_without_a_dispatch_of_their_own_are_ordinary() -> None:
    class Image(Tensor):
        pass

    x, w = torch.randn(2, 6).as_subclass(Image), torch.randn(3, 6)
    model = attach(Called(lambda m, x: F.linear(x, m.w), w=w), POLICY)
    assert torch.equal(model(x).as_subclass(Tensor), fm(x.as_subclass(Tensor), w.mT))


def test_brevitas_is_emulated() -> None:
    brevitas = pytest.importorskip("brevitas.nn", reason="brevitas is not installed")
    layer = brevitas.QuantLinear(6, 3, bias=False, weight_bit_width=4).eval()
    x = torch.randn(2, 6)
    expected = ops.linear(x, layer.quant_weight().value.detach(), None, ACC)
    assert torch.equal(attach(layer, POLICY)(x), expected)
    chain = nn.Sequential(
        brevitas.QuantIdentity(bit_width=4, return_quant_tensor=True), brevitas.QuantLinear(6, 3, bias=False)
    ).eval()
    given = chain[0](x).value
    expected = ops.linear(given, chain[1].quant_weight().value.detach(), None, ACC)
    plain = chain(x)
    assert torch.equal(attach(chain, POLICY)(x), expected)
    assert coverage(chain, x).share == 1.0
    assert torch.equal(attach(chain, {})(x), plain)


def test_torchao_is_emulated() -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model, x = nn.Sequential(nn.Linear(64, 64)).eval(), torch.randn(2, 64)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    expected = ops.linear(x, model[0].weight.dequantize(), model[0].bias, ACC)
    plain = model(x)
    with torch.no_grad():
        assert torch.equal(attach(model, POLICY)(x), expected)
    assert torch.equal(attach(model, {})(x), plain)
