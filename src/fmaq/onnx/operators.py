"""The operators of the ONNX domain `fmaq`, version 1: what each takes, what it is in torch, and how it is computed.

An accumulator is an attribute, in the words of `str(accumulator)` ("M7E4b10 product=M7E4b12 chunk=16"). What a product
needs for its gradients is left out.

| operator | inputs | attributes | output |
|---|---|---|---|
| `MatMul` | a (B, M, K), b (B, K, N) | accumulator, seed | (B, M, N) |
| `Conv` | x (N, C, *spatial), w (O, C/groups, *kernel) | accumulator, seed, geometry | (N, O, *out) |
| `Quantize` | x, amax (empty: the largest magnitudes of x) | format, channel (−1: one range) | like x |
| `IntegerCodes` | x, amax | bits, channel | codes like x, their scale in float64 |
| `PowersOfTwo` | offset, int32 | sign | 2^(sign·offset) |
| `TokenPowers` | a | dims | 2^−⌊log2 max|a|⌋ over dimensions such as "-2,-1", which become 1 |
| `TimesPowers` | b, powers that broadcast to it | | b·powers |

`geometry` is a line such as "stride=2,1 padding=1,0 dilation=1,1 groups=2": the sides of a window in order, zeros on
either side. All tensors but those named are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx.defs import OpSchema
from onnxscript.values import Opset
from torch import Tensor

DOMAIN, VERSION = "fmaq", 1
STANDARD = Opset("", 18)
FLOAT, DOUBLE, INT = "tensor(float)", "tensor(double)", "tensor(int32)"
TEXT, NUMBER = OpSchema.AttrType.STRING, OpSchema.AttrType.INT


@dataclass(frozen=True)
class Operator:
    """One operator of the domain.

    Attributes:
        name: in ONNX.
        torch: the same in `torch.ops.fmaq`.
        inputs, outputs: types by name.
        attributes: kinds by name.
        compute: of torch tensors and the attributes; what `torch` gives.
        translate: what torch's exporter is told to write for `torch`, of its arguments.
    """

    name: str
    torch: Any
    inputs: dict[str, str]
    outputs: dict[str, str]
    attributes: dict[str, Any]
    compute: Callable[..., Any]
    translate: Callable[..., Any]

    @property
    def schema(self) -> OpSchema:
        """As ONNX has it."""
        parameters = [[OpSchema.FormalParameter(n, t) for n, t in side.items()] for side in (self.inputs, self.outputs)]
        attributes = [OpSchema.Attribute(name, kind, name) for name, kind in self.attributes.items()]
        return OpSchema(self.name, DOMAIN, VERSION, inputs=parameters[0], outputs=parameters[1], attributes=attributes)

    def on_arrays(self, *arrays: np.ndarray, **attributes: Any) -> Any:
        """The operator on NumPy arrays."""
        with torch.no_grad():
            result = self.compute(
                *(torch.from_numpy(np.require(x, requirements=("C", "W"))) for x in arrays), **attributes
            )
        return result.numpy() if isinstance(result, Tensor) else tuple(x.numpy() for x in result)


def _geometry(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> str:
    parts = {"stride": stride, "padding": padding, "dilation": dilation, "groups": (groups,)}
    return " ".join(f"{name}={','.join(map(str, values))}" for name, values in parts.items())


def _conv(x: Tensor, w: Tensor, accumulator: str, seed: int, geometry: str) -> Tensor:
    read = {name: list(map(int, values.split(","))) for name, values in (part.split("=") for part in geometry.split())}
    where = read["stride"], read["padding"], read["dilation"], read["groups"][0]
    return torch.ops.fmaq.convolution(x, w, *where, accumulator, seed)


def _ranged(function: Any) -> Callable[..., Any]:
    """A function of x, its format, a channel and a range, with amax and channel as ONNX has them."""

    def compute(x: Tensor, amax: Tensor, channel: int, **format: Any) -> Any:
        at = None if channel < 0 else channel
        given = None if amax.numel() == 0 else amax if at is not None else amax.reshape(())
        return function(x, *format.values(), at, given)

    return compute


_OURS = Opset(DOMAIN, VERSION)


def _matmul(a: Any, b: Any, accumulator: str, seed: int, *_: Any, **__: Any) -> Any:
    return _OURS.MatMul(a, b, accumulator=accumulator, seed=seed)


def _convolution(x: Any, w: Any, *options: Any, **_: Any) -> Any:
    accumulator, seed = options[4:6]
    return _OURS.Conv(x, w, accumulator=accumulator, seed=seed, geometry=_geometry(*options[:4]))


def _range(amax: Any) -> Any:
    if amax is None:
        return STANDARD.Constant(value=onnx.helper.make_tensor("nothing", onnx.TensorProto.FLOAT, [0], []))
    return STANDARD.Reshape(amax, STANDARD.Constant(value_ints=[-1]))


def _quantize(x: Any, format: str, channel: int | None = None, amax: Any = None) -> Any:
    return _OURS.Quantize(x, _range(amax), format=format, channel=_channel(x, channel))


def _integer_codes(x: Any, bits: int, channel: int | None = None, amax: Any = None) -> Any:
    return _OURS.IntegerCodes(x, _range(amax), bits=bits, channel=_channel(x, channel))


def _channel(x: Any, channel: int | None) -> int:
    return -1 if channel is None else channel % len(x.shape)


def _powers_of_two(offset: Any, sign: int) -> Any:
    return _OURS.PowersOfTwo(STANDARD.Cast(offset, to=onnx.TensorProto.INT32), sign=sign)


def _token_powers(a: Any, dims: Sequence[int]) -> Any:
    return _OURS.TokenPowers(a, dims=",".join(map(str, dims)))


def _times_powers(b: Any, powers: Any) -> Any:
    return _OURS.TimesPowers(b, powers)


OPERATORS = (
    Operator(
        "MatMul",
        torch.ops.fmaq.matmul.default,
        {"a": FLOAT, "b": FLOAT},
        {"y": FLOAT},
        {"accumulator": TEXT, "seed": NUMBER},
        torch.ops.fmaq.matmul,
        _matmul,
    ),
    Operator(
        "Conv",
        torch.ops.fmaq.convolution.default,
        {"x": FLOAT, "w": FLOAT},
        {"y": FLOAT},
        {"accumulator": TEXT, "seed": NUMBER, "geometry": TEXT},
        _conv,
        _convolution,
    ),
    Operator(
        "Quantize",
        torch.ops.fmaq.quantize.default,
        {"x": FLOAT, "amax": FLOAT},
        {"y": FLOAT},
        {"format": TEXT, "channel": NUMBER},
        _ranged(torch.ops.fmaq.quantize),
        _quantize,
    ),
    Operator(
        "IntegerCodes",
        torch.ops.fmaq.integer_codes.default,
        {"x": FLOAT, "amax": FLOAT},
        {"codes": FLOAT, "scale": DOUBLE},
        {"bits": NUMBER, "channel": NUMBER},
        _ranged(torch.ops.fmaq.integer_codes),
        _integer_codes,
    ),
    Operator(
        "PowersOfTwo",
        torch.ops.fmaq.powers_of_two.default,
        {"offset": INT},
        {"y": FLOAT},
        {"sign": NUMBER},
        torch.ops.fmaq.powers_of_two,
        _powers_of_two,
    ),
    Operator(
        "TokenPowers",
        torch.ops.fmaq.token_powers.default,
        {"a": FLOAT},
        {"y": FLOAT},
        {"dims": TEXT},
        lambda a, dims: torch.ops.fmaq.token_powers(a, list(map(int, dims.split(",")))),
        _token_powers,
    ),
    Operator(
        "TimesPowers",
        torch.ops.fmaq.times_powers.default,
        {"b": FLOAT, "powers": FLOAT},
        {"y": FLOAT},
        {},
        torch.ops.fmaq.times_powers,
        _times_powers,
    ),
)

TRANSLATIONS = {operator.torch: operator.translate for operator in OPERATORS}

for operator in OPERATORS:
    if not onnx.defs.has(operator.name, VERSION, DOMAIN):
        onnx.defs.register_schema(operator.schema)
