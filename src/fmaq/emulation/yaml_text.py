"""YAML as its writer means it: scalars by the core schema of YAML 1.2, keys as they are written.

PyYAML reads YAML 1.1, where `1e-3` is a text, `on` and `no` are true and false, `010` is eight and `1:30` is ninety;
and a layer named 2.10 would be the number 2.1. Here `1e-3` is a number, `on` a text, and a key is the text that stands
in the file, unless it is a whole number in its usual form. Policies, recipes and experiments are read alike.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

BOOLEAN = re.compile("true|True|TRUE|false|False|FALSE")
INTEGER = re.compile(r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
NULL = re.compile("null|Null|NULL|~|")
WHOLE_KEY = re.compile("0|-?[1-9][0-9]*")

SCALARS = (
    ("tag:yaml.org,2002:bool", BOOLEAN, "tTfF"),
    ("tag:yaml.org,2002:int", INTEGER, "-+0123456789"),
    ("tag:yaml.org,2002:float", FLOAT, "-+.0123456789"),
    ("tag:yaml.org,2002:null", NULL, ["n", "N", "~", ""]),
)
"""What a plain scalar may be beside a text, and its first characters; the first that matches counts."""


class Loader(yaml.SafeLoader):
    """Reads YAML 1.2's scalars, and YAML 1.1's merge keys (`<<`)."""

    yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}  # noqa: RUF012 (as in the base class)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            self.flatten_mapping(node)
            for at, (key, value) in enumerate(node.value):
                if isinstance(key, yaml.ScalarNode) and not WHOLE_KEY.fullmatch(key.value):
                    text = yaml.ScalarNode("tag:yaml.org,2002:str", key.value, key.start_mark, key.end_mark)
                    node.value[at] = (text, value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node).replace("_", "")
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        text = self.construct_scalar(node).replace("_", "").lower()
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))


class Dumper(yaml.SafeDumper):
    """Quotes a text that either YAML 1.1 or 1.2 would take for something else."""


for _tag, _pattern, _first in SCALARS:
    _whole = re.compile(f"(?:{_pattern.pattern})$")  # which PyYAML matches from the beginning
    Loader.add_implicit_resolver(_tag, _whole, list(_first))
    Dumper.add_implicit_resolver(_tag, _whole, list(_first))
Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
Loader.add_constructor("tag:yaml.org,2002:float", Loader.construct_yaml_float)


def load_yaml(text: str) -> tuple[Any, yaml.Node | None]:
    """The values of YAML text, and its nodes, which know their lines.

    Raises:
        yaml.YAMLError: it is not YAML, or a key is given twice, of which YAML itself would keep the last.
    """
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        _refuse_duplicates(node)
        values = None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()
    return values, node


def dump_yaml(value: Any) -> str:
    """Plain values as YAML text that `load_yaml`, and any reader of YAML 1.1, reads back."""
    return yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def _refuse_duplicates(node: yaml.Node | None) -> None:
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            name = str(key.value)
            if name in seen:
                problem = f"the key {name!r} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(name)
            _refuse_duplicates(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_duplicates(value)
