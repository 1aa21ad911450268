"""ONNX: attached models with their products as operators of the domain `fmaq`, a runner for them, and plain models."""

from fmaq.onnx.export import export
from fmaq.onnx.run import session

__all__ = ["export", "session"]
