"""Imports between the packages point one way."""

import ast
from pathlib import Path

import fmaq

ORDER = [
    *("numerics", "hardware", "kernels", "ops", "emulation", "onnx", "analysis"),
    *("training", "recipes", "report", "bench", "reproduce", "cli"),
]
"""Each may import those before it."""


def test_imports_point_one_way() -> None:
    root = Path(fmaq.__file__).parent
    assert {path.name for path in root.iterdir() if (path / "__init__.py").exists()} == set(ORDER)
    wrong = []
    for package in ORDER:
        for path in sorted((root / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                found = [name.split(".")[1] for name in names if name.startswith("fmaq.")]
                wrong += [
                    f"{path.relative_to(root)}, line {node.lineno}: {name}"
                    for name in found
                    if ORDER.index(name) > ORDER.index(package)
                ]
    assert not wrong
