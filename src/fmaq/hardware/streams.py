"""Streams of operands that a unit works on, in the order of time: what its energy is measured over.

A lane is one unit that sums one output after another element of its dot product (output-stationary): x, w and s change
at every step. s is what the reference makes of the lane's earlier steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fmaq.hardware.operands import FloatOperand, IntegerOperand, Operand
from fmaq.hardware.unit import IeeeFormat, Unit
from fmaq.hardware.vectors import Vectors
from fmaq.numerics import FloatFormat
from fmaq.numerics.reference import exact_sum, quantize, quantize_tensor

Values = NDArray[np.float64]

MAX_LANES, MAX_STEPS = 256, 256


@dataclass(frozen=True)
class Streams:
    """Operands of a layer, or artificial ones.

    Attributes:
        source: what they are, for tables.
        activations, weights: (steps, lanes), not yet quantized.
        are_codes: they are the integers of an integer engine already.
    """

    source: str
    activations: Values
    weights: Values
    are_codes: bool = False


def gaussian(steps: int = 128, lanes: int = 128, seed: int = 0) -> Streams:
    """Gaussian weights, and rectified Gaussian activations (half of them zero): an artificial layer."""
    rng = np.random.default_rng(seed)
    return Streams("gaussian", np.maximum(rng.standard_normal((steps, lanes)), 0), rng.standard_normal((steps, lanes)))


def of_layer(
    source: str, activations: ArrayLike, weights: ArrayLike, seed: int = 0, are_codes: bool = False
) -> Streams:
    """Lanes drawn from a layer's product of activations (M, K) and weights (N, K), recorded from a model.

    At most 256 outputs are drawn, without replacement, and the first 256 elements of each are taken.

    Raises:
        ValueError: the shapes do not fit.
    """
    a, w = np.asarray(activations, np.float64), np.asarray(weights, np.float64)
    if a.ndim != 2 or w.ndim != 2 or a.shape[1] != w.shape[1] or 0 in (*a.shape, *w.shape):
        raise ValueError(f"activations (M, K) and weights (N, K) are needed, got {a.shape} and {w.shape}")
    outputs = a.shape[0] * w.shape[0]
    chosen = np.random.default_rng(seed).choice(outputs, min(outputs, MAX_LANES), replace=False)
    rows, columns = np.divmod(chosen, w.shape[0])
    return Streams(source, a[rows, :MAX_STEPS].T, w[columns, :MAX_STEPS].T, are_codes)


def fit(unit: Unit, streams: Streams) -> Unit:
    """The unit whose float operands have the biases that these tensors' flexible quantization gives them.

    Their products then meet the accumulator's format at the magnitudes that they have in the model.
    """

    def fitted(operand: Operand, values: Values) -> Operand:
        largest = np.abs(values).max(initial=0.0)
        if isinstance(operand, IntegerOperand) or largest == 0:
            return operand
        return replace(operand, bias=2**operand.exponent - int(np.frexp(largest)[1]))

    return replace(
        unit, weight=fitted(unit.weight, streams.weights), activation=fitted(unit.activation, streams.activations)
    )


def trace(unit: Unit, streams: Streams, seed: int = 0, rescale: bool = True) -> Vectors:
    """Codes of every input port at every step, (steps, lanes).

    Args:
        rescale: bring the largest operand to the top of a float format's range, as a flexible bias does; without, the
            operands are quantized as they are, by the bias that the unit has.
    """
    steps, lanes = streams.weights.shape
    rng = np.random.default_rng(seed)
    x, w = streams.activations, streams.weights
    if not streams.are_codes:
        x, w = _quantized(x, unit.activation, rescale), _quantized(w, unit.weight, rescale)
    vectors = {
        "x": unit.activation.encode(x),
        "w": unit.weight.encode(w),
        "s": np.zeros((steps, lanes), np.int64),
    }
    for name, width in unit.inputs.items():
        if name.startswith("r_"):
            vectors[name] = rng.integers(0, 1 << width, (steps, lanes))
    chunk = 16 if isinstance(unit.accumulator, IeeeFormat) else unit.accumulator.chunk
    s = np.zeros(lanes)
    for step in range(steps):
        if chunk is not None and step % chunk == 0:
            s = np.zeros(lanes)
        vectors["s"][step] = unit.format.encode(s)
        s = unit.golden({name: codes[step] for name, codes in vectors.items()})
    return vectors


def mac_trace(unit: Unit, streams: Streams, seed: int = 0) -> Vectors:
    """Codes of every input port of the multiply-accumulate, (1 + steps, lanes): a reset, then a dot product a lane."""
    step = trace(unit, streams, seed)
    steps, lanes = step["x"].shape
    first = {"x": 0, "w": 0, "valid": 0, "last": 0, "rst": 1}
    rest = {"x": step["x"], "w": step["w"], "valid": 1, "last": (np.arange(steps) == steps - 1)[:, None], "rst": 0}
    return {
        name: np.concatenate([np.full((1, lanes), first[name]), np.broadcast_to(rest[name], (steps, lanes))])
        for name in first
    }


def shared_traces(unit: Unit, streams: Streams, seed: int = 0) -> tuple[Vectors, Vectors]:
    """Codes of every input port of a lane that shares its merging adder, and of that adder.

    In every cycle another lane merges, and all lanes see the sum. A last chunk that is not full is left out.

    Returns:
        of the lane (1 + steps, lanes), a reset first; of the adder (steps, adders).
    """
    chunk = unit.accumulator.chunk  # type: ignore[union-attr]
    assert chunk is not None
    steps = len(streams.weights) // chunk * chunk
    if not steps:
        raise ValueError(f"streams of {len(streams.weights)} steps have no chunk of {chunk}: give longer ones")
    whole = replace(streams, activations=streams.activations[:steps], weights=streams.weights[:steps])
    lane, (_, totals) = mac_trace(unit, whole, seed), _merged(unit, whole, seed)
    t = unit.total.encode(totals)
    y = np.concatenate([np.repeat(t[:1], chunk + 1, axis=0), np.repeat(t[1:], chunk, axis=0)])[: 1 + steps]
    behind = (np.arange(len(y)) - chunk - 1) % chunk  # how many lanes ago the own merge was
    lane["y"] = np.stack([np.roll(row, shift) for row, shift in zip(y, behind, strict=True)])
    return lane, shared_merge_trace(unit, whole, seed)


def shared_merge_trace(unit: Unit, streams: Streams, seed: int = 0, rescale: bool = True) -> Vectors:
    """Codes of every input port of an adder that lanes share, (merges of them all, adders): one in every cycle."""
    chunk = unit.accumulator.chunk  # type: ignore[union-attr]
    assert chunk is not None
    sums, totals = _merged(unit, streams, seed, rescale)
    s, t = unit.format.encode(sums), unit.total.encode(totals)
    merges, lanes = s.shape
    adders = max(1, lanes // chunk)
    trace = {f"{name}_{i}": np.zeros((merges * chunk, adders), np.int64) for name in "st" for i in range(chunk)}
    for i in range(chunk):
        members = (np.arange(adders) * chunk + i) % lanes
        trace[f"s_{i}"][i::chunk], trace[f"t_{i}"][i::chunk] = s[:, members], t[:-1, members]
    return trace


def merge_trace(unit: Unit, streams: Streams, seed: int = 0, rescale: bool = True) -> Vectors:
    """Codes of every input port of a merging adder of one's own, (1 + 2 merges, lanes).

    Before a merge and behind it the chunk's sum is 0, and nothing changes until the next.
    """
    sums, totals = _merged(unit, streams, seed, rescale)
    s = np.zeros((2 * len(sums) + 1, sums.shape[1]))
    s[1::2] = sums
    trace = {"s": unit.format.encode(s), "t": unit.total.encode(np.repeat(totals, 2, axis=0)[:-1])}
    if unit.merge_random_bits:
        drawn = np.random.default_rng(seed).integers(0, 1 << unit.merge_random_bits, sums.shape)
        trace["r_sum"] = np.concatenate([np.repeat(drawn, 2, axis=0), drawn[-1:]])
    return trace


def _merged(unit: Unit, streams: Streams, seed: int, rescale: bool = True) -> tuple[Values, Values]:
    """The sums of chunks, (merges, lanes), and the totals before each merge and at last, (merges + 1, lanes)."""
    step, level = trace(unit, streams, seed, rescale), unit.merge
    steps, lanes = step["x"].shape
    chunk = min(unit.accumulator.chunk or steps, steps)  # type: ignore[union-attr]
    ends = np.append(np.arange(chunk, steps, chunk), steps) - 1
    sums = unit.golden({name: codes[ends] for name, codes in step.items()})
    totals, rng = np.zeros((len(ends) + 1, lanes)), np.random.default_rng(seed)
    for index, chunk_sums in enumerate(sums):
        drawn = rng.integers(0, 1 << unit.merge_random_bits, lanes) | level.centred
        total = exact_sum(totals[index], chunk_sums)
        totals[index + 1] = quantize(total, level.format, level.rounding, True, level.random_bits, drawn)
    return sums, totals


def _quantized(values: Values, operand: Operand, rescale: bool) -> Values:
    """A tensor in the operand's format; rescaling takes out the power of two between its bias and the operand's."""
    largest = np.abs(values).max(initial=0.0)
    if largest == 0:
        return np.zeros_like(values)
    if isinstance(operand, FloatOperand):
        bias = 2**operand.exponent - int(np.frexp(largest)[1])
        scaled = np.ldexp(values, bias - operand.bias) if rescale else values
        return quantize_tensor(scaled, FloatFormat(operand.mantissa, operand.exponent, operand.bias))
    return np.rint(values / largest * (2 ** (operand.width - 1) - 1))
