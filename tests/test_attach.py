"""Attaching: every product of a model is emulated as `fmaq.ops` computes it, and the model stays what it was."""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fmaq import ops
from fmaq.emulation import FmaqCoverageWarning, Policy, attach, detach, listening, policy_of
from fmaq.numerics import Accumulator

ACC = Accumulator("M5E4b8", product="M5E4b9", chunk=4)
POLICY = Policy(accumulator=ACC)
QUANTIZED = Policy(accumulator=ACC, weight="M4E3", activation="M2E3")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def no_mode_is_left() -> bool:
    return torch.overrides._get_current_function_mode_stack() == []


class Called(nn.Module):
    """A module whose forward is a function of it and its inputs, with parameters by name."""

    def __init__(self, function, **parameters: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, *inputs):
        return self.function(self, *inputs)


class SmallCNN(nn.Module):
    """Convolutions (grouped, with a bias, without), a batch norm and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, stride=2, groups=2)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.conv2(F.relu(self.norm(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


class Attention(nn.Module):
    """Attention by functional matmul between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)
        self.out = nn.Linear(6, 6)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out((q @ k.mT / math.sqrt(6)).softmax(-1) @ v)


def emulated_attention(model: Attention, x: torch.Tensor, acc: Accumulator = ACC) -> torch.Tensor:
    q, k, v = ops.linear(x, model.qkv.weight, model.qkv.bias, acc).chunk(3, -1)
    probabilities = (ops.matmul(q, k.mT, acc) / math.sqrt(6)).softmax(-1)
    return ops.linear(ops.matmul(probabilities, v, acc), model.out.weight, model.out.bias, acc)


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


def fm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return ops.matmul(a, b, ACC)


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


# --- attention, fused and not ---


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": torch.tensor([[True, False, True], [False, False, False], [True, True, True]])},
        {"attn_mask": torch.randn(3, 3)},
    ],
    ids=["plain", "causal", "scale", "bool mask", "float mask"],
)
def test_fused_attention_is_our_attention(options) -> None:
    q, k, v = torch.randn(3, 2, 2, 3, 4)
    model = attach(Called(lambda _: F.scaled_dot_product_attention(q, k, v, **options)), POLICY)
    assert torch.equal(model(), ops.scaled_dot_product_attention(q, k, v, ACC, **options))


def test_fused_attention_with_grouped_queries() -> None:
    q, k, v = torch.randn(2, 4, 3, 4), torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3, 4)
    model = attach(Called(lambda _: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)), POLICY)
    assert torch.equal(model(), ops.scaled_dot_product_attention(q, k, v, ACC, enable_gqa=True))


def test_fused_attention_quantizes_the_probabilities_too() -> None:
    q, k, v = torch.randn(3, 2, 3, 4)
    model = attach(Called(lambda _: F.scaled_dot_product_attention(q, k, v)), QUANTIZED)
    quantize = ops.quantize
    scores = fm(quantize(q, "M2E3"), quantize(k, "M2E3").mT) * 0.5
    assert torch.equal(model(), fm(quantize(scores.softmax(-1), "M2E3"), quantize(v, "M2E3")))


def emulated_multi_head(layer: nn.MultiheadAttention, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Self-attention (N, L, E) without masks, and its weights by head."""
    n, length, width = x.shape
    q, k, v = (
        t.view(n, length, layer.num_heads, -1).transpose(1, 2)
        for t in ops.linear(x, layer.in_proj_weight, layer.in_proj_bias, ACC).chunk(3, -1)
    )
    weights = (fm(q, k.mT) / math.sqrt(q.shape[-1])).softmax(-1)
    mixed = fm(weights, v).transpose(1, 2).reshape(n, length, width)
    return ops.linear(mixed, layer.out_proj.weight, layer.out_proj.bias, ACC), weights


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_multi_head_attention_is_opened(training, grad) -> None:
    layer, x = nn.MultiheadAttention(8, 2, batch_first=True).train(training), torch.randn(2, 3, 8)
    expected, _ = emulated_multi_head(layer, x)
    attach(layer, POLICY)
    with torch.set_grad_enabled(grad):
        found, weights = layer(x, x, x, need_weights=False)
    assert torch.equal(found, expected)
    assert weights is None


def test_multi_head_attention_with_weights_masks_and_other_widths() -> None:
    layer = nn.MultiheadAttention(8, 2, kdim=5, vdim=6, add_bias_kv=True, add_zero_attn=True).eval()
    q, k, v = torch.randn(3, 2, 8), torch.randn(4, 2, 5), torch.randn(4, 2, 6)
    mask, padding = torch.zeros(3, 4, dtype=torch.bool), torch.tensor([[False] * 4, [True] + [False] * 3])
    mask[0, 2] = True
    plain, plain_weights = layer(q, k, v, attn_mask=mask, key_padding_mask=padding)
    attach(layer, Policy(accumulator="M20E6b31"))
    seen = []
    with listening(seen.append):
        found, weights = layer(q, k, v, attn_mask=mask, key_padding_mask=padding)
    assert torch.allclose(found, plain, atol=1e-4) and torch.allclose(weights, plain_weights, atol=1e-4)
    assert [p.kind for p in seen] == ["linear", "linear", "linear", "matmul", "matmul", "linear"]
    assert all(p.reason is None for p in seen)


@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_layer_fast_path_is_emulated_as_the_slow_one(norm_first) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
    x, padding = torch.randn(2, 3, 8), torch.tensor([[False, False, True], [False] * 3])
    attach(encoder, POLICY)
    slow = encoder.train()(x)
    slow_padded = encoder(x, src_key_padding_mask=padding)
    encoder.eval()
    with torch.no_grad():
        assert torch.equal(encoder(x), slow)
        fast_padded = encoder(x, src_key_padding_mask=padding)
    assert torch.equal(fast_padded[~padding], slow_padded[~padding])
    assert torch.backends.mha.get_fastpath_enabled()


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


def test_one_step_sums_nothing_and_stays_torchs_own() -> None:
    angles = Called(lambda _, x: x[:, None] @ torch.tensor([[1.0, 0.1, 0.01]]))
    positions = torch.arange(200.0)
    expected = angles(positions)
    assert torch.equal(attach(angles, QUANTIZED)(positions), expected)


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


# --- the model stays what it is ---


def test_nothing_but_hooks_is_added_and_detach_takes_them_away() -> None:
    model, x = SmallCNN().eval(), torch.randn(2, 2, 6, 6)
    before, keys, modules = model(x), list(model.state_dict()), list(model.named_modules())
    parameters = [id(p) for p in model.parameters()]
    printed, attributes = repr(model), {name: set(module.__dict__) for name, module in modules}
    attach(model, POLICY)
    assert type(model) is SmallCNN and repr(model) == printed
    assert list(model.state_dict()) == keys and list(model.named_modules()) == modules
    assert [id(p) for p in model.parameters()] == parameters
    assert policy_of(model) == POLICY
    assert not torch.equal(model(x), before)
    assert detach(model) is model
    assert torch.equal(model(x), before)
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._forward_hooks_always_called for m in model.modules())
    assert policy_of(model) is None
    assert torch.equal(detach(model)(x), before)


def test_attaching_again_replaces_the_policy() -> None:
    layer, x = nn.Linear(5, 4), torch.randn(3, 5)
    attach(attach(layer, QUANTIZED), POLICY)
    assert torch.equal(layer(x), ops.linear(x, layer.weight, layer.bias, ACC))
    assert len(layer._forward_hooks) == len(layer._forward_pre_hooks) == 1
    assert torch.equal(detach(layer)(x), F.linear(x, layer.weight, layer.bias))


def test_attaching_a_part_again_counts_for_the_part() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
    attach(model, POLICY)
    attach(model[1], Policy())
    assert torch.equal(model(x), model[1](ops.linear(x, model[0].weight, model[0].bias, ACC)))
    assert policy_of(model) == POLICY and policy_of(model[1]) == Policy()


def test_a_submodule_on_its_own_is_emulated() -> None:
    model = attach(SmallCNN(), POLICY)
    x = torch.randn(3, 4)
    assert torch.equal(model.fc(x), ops.linear(x, model.fc.weight, model.fc.bias, ACC))
    assert no_mode_is_left()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_is_emulated(use_reentrant) -> None:
    class Checkpointed(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.inside = Attention()

        def forward(self, x):
            return super().forward(checkpoint(self.inside, x, use_reentrant=use_reentrant))

    model, x = attach(Checkpointed(), POLICY), torch.randn(2, 3, 6, requires_grad=True)
    found = torch.autograd.grad(model(x).square().sum(), x) if not use_reentrant else None
    if use_reentrant:
        model(x).square().sum().backward()
        found = (x.grad,)
    y = emulated_attention(model, emulated_attention(model.inside, x))
    assert torch.equal(found[0], torch.autograd.grad(y.square().sum(), x)[0])
    assert no_mode_is_left()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_that_cannot_be_emulated_is_refused(use_reentrant) -> None:
    def function(_, x):
        return checkpoint(lambda t: t @ t, x, use_reentrant=use_reentrant)

    x = torch.randn(3, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="Give checkpoint a module, or leave the layer alone"):
        attach(Called(function), POLICY)(x)
    assert no_mode_is_left()
    left_alone = attach(Called(function), Policy(accumulator=ACC, layers={"": None}))
    assert torch.equal(left_alone(x), x @ x)


def test_gradients_inside_a_forward_are_not_emulated() -> None:
    """A force, say: the gradient of an emulated energy is an ordinary one."""

    def force(module, x):
        with torch.enable_grad():
            return torch.autograd.grad((x @ module.w).square().sum(), x)[0]

    x = torch.randn(3, 4, requires_grad=True)
    model = Called(force, w=torch.randn(4, 2))
    expected = torch.autograd.grad(fm(x, model.w).square().sum(), x)[0]
    assert torch.equal(attach(model, POLICY)(x), expected)


def test_products_in_an_autograd_function_are_emulated_forward_alone() -> None:
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            return a @ b

        @staticmethod
        def backward(ctx, grad):
            a, b = ctx.saved_tensors
            return grad @ b.mT, a.mT @ grad

    def both(module, x):
        y = Product.apply(x, module.w)
        return y, torch.autograd.grad(y.sum(), x)[0]

    model, x = attach(Called(both, w=torch.randn(4, 3)), POLICY), torch.randn(2, 4, requires_grad=True)
    y, grad = model(x)
    assert torch.equal(y, fm(x, model.w))
    assert torch.equal(grad, torch.ones(2, 3) @ model.w.mT)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_is_attached_by_itself(duplicate) -> None:
    model, x = attach(Attention(), POLICY), torch.randn(2, 3, 6)
    other = duplicate(model)
    expected = emulated_attention(model, x)
    assert torch.equal(other(x), expected)
    detach(model)
    assert torch.equal(other(x), expected)
    plain = model(x)
    assert torch.equal(detach(other)(x), plain)
    calls = []
    other.register_forward_hook(lambda *_: calls.append(1))
    other(x)
    assert calls == [1]


def test_torch_save_keeps_the_attachment() -> None:
    file = io.BytesIO()
    torch.save(attach(nn.Linear(5, 4), POLICY), file)
    file.seek(0)
    layer, x = torch.load(file, weights_only=False), torch.randn(3, 5)
    assert torch.equal(layer(x), ops.linear(x, layer.weight, layer.bias, ACC))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_of_halves_stays_one(dtype) -> None:
    model, x = attach(Attention(), POLICY).to(dtype), torch.randn(2, 3, 6, dtype=dtype)
    found = model.qkv(x)
    assert found.dtype == dtype == model(x).dtype
    assert torch.equal(found, ops.linear(x, model.qkv.weight, model.qkv.bias, ACC).to(dtype))


def test_autocast_gives_what_torchs_would() -> None:
    layer, x = attach(nn.Linear(5, 4), POLICY), torch.randn(3, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x)
        attended = attach(Called(lambda _, x: F.scaled_dot_product_attention(x, x, x)), POLICY)(x[None])
    half = torch.bfloat16
    assert torch.equal(found, ops.linear(x.to(half), layer.weight.to(half), layer.bias, ACC).to(half))
    assert attended.dtype == half


def test_data_parallel_training_in_one_process(tmp_path) -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, x = attach(Attention(), POLICY), torch.randn(2, 3, 6)
        parallel = nn.parallel.DistributedDataParallel(model)
        expected = torch.autograd.grad(emulated_attention(model, x).square().sum(), list(model.parameters()))
        parallel(x).square().sum().backward()
        assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))
    finally:
        torch.distributed.destroy_process_group()


# --- hooks, errors, interruptions ---


def test_hooks_of_others_run_as_before() -> None:
    layer, x, seen = nn.Linear(5, 4), torch.randn(3, 5), []
    layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    first = layer.register_forward_hook(lambda module, args, output: seen.append("before"))
    attach(layer, POLICY)
    layer.register_forward_hook(lambda module, args, output: output + 1)
    assert torch.equal(layer(x), ops.linear(2 * x, layer.weight, layer.bias, ACC) + 1)
    assert seen == ["before"]
    detach(layer)
    assert torch.equal(layer(x), F.linear(2 * x, layer.weight, layer.bias) + 1)
    first.remove()
    assert len(layer._forward_hooks) == 1


class Stop(BaseException):
    """Like KeyboardInterrupt: not an Exception."""


@pytest.mark.parametrize("error", [ValueError, Stop])
@pytest.mark.parametrize("where", ["forward", "pre-hook before", "pre-hook after", "hook"])
def test_an_error_leaves_nothing_behind(error, where) -> None:
    def fail(*_):
        raise error("on purpose")

    outer = nn.Sequential(nn.Linear(4, 4), Called(fail if where == "forward" else lambda m, x: x))
    x = torch.randn(2, 4)
    attach(outer, POLICY)
    handle = None
    if where == "hook":
        handle = outer[1].register_forward_hook(fail)
    elif where != "forward":
        handle = outer[1].register_forward_pre_hook(fail, prepend=where == "pre-hook before")
    with pytest.raises(error, match="on purpose"):
        outer(x)
    if error is ValueError:
        assert no_mode_is_left()
    a, b = torch.randn(3, 5), torch.randn(5, 2)
    plain = torch.empty(3, 2)
    with torch._C.DisableTorchFunction():
        plain = a @ b
    assert torch.equal(a @ b, plain)
    assert torch.equal(outer[0](x), ops.linear(x, outer[0].weight, outer[0].bias, ACC))
    assert no_mode_is_left()
    if handle is not None:
        handle.remove()
        assert torch.equal(outer(x), outer[0](x))


def test_a_mode_of_others_works_inside_and_outside() -> None:
    names = []

    class Names(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            names.append(func)
            return func(*args, **(kwargs or {}))

    def inside(module, x):
        with Names():
            return x.relu() @ x

    x = torch.randn(4, 4)
    expected = fm(x.relu(), x)
    model = attach(Called(inside), POLICY)
    with Names():
        found = model(x)
    assert torch.equal(found, expected)
    assert torch.Tensor.relu in names and no_mode_is_left()


def test_threads_do_not_meet() -> None:
    from concurrent.futures import ThreadPoolExecutor

    model, x = attach(Attention(), POLICY), torch.randn(2, 3, 6)
    expected, plain = emulated_attention(model, x), x @ x.mT
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda i: model(x) if i % 2 else x @ x.mT, range(6)))
    assert all(torch.equal(y, expected if i % 2 else plain) for i, y in enumerate(found))


def test_tracing_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"cannot be traced by torch.jit or exported: call fmaq.detach"):
        torch.jit.trace(attach(nn.Linear(3, 2), POLICY), torch.randn(1, 3))


@pytest.mark.filterwarnings("ignore")
def test_compilation_is_refused() -> None:
    layer, x = attach(nn.Linear(3, 2), POLICY), torch.randn(1, 3)
    with pytest.raises(RuntimeError, match=r"cannot run inside torch.compile: call fmaq.detach\(model\) before"):
        torch.compile(layer, backend="eager")(x)
    assert no_mode_is_left()
    assert torch.equal(layer(x), ops.linear(x, layer.weight, layer.bias, ACC))
    assert torch.equal(torch.compile(detach(layer), backend="eager")(x), layer(x))
    inside = torch.compile(lambda a: (a @ a).relu(), backend="eager")
    with pytest.raises(RuntimeError, match=r"cannot run inside torch.compile"):
        attach(Called(lambda _: inside(x.mT @ x)), POLICY)()
    assert no_mode_is_left()


# --- what cannot be covered ---


def test_what_cannot_be_covered_is_named_once() -> None:
    model = nn.ModuleDict({"rnn": nn.LSTM(3, 3), "cell": nn.GRUCell(3, 3), "fc": nn.Linear(3, 3)})
    with pytest.warns(FmaqCoverageWarning) as caught:
        attach(model, POLICY)
    assert len(caught) == 1
    assert "rnn (LSTM, a recurrent layer), cell (GRUCell, a recurrent layer)" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(model, Policy(accumulator=ACC, layers={"rnn": None, "cell": None}))
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


# --- transformers ---


def tiny(kind: str, attention: str) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    common = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "bert":
        config = transformers.BertConfig(**common, intermediate_size=24, max_position_embeddings=16)
        return transformers.BertModel._from_config(config, attn_implementation=attention)
    if kind == "llama":
        config = transformers.LlamaConfig(**common, num_key_value_heads=1, intermediate_size=24)
        return transformers.LlamaForCausalLM._from_config(config, attn_implementation=attention)
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    return transformers.GPT2LMHeadModel._from_config(config, attn_implementation=attention)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("kind", "products"), [("bert", 17), ("llama", 19), ("gpt2", 13)])
def test_every_product_of_a_transformer_is_emulated(kind, products, attention) -> None:
    model = tiny(kind, attention).eval()
    ids = torch.tensor([[3, 7, 1, 9]])
    seen = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", FmaqCoverageWarning)
        plain = model(ids)[0]
        attach(model, POLICY)
        with listening(seen.append):
            emulated = model(ids)[0]
    covered = [p for p in seen if p.reason is None]
    assert len(covered) == products
    assert {p.kind for p in seen if p.reason is not None} <= {"matmul"}  # Llama's angles: one step
    assert all(p.steps == 1 for p in seen if p.reason is not None)
    assert not torch.equal(emulated, plain)
    with torch.no_grad():
        assert torch.equal(detach(model)(ids)[0], plain)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_eager_and_fused_attention_of_a_transformer_are_one(kind) -> None:
    eager, fused = tiny(kind, "eager").eval(), tiny(kind, "sdpa").eval()
    fused.load_state_dict(eager.state_dict())
    ids, mask = torch.tensor([[3, 7, 1, 9]]), torch.tensor([[1, 1, 1, 1]])
    with torch.no_grad():
        found = [attach(model, QUANTIZED)(ids, attention_mask=mask)[0] for model in (eager, fused)]
    assert torch.equal(*found)


def test_gradient_checkpointing_of_a_transformer_is_emulated() -> None:
    model = attach(tiny("llama", "sdpa").train(), POLICY)
    ids = torch.tensor([[3, 7, 1, 9]])

    def gradients() -> list[torch.Tensor]:
        return list(torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters())))

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(torch.equal(a, b) for a, b in zip(gradients(), expected, strict=True))


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


def test_an_accumulator_alone_attaches() -> None:
    model = attach(nn.Linear(4, 2), "paper12")
    x = torch.randn(3, 4)
    assert torch.equal(model(x), ops.linear(x, model.weight, model.bias, Accumulator.paper12))


def test_gradients_in_an_accumulator_are_those_of_identity_alone() -> None:
    with pytest.raises(ValueError, match=r'backward is the accumulator .* estimator "recursive/of" sums'):
        attach(nn.Linear(4, 2), Policy(accumulator=ACC, estimator="recursive/of", backward=ACC))
