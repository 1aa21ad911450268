"""observe: counts equal the reference's, ranges and histograms are right, and outputs stay what they are."""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import fmaq
from fmaq.analysis import Observed
from fmaq.analysis.events_shown import draw, short_names
from fmaq.kernels import Geometry
from fmaq.numerics import Accumulator, reference
from test_kernels_conv import unfolded

ACC = Accumulator("M3E3b4 product=M3E3b5 chunk=5")
EVENT_NAMES = (*reference.EVENTS, *(f"merge_{event}" for event in reference.EVENTS))


def attached(module: nn.Module, policy=ACC) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return fmaq.attach(module.eval(), policy)


def assert_counts(found, a: np.ndarray, b: np.ndarray, times: int = 1) -> None:
    expected = reference.count_events(a, b, ACC)
    assert {name: found[name] for name in EVENT_NAMES} == {name: times * expected[name] for name in EVENT_NAMES}
    assert (found.steps, found.merges) == (times * expected["steps"], times * expected["merges"])


def test_counts_of_a_linear_layer_are_the_references_and_add_up_over_calls():
    model, x = attached(nn.Sequential(nn.Linear(23, 7))), torch.randn(6, 23)
    with torch.no_grad():
        plain = model(x)
        with fmaq.observe(model) as events:
            assert torch.equal(model(x), plain) and torch.equal(model(x), plain)
    assert list(events) == ["0"] and events["0"].calls == 2 and events["0"].sampled == 1
    assert_counts(events["0"], x.numpy(), model[0].weight.detach().numpy().T, times=2)
    assert events["0"].partial_swamping > 0
    assert events["0"].rate("partial_swamping") == events["0"].partial_swamping / events["0"].steps


def test_counts_of_a_convolution_are_the_references():
    model, x = attached(nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1))), torch.randn(2, 3, 7, 6)
    with torch.no_grad(), fmaq.observe(model) as events:
        model(x)
    windows, _ = unfolded(x.numpy(), (3, 3), Geometry((2, 2), (1, 1), (1, 1)))
    assert_counts(events["0"], windows, model[0].weight.detach().flatten(1).numpy().T)


@pytest.mark.parametrize("steps", [None, 5000])
def test_the_share_of_a_transposed_convolution_is_never_above_one(steps):
    model, x = attached(nn.Sequential(nn.ConvTranspose2d(4, 4, 3, stride=2))), torch.randn(2, 4, 9, 9)
    with torch.no_grad(), fmaq.observe(model, steps) as events:
        model(x)
    outputs = 2 * 4 * 19 * 19 * 4 * 9
    assert events["0"].all_steps == outputs and events["0"].sampled == events["0"].steps / outputs
    assert events["0"].sampled == 1 if steps is None else 0 < events["0"].sampled < 0.5


def test_narrow_operands_are_observed_and_calibrated():
    model = fmaq.attach(nn.Linear(16, 4).to(torch.float8_e4m3fn), "paper12")
    x = torch.randn(32, 16).to(torch.float8_e4m3fn)
    with torch.no_grad():
        plain = model(x)
        with fmaq.observe(model) as events:
            assert torch.equal(model(x).float(), plain.float())
        policy = fmaq.calibrate(model, "M7E4 product=M7E4", [x])
    assert events[""].snr > 30 and policy.for_layer("").gain is not None


def test_noise_is_against_float32_under_autocast_too():
    model, x = attached(nn.Sequential(nn.Linear(64, 8)), "M20E7b63"), torch.randn(16, 64).bfloat16().float()
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight.bfloat16())
        with fmaq.observe(model) as plain:
            model(x)
        with torch.autocast("cpu", torch.bfloat16), fmaq.observe(model) as autocast:
            model(x)
    assert autocast["0"].snr == pytest.approx(plain["0"].snr) and plain["0"].snr > 90


def deep_model() -> nn.Module:
    """23 blocks of two linear layers under a long name, and products of attention: 93 in all."""
    block = nn.ModuleDict({"attention": Attention(), "gate_projection": nn.Linear(4, 4), "down": nn.Linear(4, 4)})

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.ModuleDict({"layers": nn.ModuleList(copy.deepcopy(block) for _ in range(23))})
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            for block in self.model["layers"]:
                x = block["attention"](x, x, x) + block["down"](torch.tanh(block["gate_projection"](x)))
            return self.head(x)

    return attached(Deep())


@pytest.fixture(scope="module")
def deep() -> Observed:
    model = deep_model()
    with torch.no_grad(), fmaq.observe(model) as events:
        model(torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(1)))
    return events


def test_what_was_observed_prints_its_table(monkeypatch):
    model = attached(nn.Sequential(nn.Linear(8, 4)))
    with torch.no_grad(), fmaq.observe(model, steps=8 * 8) as events:
        model(torch.randn(3, 8))
    text = str(events)
    for part in ("M3E3b4", "looked", "swamp", "per cent of the steps", f"{100 * events['0'].sampled:.3g} %"):
        assert part in text
    assert f" {100 * events['0'].rate('partial_swamping'):.1f} " in text


def test_the_repr_is_short(deep):
    assert repr(deep).startswith("Observed of 93 products: 'model.layers.0.attention:attention_scores', ")
    assert repr(deep).endswith(" and 87 more")
    with pytest.raises(KeyError, match=r"did you mean 'model.layers.3.down'\? There are .* and 87 more"):
        deep["layers.3.down"]


@pytest.mark.parametrize("columns", [80, 100, 150])
def test_the_table_has_a_line_for_each_product_and_fits_the_terminal(deep, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = str(deep).splitlines()
    rows = [line.split() for line in lines[4:-3]]
    assert max(map(len, lines)) <= columns and len(rows) == len(deep) == 93
    assert len({row[0] for row in rows}) == 93, "short names tell the products apart"
    for row, (name, found) in zip(rows, deep.items(), strict=True):
        assert row[0] == name or len(name) > 16
        assert row[0][-6:] == name[-6:], "the end of a name stays"
        assert row[-1] == f"{found.snr:.1f}"
    if columns == 150:
        assert [row[0] for row in rows] == list(deep)


@pytest.mark.parametrize(
    ("names", "longest", "short"),
    [
        (["model.layers.17.mlp.down", "model.layers.18.mlp.down"], 24, None),
        (["model.layers.17.mlp.down", "model.layers.18.mlp.down"], 18, ["m.l.17.mlp.down", "m.l.18.mlp.down"]),
        (["model.layers.17.mlp.down", "head"], 13, ["m.l.17.m.down", "head"]),
        (["a.attention:attention_scores", "a.attention:attention_values"], 15, ["a.atten…_scores", "a.atten…_values"]),
        (["abc.x", "acd.x"], 3, ["abc.x", "acd.x"]),
    ],
)
def test_short_names(names, longest, short):
    assert short_names(names, longest) == (short or names)


def test_tables_tell_the_products_of_a_layer_apart(deep):
    pytest.importorskip("pandas")
    for frame in (deep.to_dataframe(), deep.histograms()):
        keys = frame[["product", "layer", "kind", "index"]].drop_duplicates()
        assert list(keys["product"]) == list(deep) and len(keys) == 93
        assert not keys.duplicated(["layer", "kind", "index"]).any()
    counts = deep.histograms().groupby(["product", "part"])["count"].sum()
    for name, found in deep.items():
        assert counts[name, "output"] == sum(found.exponents["output"].values())


def test_the_plot_shows_the_worst_and_says_so(deep, tmp_path):
    """Its height is bounded; nothing lies over the bars, and no label is cut off."""
    pytest.importorskip("matplotlib")
    from PIL import Image

    with Image.open(deep.plot(tmp_path / "events.png")) as image:
        assert image.size[1] <= 1210
    figure = draw(deep)
    figure.draw_without_rendering()
    ratios = {name: found.snr for name, found in deep.items()}
    lowest = sorted(ratios.values())[:40]
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert figure.get_suptitle() == "40 of 93 products, those with the lowest signal-to-noise ratio"
    assert labels == short_names([name for name in deep if ratios[name] <= lowest[-1]], 40)
    legend = figure.axes[2].get_legend().get_window_extent()
    assert legend.y0 >= figure.axes[2].get_window_extent().y1
    for label in figure.axes[0].get_yticklabels():
        assert label.get_window_extent().x0 >= 0
    shown = [text.get_text() for text in figure.axes[0].texts]
    first = deep[next(name for name in deep if ratios[name] <= lowest[-1])]
    rates = [100 * first.rate(event) for event in reference.EVENTS if first.rate(event)]
    wanted = ["<.001" if rate < 1e-3 else f"{rate:.1f}" if rate >= 10 else f"{rate:.2g}" for rate in rates]
    assert shown[: len(wanted)] == wanted, "each in a cell of its own, however small"


def test_a_small_model_is_shown_whole():
    pytest.importorskip("matplotlib")
    model = attached(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3)))
    with torch.no_grad(), fmaq.observe(model) as events:
        model(torch.zeros(4, 8))
    figure = draw(events)
    assert figure.get_suptitle() == "" and figure.axes[1].texts[0].get_text().strip() == "exact"
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["0", "1"]


def test_products_that_no_call_had_are_named():
    entry = {"products": {1: {"accumulator": "fp32"}, 7: {"gain": 1.5}, "linear": {"gain": 1.5}}}
    model, (q, k, v) = (
        attached(nn.Sequential(Attention()), fmaq.Policy(ACC, layers={"0": entry})),
        torch.randn(3, 1, 1, 5, 8),
    )
    text = "layers: '0': products: {}; there are 0 (attention_scores), 1 (attention_values)"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with fmaq.observe(model):
            model[0](q, k, v)
        fmaq.coverage(model[0], q, k, v)
    assert [str(warning.message) for warning in caught] == [
        f"{begins} {text.format(key)}"
        for begins in ("observe: no call had", "coverage: no call had")
        for key in ("7", "'linear'")
    ]


class Attention(nn.Module):
    def forward(self, q, k, v):
        return nn.functional.scaled_dot_product_attention(q, k, v)


def test_attention_has_two_products():
    model, (q, k, v) = attached(Attention()), torch.randn(3, 1, 1, 5, 8)
    with torch.no_grad(), fmaq.observe(model) as events:
        model(q, k, v)
    assert list(events) == [":attention_scores", ":attention_values"]
    assert_counts(events[":attention_scores"], q[0, 0].numpy(), k[0, 0].numpy().T)
    weights = torch.softmax(fmaq.matmul(q, k.mT, ACC) * 8**-0.5, -1)
    assert_counts(events[":attention_values"], weights[0, 0].numpy(), v[0, 0].numpy())


def test_offsets_are_part_of_what_is_observed():
    offset = [0, 3, -2, 1, 0, 0, 5]
    model = attached(nn.Linear(23, 7), {"accumulator": ACC, "offset": offset})
    x = torch.randn(6, 23)
    with torch.no_grad(), fmaq.observe(model) as events:
        model(x)
    scaled = model.weight.detach().numpy().T * 2.0 ** np.array(offset)
    assert_counts(events[""], x.numpy(), scaled.astype(np.float32))


def test_by_token_the_counts_are_those_of_scaled_rows():
    model = attached(nn.Sequential(nn.Linear(23, 7)), {"accumulator": ACC, "per_token": True})
    sizes = 2.0 ** torch.tensor([0, 5, -3, 1, -8, 2])[:, None]
    x = (torch.rand(6, 23) + 1) * sizes  # so that each row's largest exponent is that of its size
    with torch.no_grad(), fmaq.observe(model) as events:
        y = model(x)
    assert_counts(events["0"], (x / sizes).numpy(), model[0].weight.detach().numpy().T)
    wanted = x @ model[0].weight.detach().T
    noise = (y - model[0].bias.detach() - wanted).square().sum() / wanted.square().sum()
    assert events["0"].noise / events["0"].signal == pytest.approx(float(noise), rel=1e-3)


def test_by_token_a_sampled_convolution_knows_its_images():
    """Bands of images are looked at; the exponent is that of the whole image all the same."""
    images = torch.randn(4, 3, 16, 16) * torch.tensor([1e-3, 1.0, 1e3, 1.0])[:, None, None, None]
    images[:, :, 8, 8] *= 50
    options = {"accumulator": ACC, "per_token": True}
    model = attached(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)), options)
    signals = []
    for scale in (1.0, 2.0**20):  # an image's size does not matter
        with torch.no_grad(), fmaq.observe(model, steps=2000) as events:
            model(images * scale)
        signals.append([events["0"][name] for name in EVENT_NAMES])
    assert events["0"].sampled < 1 and signals[0] == signals[1] and sum(signals[0]) > 0


def test_ranges_histograms_and_noise():
    model, x = attached(nn.Linear(4, 2, bias=False)), torch.tensor([[4.0, 0.0, -0.5, 0.25]])
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.5]]))
        with fmaq.observe(model) as events:
            y = model(x)
    found = events[""]
    assert found.largest["a"] == 4 and found.smallest["a"] == 0.25
    assert found.exponents["a"] == {None: 1, 2: 1, -1: 1, -2: 1}
    assert found.exponents["product"] == {None: 4, 2: 1, -1: 1, -2: 1, -3: 1}
    exact = x @ model.weight.detach().mT
    assert found.signal == pytest.approx(float(exact.square().sum()))
    assert found.noise == pytest.approx(float((exact - y).square().sum()))
    assert math.isfinite(found.snr) == (found.noise > 0)


def test_large_products_are_sampled_evenly_and_say_so():
    model, x = attached(nn.Linear(64, 32)), torch.randn(200, 64)
    with torch.no_grad(), fmaq.observe(model, steps=64 * 32 * 20) as events:
        model(x)
    assert events[""].sampled == pytest.approx(0.1, abs=0.02)
    with torch.no_grad(), fmaq.observe(model, steps=None) as every:
        model(x)
    assert every[""].sampled == 1 and every[""].steps == 200 * 64 * 32
    assert events[""].rate("partial_swamping") == pytest.approx(every[""].rate("partial_swamping"), rel=0.1)


def test_samples_are_even_and_nothing_is_no_trouble():
    model = attached(nn.Sequential(nn.Linear(32, 8)), Accumulator("M7E4b8 product=M7E4b8"))
    x = torch.randn(4000, 32)
    x[::40] *= 200
    rates = []
    with torch.no_grad():
        for steps in (None, 32 * 8 * 1000):
            with fmaq.observe(model, steps=steps) as events:
                model(x)
                model(x[:0])
            rates.append(events["0"].rate("product_overflow"))
    assert rates[1] == pytest.approx(rates[0], rel=0.5)


def test_tables_and_plot(tmp_path):
    pytest.importorskip("pandas")
    model = attached(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)))
    with torch.no_grad(), fmaq.observe(model) as events:
        model(torch.randn(4, 8))
    frame = events.to_dataframe()
    assert set(frame.layer) == {"0", "2"} and len(frame) == 2 * len(EVENT_NAMES)
    row = frame[(frame.layer == "2") & (frame.event == "product_underflow")].iloc[0]
    assert row["count"] == events["2"].product_underflow and row["of"] == 4 * 6 * 3
    assert set(events.histograms().part) == {"a", "b", "product", "sum", "output"}
    assert events.table().row_count == 2
    assert events.plot(tmp_path / "events.png").stat().st_size > 1000


def test_bad_input_is_named():
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"call fmaq.attach\(model, policy\) before"), fmaq.observe(model):
        pass
    with pytest.raises(TypeError, match="got int"), fmaq.observe(3):
        pass
    fmaq.attach(model, ACC)
    for steps in ("x", 1.5, True):
        with pytest.raises(ValueError, match="steps must be a positive number"), fmaq.observe(model, steps=steps):
            pass
    with pytest.raises(ValueError, match=r"steps must be a positive number.*got 0"), fmaq.observe(model, steps=0):
        pass
    with fmaq.observe(model) as events:
        pass
    with pytest.raises(KeyError, match="call the model inside"):
        events["fc"]
    with fmaq.observe(model) as events:
        model(torch.ones(1, 3))
    with pytest.raises(AttributeError, match="no event 'overflow'"):
        _ = events[""].overflow


def test_merges_of_all_levels_are_counted_and_the_table_says_so() -> None:
    acc = fmaq.Accumulator("M3E4b8h product=M4E4b9h chunk=3 outer=(M3E4b6 chunk=2 outer=fp32)")
    model, x = nn.Linear(23, 7, bias=False), torch.randn(6, 23)
    fmaq.attach(model, acc)
    with torch.no_grad(), fmaq.observe(model) as observed:
        model(x)
    expected = reference.count_events(x.numpy(), model.weight.detach().numpy().T, acc)
    found = observed[""]
    assert {name: found[name] for name in EVENT_NAMES} == {name: expected[name] for name in EVENT_NAMES}
    assert (found.steps, found.merges) == (expected["steps"], expected["merges"]) == (6 * 7 * 23, 6 * 7 * (8 + 4))
    assert found.rate("merge_partial_swamping") == expected["merge_partial_swamping"] / expected["merges"] > 0
    assert "merges, of all levels, are counted apart" in " ".join(str(observed).split())
