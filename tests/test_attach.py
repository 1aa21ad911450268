"""Attaching: every product of a model is emulated as `fmaq.ops` computes it, by the rule of its layer."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attach_cases import ACC, POLICY, QUANTIZED, Attention, Called, SmallCNN, emulated_attention, fm, no_mode_is_left
from fmaq import ops
from fmaq.emulation import FmaqCoverageWarning, Policy, attach, detach, listening, policy_of
from fmaq.numerics import Accumulator


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# --- what is computed ---


def test_small_cnn_is_the_composition_of_our_products() -> None:
    model, x = SmallCNN().eval(), torch.randn(2, 2, 6, 6)
    q = ops.quantize
    h = ops.conv2d(q(x, "M2E3"), q(model.conv1.weight, "M4E3"), None, ACC, padding=1)
    h = F.relu(model.norm(h))
    h = ops.conv2d(q(h, "M2E3"), q(model.conv2.weight, "M4E3"), model.conv2.bias, ACC, stride=2, groups=2)
    expected = ops.linear(q(h.mean((2, 3)), "M2E3"), q(model.fc.weight, "M4E3"), model.fc.bias, ACC)
    plain = model(x)
    assert attach(model, QUANTIZED) is model
    assert torch.equal(model(x), expected)
    assert not torch.equal(expected, plain)
    assert no_mode_is_left()


def test_functional_products_inside_a_module_are_emulated() -> None:
    model, x = Attention(), torch.randn(2, 3, 6)
    expected = emulated_attention(model, x)
    assert torch.equal(attach(model, POLICY)(x), expected)


def test_gradients_are_those_of_our_products() -> None:
    model, x = Attention(), torch.randn(2, 3, 6, requires_grad=True)
    expected = torch.autograd.grad(emulated_attention(model, x).square().sum(), [x, *model.parameters()])
    found = torch.autograd.grad(attach(model, POLICY)(x).square().sum(), [x, *model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


A, B = torch.randn(3, 5), torch.randn(5, 2)
A3, B3, V, START = torch.randn(2, 3, 5), torch.randn(2, 5, 2), torch.randn(5), torch.randn(3, 2)


PRODUCTS = {
    "@": (lambda: A @ B, lambda: fm(A, B)),
    "__rmatmul__": (lambda: B.__rmatmul__(A), lambda: fm(A, B)),
    "torch.matmul": (lambda: torch.matmul(A3, B), lambda: fm(A3, B)),
    "matmul by name": (lambda: torch.matmul(other=B, input=A), lambda: fm(A, B)),
    "linalg.matmul": (lambda: torch.linalg.matmul(A3, B3), lambda: fm(A3, B3)),
    "mm": (lambda: torch.mm(A, B), lambda: fm(A, B)),
    "mm by name": (lambda: torch.mm(A, mat2=B), lambda: fm(A, B)),
    "mm out": (lambda: torch.mm(A, B, out=torch.empty(3, 2)), lambda: fm(A, B)),
    "Tensor.mm": (lambda: A.mm(B), lambda: fm(A, B)),
    "bmm": (lambda: A3.bmm(B3), lambda: fm(A3, B3)),
    "mv": (lambda: A.mv(V), lambda: fm(A, V)),
    "dot": (lambda: V.dot(V), lambda: fm(V, V)),
    "aten.mm": (lambda: torch.ops.aten.mm(A, B), lambda: fm(A, B)),
    "aten.mm.default": (lambda: torch.ops.aten.mm.default(A, B), lambda: fm(A, B)),
    "aten.linear": (lambda: torch.ops.aten.linear(A, B.mT), lambda: fm(A, B)),
    "addmm": (lambda: torch.addmm(START, A, B, beta=0.5, alpha=2), lambda: 0.5 * START + 2 * fm(A, B)),
    "addmm_": (lambda: START.clone().addmm_(A, B), lambda: START + fm(A, B)),
    "addmm beta=0": (lambda: torch.addmm(START * math.nan, A, B, beta=0), lambda: fm(A, B)),
    "addmv": (lambda: torch.addmv(START[:, 0], A, V), lambda: START[:, 0] + fm(A, V)),
    "baddbmm": (lambda: torch.baddbmm(START, A3, B3), lambda: START + fm(A3, B3)),
    "addbmm": (
        lambda: torch.addbmm(START, A3, B3),
        lambda: START + fm(A3.transpose(0, 1).flatten(1), B3.flatten(0, 1)),
    ),
    "inner": (lambda: torch.inner(A3, A), lambda: fm(A3, A.mT)),
    "tensordot": (
        lambda: torch.tensordot(A3, B3, ([0, 2], [0, 1])),
        lambda: fm(A3.transpose(0, 1).flatten(1), B3.flatten(0, 1)),
    ),
    "tensordot 1": (lambda: torch.tensordot(A3, B, 1), lambda: fm(A3, B)),
    "vecdot": (lambda: torch.linalg.vecdot(A, V), lambda: fm(A, V)),
    "einsum": (lambda: torch.einsum("ik,kj->ij", A, B), lambda: fm(A, B)),
    "conv1d": (
        lambda: F.conv1d(A3, torch.ones(4, 3, 2), stride=2),
        lambda: ops.conv1d(A3, torch.ones(4, 3, 2), None, ACC, stride=2),
    ),
    "conv2d same": (
        lambda: F.conv2d(A3[None], torch.ones(1, 2, 3, 3), padding="same"),
        lambda: ops.conv2d(A3[None], torch.ones(1, 2, 3, 3), None, ACC, padding="same"),
    ),
    "conv3d": (
        lambda: F.conv3d(A3[None, None], torch.ones(1, 1, 2, 2, 2)),
        lambda: ops.conv3d(A3[None, None], torch.ones(1, 1, 2, 2, 2), None, ACC),
    ),
    "torch.convolution": (
        lambda: torch.convolution(A3, torch.ones(4, 3, 2), None, [2], [1], [1], False, [0], 1),
        lambda: ops.conv1d(A3, torch.ones(4, 3, 2), None, ACC, stride=2, padding=1),
    ),
    "conv_transpose1d": (
        lambda: F.conv_transpose1d(A3, torch.ones(3, 4, 2), stride=2, output_padding=1),
        lambda: ops.conv_transpose1d(A3, torch.ones(3, 4, 2), None, ACC, stride=2, output_padding=1),
    ),
    "conv_transpose2d": (
        lambda: F.conv_transpose2d(A3[None], torch.ones(2, 1, 2, 2), torch.ones(1), padding=1),
        lambda: ops.conv_transpose2d(A3[None], torch.ones(2, 1, 2, 2), torch.ones(1), ACC, padding=1),
    ),
    "attention": (
        lambda: F.scaled_dot_product_attention(A3, A3, A3),
        lambda: ops.scaled_dot_product_attention(A3, A3, A3, ACC),
    ),
    "grouped_mm": (
        lambda: F.grouped_mm(A, B3, offs=torch.tensor([1, 3], dtype=torch.int32)),
        lambda: torch.cat([fm(A[:1], B3[0]), fm(A[1:], B3[1])]),
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_every_way_to_ask_for_a_product_is_met(name) -> None:
    ask, expected = PRODUCTS[name]
    model = attach(Called(lambda _: ask()), POLICY)
    assert torch.equal(model(), expected())


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_layer_left_alone_computes_torchs_own_product(name) -> None:
    if name == "grouped_mm":
        pytest.skip("torch's own takes other layouts")
    ask, _ = PRODUCTS[name]
    for policy in (Policy(accumulator=ACC, layers={"": None}), Policy()):
        assert torch.equal(attach(Called(lambda _: ask()), policy)(), ask())


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("ik,kj->ij", [(3, 4), (4, 2)]),
        ("ik,kj", [(3, 4), (4, 2)]),
        ("bik,bkj->bij", [(2, 3, 4), (2, 4, 2)]),
        ("bhid,bhjd->bhij", [(2, 2, 3, 4), (2, 2, 3, 4)]),
        ("bind,bjnd->bnij", [(2, 3, 2, 4), (2, 5, 2, 4)]),
        ("ki,jk->ji", [(4, 3), (2, 4)]),
        ("ijk,jk->i", [(3, 4, 2), (4, 2)]),
        ("i,i->", [(5,), (5,)]),
        ("...ik,...kj->...ij", [(2, 1, 3, 4), (5, 4, 2)]),
        ("... k, k j -> ... j", [(2, 3, 4), (4, 2)]),
        ("b...k,kj->j...b", [(2, 3, 4), (4, 2)]),
        ("ik,kj->ij", [(3, 1), (4, 2)]),
        ("ik,kj,jl->il", [(3, 4), (4, 2), (2, 5)]),
        ("bi,oij,bj->bo", [(2, 3), (4, 3, 5), (2, 5)]),
        ("i,j->ij", [(3,), (4,)]),
        ("bi,bi->bi", [(2, 3), (2, 3)]),
    ],
)
def test_einsum_is_torchs_where_the_accumulator_is_exact(equation, shapes) -> None:
    """Small whole numbers: every sum is exact in a wide accumulator, so only the meaning is compared."""
    operands = [torch.randint(-3, 4, shape).float() for shape in shapes]
    model = attach(Called(lambda _: torch.einsum(equation, *operands)), Policy(accumulator="M20E6b31"))
    expected = torch.einsum(equation, *operands)
    assert torch.equal(model(), expected)
    assert model().shape == expected.shape


def test_einsum_sums_in_the_order_of_the_first_operand() -> None:
    a, b = torch.randn(3, 4, 2), torch.randn(4, 2, 5)
    model = attach(Called(lambda _: torch.einsum("ixy,xyj->ij", a, b)), POLICY)
    assert torch.equal(model(), fm(a.flatten(1), b.flatten(0, 1)))


@pytest.mark.parametrize("equation", ["ii,ij->j", "ik,kj->j"])
def test_einsum_that_is_no_product_of_matrices_is_named(equation) -> None:
    a, b = torch.randn(3, 3), torch.randn(3, 3)
    model = attach(Called(lambda _: torch.einsum(equation, a, b)), POLICY)
    with pytest.warns(FmaqCoverageWarning, match="einsum in the model itself is not emulated: an index is"):
        assert torch.equal(model(), torch.einsum(equation, a, b))


def test_bilinear_is_two_products() -> None:
    layer, x, y = nn.Bilinear(3, 4, 2), torch.randn(5, 3), torch.randn(5, 4)
    first = fm(x, layer.weight.permute(1, 0, 2).flatten(1)).view(5, 2, 4)
    expected = fm(first, y[:, :, None])[..., 0] + layer.bias
    assert torch.equal(attach(layer, POLICY)(x, y), expected)


# --- weights and activations ---


def formats_seen(model: nn.Module, *inputs: torch.Tensor) -> list[bool]:
    """For each operand of the first product: it is on the grid of "int4" as a weight is, and not as an activation."""
    seen = []
    with listening(seen.append):
        model(*inputs)
    return [len(operand.unique()) <= 16 for operand in seen[0].operands]


@pytest.mark.parametrize(
    ("function", "weights"),
    [
        (lambda m, x: F.linear(x, m.w), [False, True]),
        (lambda m, x: x @ m.w, [False, True]),
        (lambda m, x: x @ m.w.t(), [False, True]),
        (lambda m, x: m.w @ x, [True, False]),
        (lambda m, x: torch.addmm(x, x, m.w), [False, True]),
        (lambda m, x: x @ (2 * m.w.float().transpose(0, 1)), [False, True]),
        (lambda m, x: torch.einsum("ik,jk->ij", x, m.w), [False, True]),
        (lambda m, x: x @ x, [False, False]),
        (lambda m, x: x @ (m.w * x), [False, False]),
    ],
)
def test_parameters_and_what_comes_of_them_alone_are_weights(function, weights) -> None:
    policy = Policy(accumulator=ACC, weight="int4", activation="M10E5")
    model = attach(Called(function, w=torch.randn(8, 8)), policy)
    assert formats_seen(model, torch.randn(8, 8)) == weights


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal])
def test_a_parametrized_weight_is_a_weight(wrap) -> None:
    """The products that compute it, as of an orthogonal one, can be left alone by name."""
    layer = wrap(nn.Linear(5, 4))
    x = torch.randn(3, 5)
    expected = ops.linear(ops.quantize(x, "M2E3"), ops.quantize(layer.weight, "M4E3"), layer.bias, ACC)
    attach(layer, Policy(accumulator=ACC, weight="M4E3", activation="M2E3", layers={"parametrizations": None}))
    assert torch.equal(layer(x), expected)


def test_tied_weights_are_emulated_in_both_places() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids):
            return self.head(self.embedding(ids))

    model, ids = Tied(), torch.tensor([1, 2, 3])
    expected = ops.linear(
        ops.quantize(model.embedding(ids), "M2E3"), ops.quantize(model.head.weight, "M4E3"), None, ACC
    )
    assert torch.equal(attach(model, QUANTIZED)(ids), expected)
    assert model.head.weight is model.embedding.weight


def test_quantization_without_an_accumulator_uses_torchs_product() -> None:
    layer, x = nn.Linear(5, 4), torch.randn(3, 5)
    expected = F.linear(ops.quantize(x, "M2E3"), ops.quantize(layer.weight, "M4E3"), layer.bias)
    assert torch.equal(attach(layer, QUANTIZED.replace(accumulator="fp32"))(x), expected)


@pytest.mark.parametrize(
    ("layer", "shape", "emulated"),
    [
        (nn.Linear(1, 3), (4, 1), lambda m, x, w: ops.linear(x, w, m.bias, ACC)),
        (nn.Conv2d(3, 3, 1, groups=3), (2, 3, 4, 4), lambda m, x, w: ops.conv2d(x, w, m.bias, ACC, groups=3)),
    ],
)
def test_a_layer_of_one_step_is_rounded_and_quantized(layer, shape, emulated) -> None:
    x = 30 * torch.randn(shape)
    expected = emulated(layer, ops.quantize(x, "M2E3"), ops.quantize(layer.weight, "M4E3"))
    assert not torch.equal(layer(x), expected)
    assert torch.equal(attach(layer, QUANTIZED)(x), expected)


def test_an_outer_product_sums_nothing_and_stays_torchs_own() -> None:
    angles = Called(lambda _, x: x[:, None] @ torch.tensor([[1.0, 0.1, 0.01]]))
    positions = torch.arange(200.0)
    expected = angles(positions)
    assert torch.equal(attach(angles, QUANTIZED)(positions), expected)


def formats_of(function, x: torch.Tensor, **parameters: torch.Tensor) -> list[tuple]:
    """What the operands of the products in a function are quantized to."""
    found = []
    model = attach(Called(function, **parameters), QUANTIZED)
    model.register_buffer("mask", torch.ones(4, 4))
    with listening(lambda product: found.append(product.formats)):
        model(x)
    return found


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda m, x: x @ m.w, ("M2E3", "M4E3")),
        (lambda m, x: x @ (m.w * m.mask), ("M2E3", "M4E3")),
        (lambda m, x: x @ m.w[torch.arange(4)], ("M2E3", "M4E3")),
        (lambda m, x: x @ torch.cat(tensors=[m.w[:2], m.w[2:]]), ("M2E3", "M4E3")),
        (lambda m, x: x @ (m.w + m.w @ m.w), ("M2E3", "M4E3")),
        (lambda m, x: m.w.clone().add_(x) @ m.w, ("M2E3", "M4E3")),
        (lambda m, x: torch.add(m.w, other=x) @ m.w, ("M2E3", "M4E3")),
    ],
)
def test_weights_are_told_from_activations(function, expected) -> None:
    assert formats_of(function, torch.randn(4, 4), w=torch.randn(4, 4))[-1] == expected


# --- rules by layer ---


def test_rules_follow_the_calling_module() -> None:
    model, x = Attention(), torch.randn(2, 3, 6)
    other = Accumulator("M3E4b8")
    q, k, v = ops.linear(x, model.qkv.weight, model.qkv.bias, other).chunk(3, -1)
    expected = model.out(fm((fm(q, k.mT) / math.sqrt(6)).softmax(-1), v))
    attach(model, Policy(accumulator=ACC, layers={"qkv": {"accumulator": other}, "out": None}))
    assert torch.equal(model(x), expected)


def test_an_entry_speaks_for_all_inside_its_module() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4))
    x = torch.randn(2, 4)
    inner, last = model[0], model[1]
    expected = ops.linear(inner[1](ops.linear(x, inner[0].weight, inner[0].bias, ACC)), last.weight, last.bias, ACC)
    attach(model, Policy(accumulator=ACC, layers={"0": None, "0.0": {"weight": None}}))
    assert torch.equal(model(x), expected)


def test_an_unknown_layer_is_refused_and_nothing_is_attached() -> None:
    model = SmallCNN()
    with pytest.raises(ValueError, match=r"'conv3' matches no module of the model; did you mean 'conv[12]'\?"):
        attach(model, Policy(layers={"conv3": None}))
    assert policy_of(model) is None


def test_a_format_without_a_bias_is_refused() -> None:
    with pytest.raises(ValueError, match=r"accumulator M7E4 chunk=16 of fc is a template: it has no bias"):
        attach(SmallCNN(), Policy(accumulator=ACC, layers={"fc": {"accumulator": "M7E4"}}))


@pytest.mark.parametrize("function", [lambda m: attach(m, POLICY), detach])
def test_only_modules_are_attached(function) -> None:
    with pytest.raises(TypeError, match=r"takes a torch.nn.Module, got function"):
        function(lambda x: x)


def test_an_accumulator_alone_attaches() -> None:
    model = attach(nn.Linear(4, 2), "paper12")
    x = torch.randn(3, 4)
    assert torch.equal(model(x), ops.linear(x, model.weight, model.bias, Accumulator.paper12))


def test_gradients_in_an_accumulator_are_those_of_identity_alone() -> None:
    with pytest.raises(ValueError, match=r'backward is the accumulator .* estimator "recursive/of" sums'):
        attach(nn.Linear(4, 2), Policy(accumulator=ACC, estimator="recursive/of", backward=ACC))


# --- what cannot be covered ---


def test_what_cannot_be_covered_is_named_once() -> None:
    def scripted() -> nn.Module:
        return torch.jit.script(nn.Linear(3, 3))

    model = nn.ModuleDict({"one": scripted(), "rnn": nn.LSTM(3, 3), "two": scripted(), "fc": nn.Linear(3, 3)})
    with pytest.warns(FmaqCoverageWarning) as caught:
        attach(model, POLICY)
    assert len(caught) == 1
    assert str(caught[0].message).endswith("stay torch's own: one (TorchScript), two (TorchScript)")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(model, Policy(accumulator=ACC, layers={"one": None, "two": None}))
        attach(model, Policy())


def test_torchscript_is_named_and_left_as_it_is() -> None:
    model, x = nn.Sequential(torch.jit.script(nn.Linear(4, 4))), torch.randn(2, 4)
    before = model(x)
    with pytest.warns(FmaqCoverageWarning, match=r"0 \(TorchScript\)"):
        attach(model, POLICY)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m, x: x.double() @ x.double(), "matmul in the model itself is not emulated: float64 operands"),
        (lambda m, x: x.to_sparse() @ x, "nested, sparse or quantized operands"),
        (lambda m, x: torch.cdist(x, x), "cdist in the model itself is not emulated: a fused kernel"),
        (lambda m, x: torch.cov(x), "cov in the model itself is not emulated: a fused kernel"),
        (lambda m, x: torch.linalg.pinv(x), "pinv in the model itself is not emulated: a fused kernel"),
        (lambda m, x: F.affine_grid(x[None, :2, :3], (1, 1, 4, 4), False), "affine_grid in the model itself"),
    ],
)
def test_a_product_that_is_not_emulated_is_named_when_it_is_met(function, message) -> None:
    x = torch.randn(4, 4)
    model = Called(function)
    before = model(x)
    attach(model, POLICY)
    with pytest.warns(FmaqCoverageWarning, match=message):
        found = model(x)
    assert torch.equal(found, before)


def test_errors_of_wrong_shapes_are_clear() -> None:
    layer = attach(nn.Linear(5, 4), POLICY)
    with pytest.raises((RuntimeError, ValueError), match="5"):
        layer(torch.randn(3, 6))


# --- listening ---


def test_listeners_hear_every_product_in_order() -> None:
    model, seen = attach(Attention(), QUANTIZED), []
    x = torch.randn(2, 3, 6)
    with listening(seen.append):
        model(x)
    model(x)
    assert [(p.kind, p.layer, p.index, p.steps, p.macs, p.reason) for p in seen] == [
        ("linear", "qkv", 0, 6, 2 * 3 * 18 * 6, None),
        ("matmul", "", 0, 6, 2 * 3 * 3 * 6, None),
        ("matmul", "", 1, 3, 2 * 3 * 3 * 6, None),
        ("linear", "out", 0, 6, 2 * 3 * 6 * 6, None),
    ]
    assert torch.equal(seen[0].operands[0], ops.quantize(x, "M2E3"))
    assert torch.equal(seen[0].operands[1], ops.quantize(model.qkv.weight, "M4E3"))
