"""YAML as its writer means it: scalars of YAML 1.2, keys as written; what is written reads back in either version."""

from __future__ import annotations

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fmaq.emulation.yaml_text import dump_yaml, load_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("-1.5E+3", -1500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.inf", -math.inf),
        ("+12", 12),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("1_000", 1000),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("", None),
        ("on", "on"),
        ("No", "No"),
        ("yes", "yes"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("1.2.3", "1.2.3"),
        ("'1e-3'", "1e-3"),
        ("M7E4b10", "M7E4b10"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    read, _ = load_yaml(f"key: {text}\n")
    assert read == {"key": value} and type(read["key"]) is type(value)


def test_keys_are_as_written_unless_whole_numbers() -> None:
    text = "{2.10: a, on: b, null: c, true: d, 1e3: e, 010: f, 0: g, -1: h, '7': i, 12: j}"
    names = ["2.10", "on", "null", "true", "1e3", "010", 0, -1, "7", 12]
    assert load_yaml(text)[0] == dict(zip(names, "abcdefghij", strict=True))


def test_a_key_given_twice_is_refused_however_it_is_written() -> None:
    for text in ("{a: 1, a: 2}", "{x: [{0: 1, '0': 2}]}"):
        with pytest.raises(yaml.YAMLError, match="is given twice"):
            load_yaml(text)


def test_merge_keys_still_merge() -> None:
    assert load_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n")[0]["b"] == {"x": 1, "y": 3}


TEXTS = st.text(max_size=8) | st.from_regex(r"[-+.0-9eEoxb_:nNyY~]{1,6}", fullmatch=True)
NUMBERS = st.integers() | st.floats(allow_nan=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@given(VALUES)
def test_what_is_written_reads_back_in_either_version(value: object) -> None:
    text = dump_yaml({"value": value})
    assert load_yaml(text)[0] == {"value": value} == yaml.safe_load(text)
