"""The coverage table: every product, by what it is computed, and why not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fmaq.emulation import FmaqCoverageWarning, Policy, attach, coverage, listening
from fmaq.numerics import Accumulator

ACC = Accumulator("M5E4b8", product="M5E4b9", chunk=4)


class Block(nn.Module):
    """A bit of everything: convolution, batch norm, dropout, linear, functional and fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        x = F.dropout(self.norm(self.conv(x)), 0.5, self.training).flatten(2).mT
        x = self.fc(self.fc(x))
        return F.scaled_dot_product_attention(x, x, x) @ x.mT


def attached(**policy) -> Block:
    torch.manual_seed(0)
    return attach(Block(), Policy(**{"accumulator": ACC, "weight": "M4E3", **policy}))


def test_rows_tell_what_is_computed_by_what() -> None:
    table = coverage(attached(layers={"conv": None, "fc": {"accumulator": "fp32"}}), torch.ones(2, 2, 4, 4))
    assert [(r.layer, r.product, r.shapes, r.calls, r.macs) for r in table] == [
        ("conv", "conv2d", ((2, 2, 4, 4), (4, 1, 3, 3)), 1, 2 * 4 * 4 * 9),
        ("fc", "linear", ((2, 4, 4), (4, 4)), 2, 2 * (2 * 4 * 4 * 4)),
        ("", "attention_scores", ((2, 4, 4), (2, 4, 4)), 1, 2 * 4 * 4 * 4),
        ("", "attention_values", ((2, 4, 4), (2, 4, 4)), 1, 2 * 4 * 4 * 4),
        ("", "matmul", ((2, 4, 4), (2, 4, 4)), 1, 2 * 4 * 4 * 4),
    ]
    assert [(r.accumulator, r.formats, r.covered, r.reason) for r in table] == [
        ("fp32", (None, None), False, "left alone by the policy"),
        ("fp32", (None, "M4E3"), False, "fp32 by the policy"),
        *[(str(ACC), (None, None), True, "")] * 3,
    ]
    assert table.macs == 288 + 5 * 128
    assert table.share == 3 * 128 / table.macs
    assert len(table) == 5
    assert table.to_dicts()[0]["layer"] == "conv"


def test_table_prints_itself() -> None:
    text = str(coverage(attached(layers={"conv": None}), torch.ones(2, 2, 4, 4)))
    lines = text.splitlines()
    assert lines[0].split() == [
        *("layer", "product", "operands", "calls", "MACs", "formats", "accumulator", "not", "covered")
    ]
    assert lines[2].split()[:3] == ["conv", "conv2d", "2×2×4×4"]
    assert lines[2].endswith("left alone by the policy")
    assert str(ACC) in lines[3]
    assert lines[-1] == "928 MACs; 69.0% of them emulated"


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_afterwards_as_it_was(training) -> None:
    model = attached().train(training)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    norm = model.norm.running_mean
    coverage(model, torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(1)))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.norm.running_mean is norm
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training is training
    assert all(p.grad is None for p in model.parameters())


def test_everything_covered_is_all_of_it() -> None:
    assert coverage(attached(), torch.ones(2, 2, 4, 4)).share == 1.0


def test_default_policy_covers_nothing() -> None:
    table = coverage(attach(Block(), Policy()), torch.ones(1, 2, 4, 4))
    assert table.share == 0 and {row.reason for row in table} == {"fp32 by the policy"}
    assert [row.product for row in table if row.layer == ""] == ["attention_scores", "attention_values", "matmul"]


def test_einsum_of_a_layer_left_alone_has_a_size() -> None:
    class Einsum(nn.Module):
        def forward(self, x):
            return torch.einsum("bik,bjk->bij", x, x)

    table = coverage(attach(Einsum(), Policy()), torch.ones(2, 3, 4))
    assert [(row.product, row.macs) for row in table] == [("einsum", 2 * 3 * 3 * 4)]


def test_an_unattached_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attached to no policy; call fmaq.attach\(model, policy\) before"):
        coverage(Block(), torch.ones(1, 2, 4, 4))


def test_a_model_around_an_attached_one_is_covered() -> None:
    table = coverage(nn.Sequential(attached(), nn.Linear(4, 2)), torch.ones(1, 2, 4, 4))
    assert [(row.layer, row.product, row.covered) for row in table][-1] == ("", "addmm", False)
    assert table.rows[-1].reason == "outside of every attached module"


class Odd(nn.Module):
    """Products that are not emulated, each for its own reason."""

    def forward(self, x):
        x = torch.einsum("bii,bij->bj", x, x)
        x = (x.double() @ x.double().mT).float()
        x = torch.cdist(x, x)
        x = x[:, :1] @ x[:1]
        torch.ops.aten.native_dropout(x, 0.5, True)
        return torch.ops.aten._trilinear(x[None], x[None], x[None], [], [], [], [1])


@pytest.mark.filterwarnings("ignore::fmaq.emulation.FmaqCoverageWarning")
def test_what_is_not_covered_says_why() -> None:
    model = attach(Odd(), Policy(accumulator=ACC))
    table = coverage(model, torch.randn(4, 4, 4))
    assert [(row.layer, row.product, row.covered, row.reason) for row in table] == [
        ("", "einsum", False, "an index is repeated in one operand"),
        ("", "matmul", False, "float64 operands"),
        ("", "cdist", False, "a fused kernel computes it as a whole"),
        ("", "matmul", False, "one step (K = 1): nothing is summed"),
        ("", "_trilinear", False, "a fused kernel computes it as a whole"),
    ]
    assert table.share == 0
    assert "of unknown size" in str(table)


def test_no_warning_while_the_table_is_made(recwarn) -> None:
    model = attach(Odd(), Policy(accumulator=ACC))
    with pytest.warns(FmaqCoverageWarning):
        model(torch.randn(4, 4, 4))
    recwarn.clear()
    coverage(model, torch.randn(4, 4, 4))
    assert not [w for w in recwarn if issubclass(w.category, FmaqCoverageWarning)]


def test_custom_operators_and_hidden_products_are_found() -> None:
    @torch.library.custom_op("fmaq_test::product", mutates_args=())
    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a @ b

    class Custom(nn.Module):
        def forward(self, x):
            with torch._C.DisableTorchFunction():
                x = x @ x
            return product(x, x)

    table = coverage(attach(Custom(), Policy(accumulator=ACC)), torch.randn(3, 3))
    assert [(row.product, row.reason) for row in table] == [
        ("mm", "called where no handler meets it"),
        ("fmaq_test::product", "what a custom operator computes is unknown"),
    ]


def test_torchscript_is_found() -> None:
    with pytest.warns(FmaqCoverageWarning, match="TorchScript"):
        model = attach(nn.Sequential(torch.jit.script(nn.Linear(3, 3))), Policy(accumulator=ACC))
    table = coverage(model, torch.randn(2, 3))
    assert [row.covered for row in table] == [False]


def test_coverage_lets_others_listen() -> None:
    heard = []
    with listening(heard.append):
        table = coverage(attached(), torch.ones(1, 2, 4, 4))
    assert len(heard) == sum(row.calls for row in table) == 6


def test_errors_of_the_forward_come_through() -> None:
    model = attached().train()
    with pytest.raises((RuntimeError, ValueError), match="3"):
        coverage(model, torch.ones(1, 3, 4, 4))
    assert model.norm.num_batches_tracked == 0
    assert torch.overrides._get_current_function_mode_stack() == []
