"""How much of a model is emulated, beside what is not: layers left alone, fused kernels, what is no product."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attach_cases import ACC, POLICY, Called
from fmaq.emulation import FmaqCoverageWarning, Policy, attach, coverage

pytestmark = pytest.mark.filterwarnings("ignore::fmaq.emulation.FmaqCoverageWarning")


def of(function, *inputs: torch.Tensor, policy=POLICY, **parameters: torch.Tensor):
    return coverage(attach(Called(function, **parameters), policy), *inputs)


class Recurrent(nn.Module):
    """A recurrent layer and a linear one."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.fc = layer, nn.Linear(width, 2)

    def forward(self, *inputs):
        y = self.layer(*inputs)
        y = y[0] if isinstance(y, tuple) else y
        return self.fc(y.data if isinstance(y, nn.utils.rnn.PackedSequence) else y)


LSTM = nn.LSTM(8, 16, batch_first=True)
PACKED = nn.utils.rnn.pack_padded_sequence(torch.randn(2, 5, 8), torch.tensor([5, 3]), batch_first=True)


@pytest.mark.parametrize(
    ("layer", "given", "width", "macs"),
    [
        # tokens · (gates · hidden · (inputs + hidden)), by layer and direction
        (LSTM, torch.randn(2, 5, 8), 16, 10 * 4 * 16 * (8 + 16)),
        (LSTM, torch.randn(5, 8), 16, 5 * 4 * 16 * (8 + 16)),
        (LSTM, PACKED, 16, 8 * 4 * 16 * (8 + 16)),
        (nn.GRU(8, 16, 2, bidirectional=True), torch.randn(5, 2, 8), 32, 10 * 2 * 3 * 16 * (8 + 16 + 32 + 16)),
        (nn.RNN(8, 16, nonlinearity="relu"), torch.randn(5, 2, 8), 16, 10 * 16 * (8 + 16)),
        (nn.LSTM(8, 16, proj_size=4, bias=False), torch.randn(5, 2, 8), 4, 10 * (4 * 16 * (8 + 4) + 4 * 16)),
        (nn.LSTMCell(8, 16), torch.randn(3, 8), 16, 3 * 4 * 16 * (8 + 16)),
        (nn.GRUCell(8, 16), torch.randn(3, 8), 16, 3 * 3 * 16 * (8 + 16)),
        (nn.RNNCell(8, 16), torch.randn(8), 16, 16 * (8 + 16)),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_recurrent_layers_count(layer, given, width, macs, training) -> None:
    model = Recurrent(layer, width).train(training)
    table = coverage(attach(model, POLICY), given)
    *own, rest = table.rows
    assert {(row.layer, row.covered) for row in own} == {("layer", True)} and table.share == 1
    assert sum(row.macs for row in own) == macs
    table = coverage(attach(model, Policy(accumulator=ACC, layers={"layer": None})), given)
    own, rest = table.rows
    assert (own.layer, own.macs, own.covered) == ("layer", macs, False)
    assert table.share == rest.macs / (rest.macs + macs) < 1
    assert "of unknown size" not in str(table) and table.unknown == 0
    assert f"{table.share:.1%} of them emulated" in str(table)


@pytest.mark.parametrize(
    ("function", "product", "macs"),
    [
        (lambda m, x: torch.cdist(x, x), "cdist", 4 * 4 * 6),
        (lambda m, x: torch.cov(x), "cov", 4 * 4 * 6),
        (lambda m, x: torch.linalg.multi_dot([x, x.mT, x]), "multi_dot", None),
        (lambda m, x: torch.linalg.matrix_power(x @ x.mT, 3), "matrix_power", 2 * 4**3),
        (lambda m, x: F.cosine_similarity(x, x), "cosine_similarity", 24),
        (lambda m, x: F.cosine_similarity(x[:, None], x[None], dim=-1), "cosine_similarity", 4 * 24),
        (
            lambda m, x: F.embedding_bag(
                torch.tensor([[0, 2], [1, 1]]), x, mode="sum", per_sample_weights=torch.ones(2, 2)
            ),
            "embedding_bag",
            4 * 6,
        ),
    ],
)
def test_fused_kernels_are_named_and_counted(function, product, macs) -> None:
    rows = [row for row in of(function, torch.randn(4, 6)) if not row.covered]
    assert [row.product for row in rows] == [product]
    assert rows[0].macs == (macs if macs is not None else 4 * 6 * 4 + 4 * 4 * 6)


def test_what_cannot_be_emulated_is_named_when_it_is_met() -> None:
    model = attach(Called(lambda m, x: F.cosine_similarity(x, x)), POLICY)
    with pytest.warns(FmaqCoverageWarning, match=r"cosine_similarity in the model itself is not emulated: a fused"):
        model(torch.randn(3, 4))


def test_sums_without_weights_are_no_products() -> None:
    bag = nn.EmbeddingBag(5, 4)
    assert len(coverage(attach(bag, POLICY), torch.tensor([[0, 2], [1, 1]]))) == 0
    weighted = nn.EmbeddingBag(5, 4, mode="sum")
    table = coverage(attach(weighted, POLICY), torch.tensor([[0, 2], [1, 1]]), per_sample_weights=torch.ones(2, 2))
    assert [(row.product, row.macs) for row in table] == [("embedding_bag", 16)]
    assert torch.equal(weighted(torch.tensor([[0]])), weighted.weight[:1])


def test_products_of_unknown_size_are_told_apart() -> None:
    @torch.library.custom_op("fmaq_test::unknown", mutates_args=())
    def unknown(a: torch.Tensor) -> torch.Tensor:
        return a @ a

    table = of(lambda m, x: unknown(x @ x), torch.randn(3, 3))
    assert (table.share, table.unknown) == (1.0, 1)
    assert str(table).endswith("100.0% of them emulated; not emulated beside them: products of unknown size, 1")


def test_kernels_that_no_handler_met_have_sizes() -> None:
    def hidden(m, x):
        with torch._C.DisableTorchFunction():
            y = F.conv1d(x[None], torch.ones(2, 4, 3))
            z = F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None])
            return y, z, x @ x.mT, x[0] @ x[0], x @ x[0], torch.addmm(x, x[:, :4], x)

    table = of(hidden, torch.randn(4, 6))
    found = {row.product: row.macs for row in table}
    assert found["convolution"] == 2 * 4 * 4 * 3 and found["mm"] == 4 * 6 * 4 and found["addmm"] == 4 * 4 * 6
    assert found["dot"] == 6 and found["mv"] == 24
    assert table.unknown == 0 and table.share == 0


def test_marks_of_the_profiler_and_collectives_are_no_products(tmp_path) -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)

    def marked(m, x):
        with torch.profiler.record_function("a mark"):
            gathered = torch.distributed._functional_collectives.all_reduce(x, "sum", [0])
            torch.distributed.all_reduce(x.clone())
            return m.fc(gathered + 0)

    try:
        model = Called(marked)
        model.fc = nn.Linear(6, 2)
        attach(model, POLICY)
        with warnings.catch_warnings():
            warnings.simplefilter("error", FmaqCoverageWarning)
            model(torch.randn(4, 6))
            parallel = nn.parallel.DistributedDataParallel(attach(nn.Linear(6, 2), POLICY))
            parallel(torch.randn(4, 6))
        assert [row.product for row in coverage(model, torch.randn(4, 6))] == ["linear"]
        assert [row.product for row in coverage(parallel, torch.randn(4, 6))] == ["linear"]
        outer = attach(nn.Sequential(nn.parallel.DistributedDataParallel(nn.Linear(6, 2))), POLICY)
        assert [(row.layer, row.product) for row in coverage(outer, torch.randn(4, 6))] == [("0", "linear")]
    finally:
        torch.distributed.destroy_process_group()


def test_sharding_copies_are_no_products(tmp_path) -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
        fsdp.fully_shard(model[0], mesh=mesh)
        fsdp.fully_shard(model, mesh=mesh)
        attach(model, POLICY)
        with warnings.catch_warnings():
            warnings.simplefilter("error", FmaqCoverageWarning)
            model(torch.randn(3, 6)).sum().backward()
        table = coverage(model, torch.randn(3, 6))
        assert [(row.layer, row.product, row.covered) for row in table] == [
            ("0", "linear", True),
            ("1", "linear", True),
        ]
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("operator", "is_product"),
    [
        ("profiler::_record_function_enter_new", False),
        ("c10d::allreduce_", False),
        ("_c10d_functional::all_gather_into_tensor", False),
        ("fsdp::split_with_sizes_copy", False),
        ("quantized::add", False),
        ("quantized::linear_prepack", False),
        ("quantized::linear", True),
        ("quantized::conv2d_relu", True),
        ("torchvision::nms", False),
        ("torchvision::deform_conv2d", True),
        ("symm_mem::fused_all_gather_matmul", True),
        ("symm_mem::one_shot_all_reduce", False),
        ("inductor::_mm_plus_mm", True),
        ("mkldnn::_linear_pointwise", True),
        ("somebodys::kernel", True),
    ],
)
def test_operators_of_others_are_products_unless_they_are_known(operator, is_product) -> None:
    from fmaq.emulation.mode import _may_multiply

    assert _may_multiply(*operator.split("::")) is is_product


# --- modules that attach warns of ---


def test_float_functional_is_emulated_and_not_warned_of() -> None:
    functional = torch.ao.nn.quantized.FloatFunctional
    x = torch.randn(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FmaqCoverageWarning)
        model = Called(lambda m, x: m.add.matmul(x, x.mT) if hasattr(m.add, "matmul") else x @ x.mT)
        model.add = functional()
        attach(model, Policy(accumulator=ACC))
        model.fx = torch.ao.nn.quantized.FXFloatFunctional()
        attach(model, Policy(accumulator=ACC))
        table = coverage(model, x)
    assert table.share == 1.0


def test_modules_of_quantized_kernels_are_warned_of_if_they_multiply() -> None:
    quantized = torch.ao.nn.quantized
    with warnings.catch_warnings():
        warnings.simplefilter("error", FmaqCoverageWarning)
        attach(nn.Sequential(quantized.DeQuantize(), quantized.Quantize(0.1, 0, torch.quint8)), POLICY)
        attach(nn.Sequential(quantized.ReLU6(), quantized.Dropout()), POLICY)
        reference = quantized.reference.Linear(4, 2)
        attach(nn.Sequential(reference), POLICY)
    for layer in (quantized.Linear(4, 2), quantized.dynamic.Linear(4, 2), quantized.Conv2d(1, 1, 1)):
        with pytest.warns(FmaqCoverageWarning, match=r"0 \(\w+, a quantized module\)"):
            attach(nn.Sequential(layer), POLICY)
