"""Accumulators: their strings and mappings, the paper's biases, and error messages."""

import copy
import dataclasses
import pickle

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fmaq.numerics import FLOAT32, ROUNDINGS, Accumulator, FixedFormat, FloatFormat, Level, paper_bias
from strategies import fresh_accumulators


@st.composite
def float_formats(draw):
    half_unit = draw(st.booleans())
    return FloatFormat(
        draw(st.integers(0, 23 - half_unit)),
        draw(st.integers(1, 8)),
        draw(st.none() | st.integers(-700, 700)),
        draw(st.sampled_from(["flag", "exponent"])),
        half_unit,
    )


fixed_formats = st.builds(FixedFormat, st.integers(2, 32), st.integers(-64, 64), st.sampled_from(["saturate", "wrap"]))
formats = st.one_of(float_formats(), fixed_formats)
accumulators = fresh_accumulators(
    formats, st.none() | formats, st.sampled_from(ROUNDINGS), chunks=(None, 1, 16, 2**31 - 1)
)


@given(accumulators)
def test_strings_and_mappings_read_back(acc):
    for description in (str(acc), str(acc).replace(" ", ", "), acc.to_mapping(), acc):
        assert Accumulator.parse(description) == acc
    assert hash(Accumulator(str(acc))) == hash(acc)
    assert yaml.safe_load(yaml.safe_dump(acc.to_mapping())) == acc.to_mapping()
    assert eval(repr(acc), {"Accumulator": Accumulator}) == acc


def test_defaults_are_those_of_the_design():
    acc = Accumulator("M7E4b10", product="M7E4b12")
    assert acc.format == FloatFormat(7, 4, 10)
    assert acc.product == FloatFormat(7, 4, 12)
    assert (acc.chunk, acc.rounding, acc.underflow) == (16, "toward_zero", True)
    assert acc == Accumulator.paper12 == Accumulator("paper12") == Accumulator.parse(" paper12 ")
    assert str(acc) == "M7E4b10 product=M7E4b12 chunk=16"
    assert acc.to_mapping() == {"format": "M7E4b10", "product": "M7E4b12"}
    assert acc.bits == 12
    assert Accumulator("M7E4b10").product is None


def test_every_way_to_write_one():
    acc = Accumulator(FloatFormat(5, 4, 6), FixedFormat(8, 2), None, "stochastic", False, 7, 9)
    words = "M5E4b6 product=I8f2 chunk=None rounding=stochastic underflow=False random_bits=7 seed=9"
    assert str(acc) == words
    assert Accumulator(words.replace(" ", ",").lower().replace("m5e4b6", "M5E4b6").replace("i8", "I8")) == acc
    assert Accumulator("format=" + words) == acc
    assert Accumulator({"format": "M5E4b6", "product": "I8f2", "chunk": None} | acc.to_mapping()) == acc
    assert Accumulator("M5E4b6 product=exact").product is None
    assert Accumulator("M5E4b6", product="none").product is None


def test_centred_is_true_or_false():
    assert Accumulator("M5E4b6 rounding=stochastic centred=true").centred
    assert not Accumulator("M5E4b6 rounding=stochastic centred=False").centred
    with pytest.raises(ValueError, match="centred must be True or False, got 'yes'"):
        Accumulator("M5E4b6 centred=yes")
    with pytest.raises(TypeError, match="centred must be True or False, got 1"):
        Accumulator("M5E4b6", centred=1)


def test_levels():
    def levels(description) -> list[tuple]:
        found = Accumulator.parse(description).levels
        return [(str(level.format), level.rounding, level.chunk) for level in found]

    assert levels("M5E4b10 rounding=odd") == [("M5E4b10", "odd", None)]
    assert levels("M5E4b10 rounding=odd outer=M10E5b16") == [("M10E5b16", "odd", None)]
    assert levels("M5E4b10 rounding=odd outer=M9E5b16h") == [("M9E5b16h", "toward_zero", None)]
    assert levels("M5E4b10 rounding=odd outer=fp32") == [("fp32", "nearest_even", None)]
    whole = "M5E4b10h outer=(M10E5b16 rounding=nearest_even chunk=8 outer=fp32)"
    assert levels(whole) == [("M10E5b16", "nearest_even", 8), ("fp32", "nearest_even", None)]
    assert levels("M5E4b10h outer=(M10E5b16 chunk=8)") == [
        ("M10E5b16", "toward_zero", 8),
        ("M10E5b16", "toward_zero", None),
    ]
    assert levels("M5E4b10h outer=(M10E5b16 chunk=None)") == [("M10E5b16", "toward_zero", None)]
    by_hand = Accumulator("M5E4b10h", outer=Accumulator("M10E5b16", chunk=8, rounding="nearest_even", outer="fp32"))
    assert (
        by_hand
        == Accumulator(whole)
        == Accumulator("M5E4b10h", outer={"format": "M10E5b16"} | by_hand.outer.to_mapping())
    )
    assert str(by_hand) == "M5E4b10h chunk=16 outer=(M10E5b16 chunk=8 rounding=nearest_even outer=fp32)"
    assert by_hand.bits == 10
    assert by_hand.outer.outer is FLOAT32 or by_hand.outer.outer == FLOAT32
    assert Accumulator("M5E4b10", outer="M10E5b16 chunk=8") == Accumulator("M5E4b10 outer=(M10E5b16, chunk=8)")
    assert Accumulator("M5E4b10 outer=none").outer is None
    stochastic = Accumulator("M5E4b10 outer=(M10E5b16 rounding=stochastic random_bits=3)")
    assert stochastic.levels[0] == Level(FloatFormat(10, 5, 16), "stochastic", 3, 16)
    assert stochastic.is_stochastic and not by_hand.is_stochastic
    assert Accumulator("M5E4b9 product=M5E4b11h rounding=stochastic").rounding_of_products == "toward_zero"
    assert Accumulator("M5E4b9 product=M5E4b11 product_rounding=stochastic").is_stochastic
    assert not Accumulator("M5E4b9 rounding=odd").is_stochastic


def test_merges_of_all_levels_are_counted():
    for text, wanted in (
        ("M5E4b10", [0, 1, 1, 2, 7]),
        ("M5E4b10 chunk=None", [0, 1, 1, 1, 1]),
        ("M5E4b10 outer=fp32", [0, 1, 1, 2, 7]),
        ("M5E4b10 outer=(M6E4b10 chunk=3)", [0, 2, 2, 3, 10]),
        ("M5E4b10 outer=(M6E4b10 chunk=None outer=fp32)", [0, 2, 2, 3, 8]),
    ):
        assert [Accumulator(text).merges(depth) for depth in (0, 1, 16, 17, 100)] == wanted


def test_an_accumulator_is_a_value():
    acc = Accumulator.paper12
    with pytest.raises(AttributeError):
        acc.chunk = 8
    assert dataclasses.replace(acc, chunk=8) == Accumulator("M7E4b10 product=M7E4b12 chunk=8")
    assert copy.deepcopy(acc) == acc == pickle.loads(pickle.dumps(acc))
    assert len({acc, Accumulator("paper12"), dataclasses.replace(acc, seed=1)}) == 2


@pytest.mark.parametrize(
    ("description", "error", "message"),
    [
        (
            {"format": "M7E4b10", "chunks": 8},
            ValueError,
            "has no 'chunks'; did you mean 'chunk'\\? It has: format, product",
        ),
        ({"format": "M7E4b10", "zzz": 8}, ValueError, "an accumulator has no 'zzz'\\. It has: format"),
        ({"product": "M7E4b10"}, ValueError, 'an accumulator needs a "format", like "M7E4b10"'),
        ("product=M7E4b10", ValueError, 'an accumulator needs a "format"'),
        ("M7E4b10 roundin=stochastic", ValueError, "no 'roundin'; did you mean 'rounding'\\?"),
        ("M7E4b10 chunk=16 M7E4b12", ValueError, "'M7E4b12' in accumulator .* is not name=value, like product=M7E4b12"),
        ("M7E4b10 chunk=3 chunk=4", ValueError, "chunk is given twice"),
        ("M7E4b10 format=M3E4b10", ValueError, "format is given twice"),
        ("M7E4b10 product=", ValueError, "'product=' in accumulator .* is not name=value"),
        ("M7E4b10 chunk=many", ValueError, "chunk must be an integer, got 'many'"),
        ("M7E4b10 seed=none", ValueError, "seed must be an integer, got 'none'"),
        ("M7E4b10 underflow=no", ValueError, "underflow must be True or False, got 'no'"),
        (
            "M7E4b10 rounding=nearest",
            ValueError,
            "rounding must be one of toward_zero.*; did you mean 'nearest_even'\\?",
        ),
        (
            "M7E4b10 rounding=ieee",
            ValueError,
            "rounding must be one of toward_zero, nearest_even, nearest_away, floor, half_up, odd, .* got 'ieee'",
        ),
        ("M7E4b10 chunk=0", ValueError, "chunk must be from 1 to 2147483647, got 0"),
        ("M7E4b10 random_bits=17", ValueError, "random_bits must be from 1 to 16, got 17"),
        ("M7E4b10 seed=-1", ValueError, "seed must be from 0 to 18446744073709551615, got -1"),
        ("M7E4b10 product=M7", ValueError, "'M7' is not a format"),
        ("paper13", ValueError, "'paper13' is not a format"),
        (
            "M5E4b10h rounding=nearest_even",
            ValueError,
            "rounding=nearest_even does not go with the half-unit format M5E4b10h, .* or write M5E4b10$",
        ),
        (
            "M5E4b10 product=M5E4b12h product_rounding=odd",
            ValueError,
            "product_rounding=odd does not go with the half-unit product M5E4b12h",
        ),
        ("M5E4b10 product_rounding=odd", ValueError, "product_rounding=odd rounds nothing: give a product format"),
        (
            "M5E4b10 product=M5E4b12 product_rounding=half_u",
            ValueError,
            "product_rounding must be one of toward_zero.*did you mean 'half_up'",
        ),
        ("M5E4b10 outer=fp23", ValueError, "outer is a format, .* did you mean 'fp32'\\? 'fp23' is not a format"),
        ("M5E4b10 outer=M10", ValueError, "outer is a format, an accumulator .*\"fp32\": 'M10' is not a format"),
        ("M5E4b10 outer=(M10E5b16", ValueError, "parentheses do not match in accumulator"),
        ("M5E4b10 outer=M10E5b16)", ValueError, "parentheses do not match in accumulator"),
        ("M5E4b10 outer=(M10E5b16 rouding=odd)", ValueError, "has no 'rouding'; did you mean 'rounding'"),
        ("M5E4b10 outer=(M10E5b16 product=M4E3b3)", ValueError, "product cannot be said of outer .*adds sums, not"),
        ("M5E4b10 outer=(M10E5b16 underflow=False)", ValueError, "underflow cannot be said of outer .*for all levels"),
        ("M5E4b10 outer=(M10E5b16 seed=3)", ValueError, "seed cannot be said of outer"),
        ("M5E4b10 outer=(M9E5b16h rounding=floor)", ValueError, "half-unit format M9E5b16h"),
        ({"format": "M7E4b10", "outer": 12}, TypeError, "a format is a name like.*got 12"),
        ("", ValueError, "'' is not a format"),
        ({"format": "M7E4b10", "chunk": "16"}, TypeError, "chunk must be an integer, got '16'"),
        ({"format": "M7E4b10", "chunk": 16.0}, TypeError, "chunk must be an integer, got 16.0"),
        ({"format": "M7E4b10", "underflow": "false"}, TypeError, "underflow must be True or False, got 'false'"),
        ({"format": "M7E4b10", "product": 12}, TypeError, "a format is a name like.*got 12"),
        (None, TypeError, "a format is a name like.*got None"),
    ],
)
def test_wrong_descriptions(description, error, message):
    with pytest.raises(error, match=message):
        Accumulator.parse(description)


@pytest.mark.parametrize("description", ["paper12", "M7E4b10 product=M7E4b12", {"format": "M7E4b10"}])
def test_arguments_beside_a_whole_description_are_refused_not_ignored(description):
    with pytest.raises(ValueError, match="chunk is given beside a whole description; write it inside"):
        Accumulator(description, chunk=8)


def test_templates_and_float32():
    assert Accumulator("M7E4").is_template
    assert Accumulator("M7E4b10", product="M7E4z").is_template
    assert Accumulator("M7E4b10", outer="M10E5h").is_template
    assert Accumulator("M7E4b10 outer=(M10E5b16 outer=M10E5)").is_template
    assert not Accumulator("M7E4b10 outer=(M10E5b16 outer=fp32)").is_template
    assert not Accumulator("I16f4").is_template
    assert not Accumulator.paper12.is_template
    with pytest.raises(ValueError, match='"M7E4" is a template'):
        Accumulator("M7E4").check_float32()
    with pytest.raises(ValueError, match='"M7E4z" is a template'):
        Accumulator("M7E4b10", product="M7E4z").check_float32()


@pytest.mark.parametrize(
    "name", ["M7E4b10", "M23E7b126", "M23E7b127z", "M23E7b0", "M7E4b-112", "M7E4b126", "I32f64", "I32f-64w"]
)
def test_float32_holds(name):
    Accumulator(name, product=name).check_float32()


@pytest.mark.parametrize(
    ("name", "exponents"),
    [
        ("M7E4b127", "-127 to -112"),
        ("M7E4b-113", "113 to 128"),
        ("M23E8b128z", "-127 to 127"),
        ("M0E1b127", "-127 to -126"),
    ],
)
def test_float32_does_not_hold(name, exponents):
    for acc, role in (
        (Accumulator(name), "accumulator"),
        (Accumulator("I16", product=name), "product"),
        (Accumulator("I16", outer=name), "outer"),
        (Accumulator(f"I16 outer=(I20 outer={name})"), "outer"),
    ):
        with pytest.raises(
            ValueError,
            match=f"{role} format {name} does not fit in float32: its exponents are {exponents}, float32's -126 to 127",
        ):
            acc.check_float32()


# --- The paper's bias rule --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("product", "chunk", "bias"), [(12, 16, 10), (12, 1, 12), (18, 16, 16), (12, 4, 11), (12, 8, 10), (12, 32, 9)]
)
def test_paper_bias(product, chunk, bias):
    assert paper_bias(product, chunk) == bias
    # b_acc ≤ b_prod − ½·log2(c) < b_acc + 1, without logarithms
    assert 4 ** (product - bias) >= chunk > 4 ** (product - bias) / 4


def test_paper_bias_needs_a_chunk():
    with pytest.raises(ValueError, match="chunk must be from 1 to"):
        paper_bias(12, 0)
    with pytest.raises(TypeError, match="chunk must be an integer, got None"):
        paper_bias(12, None)


def test_the_papers_accumulator_with_something_else():
    changed = Accumulator("paper12 chunk=32 rounding=nearest_even")
    assert changed == Accumulator("M7E4b10", product="M7E4b12", chunk=32, rounding="nearest_even")
