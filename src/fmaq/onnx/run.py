"""Running ONNX models that have operators of the domain `fmaq`: onnxruntime, with our kernels for them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import onnxruntime

from fmaq.onnx.operators import DOMAIN, NUMBER, OPERATORS, Operator


def session(path: str | Path, options: onnxruntime.SessionOptions | None = None, **how: Any) -> Any:
    """An `onnxruntime.InferenceSession` of a model, whose operators of the domain `fmaq` are computed by fmaq.

    Its outputs have the bits that torch's have where the rest of the model, onnxruntime's own, has them.

    Args:
        path: of the model, such as `export` writes.
        options, how: as `InferenceSession` takes them; providers are the CPU's unless given.

    Raises:
        FileNotFoundError: there is none.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no ONNX model {path}; fmaq.onnx.export(model, args, path) writes one")
    options = options or onnxruntime.SessionOptions()
    options.register_custom_ops_library(_library())
    return onnxruntime.InferenceSession(str(path), options, **{"providers": ["CPUExecutionProvider"]} | how)


@functools.cache
def _library() -> str:
    """The library that hands operators to Python, which knows ours from now on."""
    import onnxruntime_extensions as extensions

    for operator in OPERATORS:
        _define(operator, extensions)
    return str(extensions.get_library_path())


def _define(operator: Operator, extensions: Any) -> None:
    definition = extensions.PyCustomOpDef
    types = {
        "tensor(float)": definition.dt_float,
        "tensor(double)": definition.dt_double,
        "tensor(int32)": definition.dt_int32,
    }
    extensions.onnx_op(
        op_type=f"{DOMAIN}::{operator.name}",
        inputs=[types[t] for t in operator.inputs.values()],
        outputs=[types[t] for t in operator.outputs.values()],
        attrs={n: definition.dt_int64 if k == NUMBER else definition.dt_string for n, k in operator.attributes.items()},
    )(operator.on_arrays)
