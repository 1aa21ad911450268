"""Operands as they are multiplied: codes in integer engines, static ranges, weights by channel."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fmaq
from fmaq import ops
from fmaq.analysis import overflow_bounds
from fmaq.emulation import Policy, attach, listening
from fmaq.emulation.operands import sums_codes
from fmaq.numerics import Accumulator, reference

INT8 = {"weight": "int8", "activation": "int8"}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def codes_of(x: torch.Tensor, bits: int = 8, amax: float | None = None) -> tuple[np.ndarray, float]:
    codes, scale = reference.integer_codes(x.detach().numpy(), bits, amax)
    return codes.astype(np.int64), scale


def register(codes: np.ndarray, weights: np.ndarray, width: int, wraps: bool, chunk: int) -> tuple[np.ndarray, int]:
    """Sums of integer products, one after the other, in a register that saturates or wraps, and how often a step did.

    All in plain Python's integers.
    """
    overflows = 0

    def held(value: int) -> int:
        low, high = -(2 ** (width - 1)), 2 ** (width - 1) - 1
        nonlocal overflows
        overflows += not low <= value <= high
        return (value - low) % 2**width + low if wraps else min(max(value, low), high)

    found = np.zeros((len(codes), len(weights)), np.int64)
    for m, row in enumerate(codes.tolist()):
        for n, column in enumerate(weights.tolist()):
            total = 0
            for start in range(0, len(row), chunk):
                s = 0
                for x, w in zip(row[start : start + chunk], column[start : start + chunk], strict=True):
                    s = held(s + x * w)
                total = held(total + s)
            found[m, n] = total
    return found, overflows


# --- integer engines ---


@pytest.mark.parametrize(
    ("name", "width", "wraps"), [("I16f0", 16, False), ("I16f0w", 16, True), ("I24f0w", 24, True), ("I14f0", 14, False)]
)
@pytest.mark.parametrize("chunk", [16, 256])
def test_a_narrow_register_of_codes_by_brute_force(name: str, width: int, wraps: bool, chunk: int) -> None:
    model, x = nn.Linear(256, 5), torch.randn(3, 256)
    (a, a_scale), (b, b_scale) = codes_of(x), codes_of(model.weight)
    sums = torch.from_numpy(register(a, b, width, wraps, chunk)[0]).float()
    expected = sums * torch.tensor(a_scale * b_scale).float() + model.bias
    attach(model, Policy(f"{name} chunk={chunk}", **INT8))
    assert torch.equal(model(x), expected)


def test_sixteen_bits_are_too_few_for_codes_though_values_would_fit() -> None:
    """The fault that was reported: values in 16 bits had 54 dB of signal to noise, codes have 4 to 5."""
    model, x = nn.Linear(256, 64, bias=False), torch.randn(64, 256)
    exact = model(x)

    def snr(policy: Policy) -> float:
        y = fmaq.attach(model, policy)(x)
        fmaq.detach(model)
        return float(10 * torch.log10(exact.square().sum() / (exact - y).square().sum()).detach())

    narrow, wide = Policy("I16f0", **INT8), Policy("I24f0", **INT8)
    assert snr(narrow) < 8 and snr(wide) > 35
    assert snr(fmaq.calibrate(model, narrow, [x])) == pytest.approx(snr(narrow), abs=0.5)
    assert snr(fmaq.calibrate(model, wide, [x])) == pytest.approx(snr(wide), abs=0.5)


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv", "transposed", "matmul", "weight first"])
def test_codes_and_scales_of_every_kind(kind: str, by_channel: bool) -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shape = {"linear": (6, 8), "conv": (6, 2, 3, 3), "transposed": (4, 3, 3, 3), "matmul": (8, 6)}
            self.weight = nn.Parameter(
                torch.randn(shape.get(kind, (6, 8))) * torch.tensor([1.0, 8.0, 0.1]).repeat(2)[:1]
            )
            self.weight.data.flatten()[::5] *= 30

        def forward(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
            weight = self.weight if weight is None else weight
            if kind == "linear":
                return F.linear(x, weight)
            if kind == "conv":
                return F.conv2d(x, weight, groups=2, padding=1)
            if kind == "transposed":
                return F.conv_transpose2d(x, weight, groups=2)
            return x @ weight if kind == "matmul" else weight @ x.mT

    model = Product()
    x = torch.randn(2, 4, 5, 5) if kind in ("conv", "transposed") else torch.randn(3, 8)
    channel = {"linear": 0, "conv": 0, "matmul": 1}.get(kind)
    codes = torch.empty_like(model.weight)
    if by_channel and kind == "transposed":  # output channel g·3 + o is weight[2g : 2g + 2, o]
        scales = torch.empty(6, dtype=torch.float64)
        for g in range(2):
            for o in range(3):
                part = model.weight[2 * g : 2 * g + 2, o]
                found, scales[3 * g + o] = codes_of(part)
                codes.data[2 * g : 2 * g + 2, o] = torch.from_numpy(found).float()
    elif by_channel and channel is not None:
        scales = torch.empty(model.weight.shape[channel], dtype=torch.float64)
        for i, part in enumerate(model.weight.unbind(channel)):
            found, scales[i] = codes_of(part)
            codes.data.select(channel, i).copy_(torch.from_numpy(found).float())
    else:  # a weight in front has its channels in the rows: one scale
        found, scale = codes_of(model.weight)
        codes, scales = torch.from_numpy(found).float(), torch.tensor(scale, dtype=torch.float64)
    a, a_scale = codes_of(x)
    sums = model(torch.from_numpy(a).float(), codes)  # exact in float32: below 2^24
    total = (scales * a_scale).float()
    if total.dim() and kind in ("conv", "transposed"):
        total = total[:, None, None]
    attach(model, Policy("I32f0", weight_per_channel=by_channel, **INT8))
    assert torch.equal(model(x), (sums * total).detach())


def test_convolutions_and_products_equal_onnxruntimes_integers() -> None:
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper

    def run(operator: str, a: np.ndarray, b: np.ndarray, **attributes: object) -> torch.Tensor:
        node = helper.make_node(operator, ["a", "b"], ["y"], **attributes)
        inputs = [helper.make_tensor_value_info(name, TensorProto.INT8, x.shape) for name, x in (("a", a), ("b", b))]
        if operator == "ConvInteger":  # onnxruntime has it for uint8 inputs alone: the same numbers, less their zero
            inputs[0] = helper.make_tensor_value_info("a", TensorProto.UINT8, a.shape)
            zero = helper.make_tensor("zero", TensorProto.UINT8, [], [128])
            node = helper.make_node(operator, ["a", "b", "zero"], ["y"], **attributes)
            a = (a.astype(np.int64) + 128).astype(np.uint8)
        graph = helper.make_graph(
            [node],
            "g",
            inputs,
            [helper.make_tensor_value_info("y", TensorProto.INT32, [None] * a.ndim)],
            [zero] if operator == "ConvInteger" else [],
        )
        opset = [helper.make_opsetid("", 13)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=8)
        onnx.checker.check_model(model)
        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        (y,) = session.run(None, {"a": a, "b": b})
        assert y.dtype == np.int32
        return torch.from_numpy(y)

    linear, x = nn.Linear(300, 7, bias=False), torch.randn(5, 300)
    (a, a_scale), (b, b_scale) = codes_of(x), codes_of(linear.weight)
    y = run("MatMulInteger", a.astype(np.int8), b.T.astype(np.int8))
    assert torch.equal(attach(linear, Policy("I32f0", **INT8))(x), y.float() * torch.tensor(a_scale * b_scale).float())
    conv, image = nn.Conv2d(8, 6, 3, stride=2, padding=1, groups=2, bias=False), torch.randn(2, 8, 9, 9)
    (a, a_scale), (b, b_scale) = codes_of(image), codes_of(conv.weight)
    y = run("ConvInteger", a, b.astype(np.int8), group=2, strides=[2, 2], pads=[1, 1, 1, 1])
    found = attach(conv, Policy("I32f0w", **INT8))(image)
    assert torch.equal(found, y.float() * torch.tensor(a_scale * b_scale).float())


@pytest.mark.parametrize(
    ("accumulator", "formats", "expected"),
    [
        ("I16f0", ("int8", "int8"), True),
        ("I24f0w product=I16f0", ("int4", "int8"), True),
        ("I16f4", ("int8", "int8"), False),
        ("I16f0 product=I16f2", ("int8", "int8"), False),
        ("I16f0", ("int8", None), False),
        ("I16f0", ("int8", "M4E3"), False),
        ("M7E4b10", ("int8", "int8"), False),
        ("fp32", ("int8", "int8"), False),
    ],
)
def test_what_sums_codes(accumulator: str, formats: tuple[str | None, str | None], expected: bool) -> None:
    parsed = accumulator if accumulator == "fp32" else Accumulator(accumulator)
    assert sums_codes(parsed, formats) is expected


def test_attention_between_activations_sums_codes_too() -> None:
    class Attention(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, v)

    q, k, v = (torch.randn(2, 3, 4, 8) for _ in range(3))

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        (a_codes, a_scale), (b_codes, b_scale) = ops.integer_codes(a, "int8"), ops.integer_codes(b, "int8")
        return (a_codes @ b_codes) * (a_scale * b_scale).float()

    scores = product(q, k.mT) * 8**-0.5
    expected = product(scores.softmax(-1), v)
    torch.testing.assert_close(attach(Attention(), Policy("I32f0", **INT8))(q, k, v), expected, rtol=0, atol=1e-6)


def test_gradients_are_those_of_the_values() -> None:
    model, x = nn.Linear(16, 4), torch.randn(5, 16, requires_grad=True)
    attach(model, Policy("I32f0", **INT8))
    grad = torch.randn(5, 4)
    found = torch.autograd.grad(model(x), [x, model.weight, model.bias], grad)
    a, b = ops.quantize(x, "int8"), ops.quantize(model.weight, "int8")
    for one, other in zip(found, (grad @ b, grad.T @ a, grad.sum(0)), strict=True):
        torch.testing.assert_close(one, other)


def test_every_tool_speaks_of_codes() -> None:
    model, x = nn.Linear(64, 6), torch.randn(20, 64)
    attach(model, Policy("I14f0 chunk=none", **INT8))
    (row,) = fmaq.coverage(model, x)
    assert row.codes and row.formats == ("int8", "int8") and "int8 · int8 codes" in str(fmaq.coverage(model, x))
    (a, _), (b, _) = codes_of(x), codes_of(model.weight)
    with listening(lambda product: operands.append(product.operands)), fmaq.observe(model, steps=None) as events:
        operands: list[tuple[torch.Tensor, ...]] = []
        y = model(x)
    assert np.array_equal(operands[0][0].numpy(), a) and np.array_equal(operands[0][1].detach().numpy(), b)
    exact = F.linear(ops.quantize(x, "int8"), ops.quantize(model.weight, "int8"))
    noise = (exact - (y - model.bias)).square().sum()
    assert events[""].snr == pytest.approx(float(10 * torch.log10(exact.square().sum() / noise).detach()), abs=1e-3)
    _, overflows = register(a, b, 14, False, 64)
    assert events[""].accumulator_overflow == overflows > 0
    table = overflow_bounds(model, x)
    worst = np.where(b > 0, b * a.max(), b * a.min()).sum(1)  # no partial sum of these terms, none negative, is larger
    assert table.rows[0].high == a.max() and table.rows[0].bounds.sums.highest.tolist() == worst.tolist()
    fmaq.attach(model, Policy("fp32", **INT8))
    assert overflow_bounds(model, x, accumulator="I14f0 chunk=none").rows[0].high == a.max()


def test_tokens_exponents_are_refused_where_codes_are_summed() -> None:
    with pytest.raises(ValueError, match="per_token is of float exponents, and the model itself sums integer codes"):
        attach(nn.Linear(4, 4), Policy("I16f0", per_token=True, **INT8))


def test_a_non_finite_value_is_nan_in_its_own_outputs_alone() -> None:
    model, x = nn.Linear(8, 3), torch.randn(4, 8)
    expected = attach(model, Policy("I24f0", a_max=4.0, **INT8))(x)
    x[2, 1] = torch.inf
    found = model(x)
    assert found[2].isnan().all() and torch.equal(found[[0, 1, 3]], expected[[0, 1, 3]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("accumulator", ["fp32", "M7E4b10 product=M7E4b12", "I24f0"])
def test_half_precision_models_are_quantized(dtype: torch.dtype, accumulator: str) -> None:
    """With float32 sums as well: torch multiplies what is in one dtype, that of the bias, alone."""
    policy = Policy(accumulator, **INT8)
    for model, x in ((nn.Linear(8, 4), torch.randn(3, 8)), (nn.Conv2d(3, 4, 3), torch.randn(2, 3, 6, 6))):
        attach(model, policy)
        expected = model(x)
        found = model.to(dtype)(x.to(dtype))
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)


def test_neither_a_cache_nor_padding_changes_a_result() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 64, (1, 12))
    others = torch.cat([ids, torch.randint(0, 64, (3, 12))])
    policy = Policy("I24f0 chunk=none", **INT8)
    attach(model, fmaq.calibrate(model, policy, [{"input_ids": others}]))
    with torch.no_grad():
        whole = model(ids).logits
        in_batch = model(others).logits[:1]
        found = model(ids[:, :6], use_cache=True)
        parts = [found.logits]
        for token in ids[:, 6:].unbind(1):
            found = model(token[:, None], past_key_values=found.past_key_values, use_cache=True)
            parts.append(found.logits)
        mask = torch.tensor([[0] * 3 + [1] * 12])
        padded = {"input_ids": torch.cat([ids[:, :3], ids], 1), "attention_mask": mask}
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        behind = model(**padded, position_ids=positions).logits[:, 3:]
    for other in (in_batch, torch.cat(parts, 1), behind):
        torch.testing.assert_close(other, whole, rtol=0, atol=1e-6)  # float32 functions between may differ in a bit


# --- static ranges ---


@pytest.mark.parametrize(
    ("accumulator", "format"),
    [
        *(("M7E4b10 product=M7E4b12", name) for name in ("M4E3", "int8")),
        *(("fp32", name) for name in ("M4E3", "int8")),
        ("I24f0", "int8"),
    ],
)
def test_a_samples_result_does_not_depend_on_its_batch(accumulator: str, format: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
    x = torch.randn(6, 3, 8, 8)
    policy = Policy(accumulator, weight=format, activation=format)
    other = x.clone()
    other[0] *= 64

    def changes(policy: Policy) -> bool:
        attach(model, policy)
        return not torch.equal(model(x)[1:], model(other)[1:])

    assert changes(policy), "with ranges found at run time it does"
    static = fmaq.calibrate(model, policy, [x])
    assert not changes(static)
    alone = torch.cat([model(one[None]) for one in x])
    torch.testing.assert_close(
        alone, model(x), rtol=0, atol=1e-5 if accumulator == "fp32" else 0
    )  # torch's sums differ
    dynamic = fmaq.calibrate(model, policy, [x], ranges="dynamic") if accumulator != "fp32" else policy
    assert changes(dynamic)


def test_calibrate_chooses_the_largest_magnitudes_of_all_batches() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
    batches = [torch.randn(5, 8), 3 * torch.randn(5, 8), torch.randn(5, 8)]
    policy = Policy("M7E4 product=M7E4", weight="M4E3", activation="M4E3", weight_per_channel=True)
    found = fmaq.calibrate(model, policy, batches)
    first = found.layers["0"]
    assert first["a_max"].tensor.item() == torch.cat(batches).abs().max()
    assert torch.equal(first["b_max"].tensor, model[0].weight.abs().amax(1))
    assert found.layers["2"]["b_max"].shape == (3,)
    kept = fmaq.calibrate(model, found.replace(accumulator="M5E4 product=M5E4"), [batches[0]], ranges="given")
    assert kept.layers["0"]["a_max"] == first["a_max"] and kept.layers["0"]["accumulator"].format.mantissa == 5
    per_tensor = fmaq.calibrate(model, policy.replace(weight_per_channel=False), batches)
    assert per_tensor.layers["0"]["b_max"].tensor.item() == model[0].weight.abs().max()
    with pytest.raises(
        ValueError,
        match=r"ranges must be .*, got 'frozen'",
    ):
        fmaq.calibrate(model, policy, batches, ranges="frozen")  # type: ignore[arg-type]


class Experts(nn.Module):
    """Of which the second is called, and given no row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.first(x), self.second(x[:0])])


@pytest.mark.filterwarnings("ignore::fmaq.analysis.batches.CalibrationWarning")
@pytest.mark.parametrize("accumulator", ["M7E4b10 product=M7E4b12 chunk=16", "I24f0 chunk=16"])
def test_a_layer_that_was_given_no_rows_keeps_its_accumulator(accumulator: str) -> None:
    policy = Policy(accumulator, **INT8)
    found = fmaq.calibrate(Experts(), policy, [torch.randn(5, 8)])
    assert found.for_layer("second") == policy.for_layer("second")
    assert found.layers["first"]["a_max"].array > 0


def test_zeros_show_no_range() -> None:
    model = nn.Linear(8, 4)
    found = fmaq.calibrate(model, Policy("I24f0", **INT8), [torch.zeros(5, 8)])
    assert found.layers[""].get("a_max") is None and found.layers[""]["b_max"].array > 0


def test_ranges_left_to_run_time_take_away_those_of_float32_sums_too() -> None:
    model, x = nn.Linear(8, 4), torch.randn(5, 8)
    static = fmaq.calibrate(model, Policy("fp32", **INT8), [x])
    assert static.for_layer("").a_max is not None
    assert fmaq.calibrate(model, static, [x], ranges="dynamic").for_layer("").a_max is None


def test_formats_with_a_bias_of_their_own_need_no_range() -> None:
    model, x = nn.Linear(8, 4), torch.randn(5, 8)
    found = fmaq.calibrate(model, Policy("M7E4", weight="M4E3b9", activation="M4E3b5"), [x])
    assert found.layers[""].get("a_max") is None and found.layers[""].get("b_max") is None


def test_ranges_survive_a_file_and_another_accumulator(tmp_path) -> None:
    model, x = nn.Linear(40, 33), torch.randn(5, 40)
    policy = fmaq.calibrate(model, Policy("M7E4", weight="int8", activation="int8", weight_per_channel=True), [x])
    policy.save(tmp_path / "policy.yaml")
    loaded = Policy.load(tmp_path / "policy.yaml")
    assert loaded == policy and loaded.layers[""]["b_max"].shape == (33,)
    assert Policy.parse(policy.to_mapping()) == policy
    other = loaded.replace(accumulator="I24f0")
    assert other.layers[""]["b_max"] == policy.layers[""]["b_max"] and other.layers[""].get("offset") is None
    codes, scale = ops.integer_codes(model.weight, "int8", 0, model.weight.abs().amax(1))
    a, a_scale = ops.integer_codes(x, "int8")
    expected = (a @ codes.T) * (scale.flatten() * a_scale).float() + model.bias
    assert torch.equal(attach(model, other)(x), expected)


def test_two_activations_of_one_product_have_a_range_each() -> None:
    class Scores(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a @ b

    model, a, b = Scores(), torch.randn(4, 6), 9 * torch.randn(6, 5)
    found = fmaq.calibrate(model, Policy("M7E4 product=M7E4", activation="M4E3"), [(a, b)])
    entry = found.layers[""]
    assert entry["a_max"].tensor.item() == a.abs().max() and entry["b_max"].tensor.item() == b.abs().max()


def test_weights_by_channel_have_a_bias_each() -> None:
    model, x = nn.Linear(12, 4, bias=False), torch.randn(3, 12)
    model.weight.data *= torch.tensor([1e-3, 1.0, 30.0, 0.0])[:, None]
    attach(model, Policy("fp32", weight="M2E2", weight_per_channel=True))
    rows = [torch.from_numpy(reference.quantize_tensor(w.numpy(), fmaq.FloatFormat(2, 2))) for w in model.weight.data]
    assert torch.equal(model(x), F.linear(x, torch.stack(rows).float()))


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({"b_max": [1.0, 2.0]}, r"linear in the model itself: amax must be a number, got \(2,\)"),
        (
            {"b_max": [1.0, 2.0], "weight_per_channel": True},
            r"amax must be a number, or \(4,\), one a slice, got \(2,\)",
        ),
        ({"a_max": 1.0, "activation": "M4E3b5"}, "M4E3b5 has a bias, which says how large values may be"),
    ],
)
def test_ranges_that_do_not_fit(ranges: dict[str, object], message: str) -> None:
    policy = Policy(**{"accumulator": "paper12", "weight": "M4E3", "activation": "M4E3", **ranges})
    with pytest.raises(ValueError, match=message):
        attach(nn.Linear(6, 4), policy)(torch.randn(2, 6))


@pytest.mark.parametrize("value", [-1.0, [[1.0, 2.0]]])
def test_what_is_no_range_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="a_max must be a largest magnitude, or one an output channel"):
        Policy(a_max=value)
