"""Imports between the packages, and the modules beside them, point one way."""

import ast
from pathlib import Path

import fmaq

ORDER = [
    *("cache_folder", "whole_files"),
    *("numerics", "hardware", "kernels", "ops", "emulation", "onnx", "analysis"),
    *("training", "recipes", "report", "bench", "reproduce", "cli"),
]
"""Each may import those before it."""

ENTRANCES = {"__init__", "__main__"}


def test_imports_point_one_way() -> None:
    root = Path(fmaq.__file__).parent
    files = {part: sorted((root / part).rglob("*.py")) or [root / f"{part}.py"] for part in ORDER}
    assert {path for paths in files.values() for path in paths} == {
        path for path in root.rglob("*.py") if path.parent != root or path.stem not in ENTRANCES
    }
    wrong = []
    for part, paths in files.items():
        for path in paths:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                found = [name.split(".")[1] for name in names if name.startswith("fmaq.")]
                wrong += [
                    f"{path.relative_to(root)}, line {node.lineno}: {name}"
                    for name in found
                    if ORDER.index(name) > ORDER.index(part)
                ]
    assert not wrong
