"""Attention whose keys are shared by groups of heads: what was chosen by head holds however a model repeats them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fmaq
from fmaq.emulation import attach

B, HEADS, GROUPS, LENGTH, WIDTH = 2, 4, 2, 5, 8


class Attention(nn.Module):
    """As transformers calls it: with shared keys, or with keys that were repeated before."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, repeated: bool = False) -> torch.Tensor:
        if not repeated:
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        k, v = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v)


@pytest.fixture
def operands() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    scale = torch.tensor([1.0, 30.0])[:, None, None]
    q = torch.randn(B, HEADS, LENGTH, WIDTH)
    return q, torch.randn(B, GROUPS, LENGTH, WIDTH) * scale, torch.randn(B, GROUPS, LENGTH, WIDTH) * scale


@pytest.mark.parametrize("calibrated_on_repeated", [False, True])
def test_what_one_way_was_calibrated_for_serves_the_other(operands, calibrated_on_repeated) -> None:
    model = Attention()
    exact = model(*operands)
    batch = {"q": operands[0], "k": operands[1], "v": operands[2], "repeated": calibrated_on_repeated}
    policy = fmaq.calibrate(model, "M5E4 product=M5E4", [batch])
    heads = HEADS if calibrated_on_repeated else GROUPS
    products = policy.layers[""]["products"]
    assert any((entry["gain"] is not None and entry["gain"].shape == (heads, 1)) for entry in products.values())
    attach(model, policy)
    with fmaq.observe(model) as events:
        found = [model(*operands, repeated) for repeated in (False, True)]
    assert torch.equal(*found)
    assert len(events) == 2 and all(one.snr > 25 for one in events.values())
    assert float((found[0] - exact).square().sum() / exact.square().sum()) < 1e-2


def test_other_numbers_of_heads_are_an_error(operands) -> None:
    model = attach(Attention(), fmaq.Policy("paper12", products={"attention_scores": {"gain": [[1.0], [1.0], [2.0]]}}))
    with pytest.raises(ValueError, match="attention_scores in the model itself: gain must be a number"):
        model(*operands)
