"""Recurrent layers and cells, unrolled: torch computes `nn.LSTM`, `nn.GRU`, `nn.RNN` and their cells as a whole.

Every matrix of weights is a product of its own, in the order in which torch keeps them. Of each layer and direction
that is `linear_input` (weight_ih), `linear_hidden` (weight_hh) and, of an LSTM with projections, `linear_projection`
(weight_hr). The inputs of all time steps are one product, since nothing in it waits for a state; states are multiplied
step by step, every time under the same index.

Gates, cell states and biases are float32; what a layer gives, and multiplies at the next step, is in its own dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fmaq import ops
from fmaq.emulation.calls import Call
from fmaq.emulation.met import Met
from fmaq.emulation.products import Request, autocast_dtype, compute, is_chosen, why_untouched
from fmaq.emulation.rule import RECURRENT_KINDS as KINDS
from fmaq.emulation.sizes import macs_of_recurrence
from fmaq.ops.operands import full_precision

Product = Callable[[Tensor], Tensor]
Group = dict[str, tuple[Tensor, Tensor | None]]
"""Weights and biases of one direction of one layer, by kind of product."""
State = tuple[Tensor, ...]
"""h and, of an LSTM, c: (B, hidden) each, in float32."""
Step = Callable[[Tensor, State, Product, Product | None], State]
"""To the next state, by a step's product of inputs, (B, gates · hidden), the state, and the products of h."""


def _rnn_tanh(x: Tensor, state: State, hidden: Product, _: Product | None) -> State:
    return ((hidden(state[0]) + x).tanh(),)


def _rnn_relu(x: Tensor, state: State, hidden: Product, _: Product | None) -> State:
    return ((hidden(state[0]) + x).relu(),)


def _gru(x: Tensor, state: State, hidden: Product, _: Product | None) -> State:
    (h,) = state
    x_reset, x_update, x_new = x.chunk(3, -1)
    h_reset, h_update, h_new = hidden(h).chunk(3, -1)
    reset, update = (h_reset + x_reset).sigmoid(), (h_update + x_update).sigmoid()
    new = (x_new + h_new * reset).tanh()
    return ((h - new) * update + new,)


def _lstm(x: Tensor, state: State, hidden: Product, project: Product | None) -> State:
    h, c = state
    enter, forget, cell, leave = (hidden(h) + x).chunk(4, -1)
    c = forget.sigmoid() * c + enter.sigmoid() * cell.tanh()
    h = leave.sigmoid() * c.tanh()
    return h if project is None else project(h), c


STEPS: dict[str, Step] = {"lstm": _lstm, "gru": _gru, "rnn_tanh": _rnn_tanh, "rnn_relu": _rnn_relu}
"""By torch's function for a whole layer."""


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In float32, after rounding to a narrower type perhaps."""
    return x if x.dtype == dtype == torch.float32 else x.to(dtype).float()


class _OfWeight:
    """The products of one matrix of weights in a call, of one input after another; all but the input is alike.

    Args:
        index: of the product in the call.
        dtype: of the operands.
    """

    def __init__(
        self, call: Call, kind: str, index: int, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        self.call, self.index, self.dtype, self.times = call, index, dtype, 0
        self.weight = _rounded(weight, dtype)
        bias = None if bias is None else _rounded(bias, torch.float32)
        self.request = Request(
            kind,
            (self.weight, self.weight),
            (False, True),
            steps=weight.shape[-1],
            torch_product=lambda x, weight: F.linear(x, weight, bias),
            emulated_product=lambda x, weight, acc, **how: ops.linear(x, weight, bias, acc, **how),
            kept=None if is_chosen() else [],
        )

    def __call__(self, x: Tensor) -> Tensor:
        self.request.operands = (_rounded(x, self.dtype), self.weight)
        self.request.repeat = self.times
        self.times += 1
        self.call.products = self.index
        return compute(self.call, self.request)


@dataclass
class _Direction:
    """One direction of a layer, or a cell: its steps, and the products in them."""

    step: Step
    input: _OfWeight
    hidden: _OfWeight
    projection: _OfWeight | None

    def next(self, x: Tensor, state: State) -> State:
        """From a step's product of inputs and a state to the next."""
        h, *c = self.step(x, state, self.hidden, self.projection)
        return _rounded(h, self.hidden.dtype), *c

    def unrolled(self, xs: Sequence[Tensor], first: State, is_reverse: bool) -> tuple[list[Tensor], State]:
        """h of every step, and the last state of every sequence.

        Args:
            xs: products of inputs, (B, gates · hidden) each; sequences that are over are the last rows left out.
            first: the first state of every sequence.
        """
        xs = xs[::-1] if is_reverse else xs
        outputs, over = [], []
        state = tuple(s[: xs[0].shape[0]] for s in first)
        for x in xs:
            before, rows = state[0].shape[0], x.shape[0]
            if rows < before:
                over.append(tuple(s[rows:] for s in state))
                state = tuple(s[:rows] for s in state)
            elif rows > before:
                state = tuple(torch.cat([s, f[before:rows]]) for s, f in zip(state, first, strict=True))
            state = self.next(x, state)
            outputs.append(state[0])
        if over:
            state = tuple(torch.cat(parts) for parts in zip(state, *reversed(over), strict=True))
        return outputs[::-1] if is_reverse else outputs, state


def _several(states: Tensor | Sequence[Tensor]) -> State:
    """h0, or h0 and c0."""
    return (states,) if isinstance(states, Tensor) else tuple(states)


def _named(weights: Sequence[Tensor], has_biases: bool) -> Group:
    """Those of one direction, from w_ih, w_hh and, where there are any, b_ih, b_hh and w_hr in this order."""
    of_input, of_hidden, *others = weights
    biases = [others.pop(0), others.pop(0)] if has_biases else [None, None]
    projections = [(others[0], None)] if others else []
    return dict(zip(KINDS, [(of_input, biases[0]), (of_hidden, biases[1]), *projections], strict=False))


def _directions(call: Call, kind: str, groups: Sequence[Group], dtype: torch.dtype) -> Iterator[_Direction]:
    """Every direction of every layer, its products numbered from the call's next on."""
    indices = itertools.count(call.products)
    for group in groups:
        products = {name: _OfWeight(call, name, next(indices), *one, dtype) for name, one in group.items()}
        projection = products.get("linear_projection")
        yield _Direction(STEPS[kind], products["linear_input"], products["linear_hidden"], projection)


def layer(met: Met, kind: str) -> Any:
    """lstm, gru, rnn_tanh, rnn_relu: of (T, B, inputs), (B, T, inputs), or packed sequences."""
    second = met.args[1] if len(met.args) > 1 else None
    is_packed = "batch_sizes" in met.kwargs or (isinstance(second, Tensor) and not second.is_floating_point())
    names = ("data", "batch_sizes", "hx", "params") if is_packed else ("input", "hx", "params")
    options = ("has_biases", "num_layers", "dropout", "train", "bidirectional")
    bound, _ = met.bind(*names, *options, batch_first=False)
    x, weights, states = bound[names[0]], bound["params"], _several(bound["hx"])
    count, directions = bound["num_layers"], 2 if bound["bidirectional"] else 1
    dtype, size = autocast_dtype(x) or x.dtype, len(weights) // (count * directions)
    groups = [_named(weights[i : i + size], bound["has_biases"]) for i in range(0, len(weights), size)]
    reason = why_untouched(met.call.attachment.rule, (x, *states, *weights))
    if reason is not None:
        return met.not_covered(kind, reason, macs_of_recurrence(x, weights))
    if not x.shape[1 if bound["batch_first"] else 0]:
        return met.by_torch()  # no time steps: an error
    sizes = bound["batch_sizes"].tolist() if is_packed else None
    steps = _directions(met.call, kind, groups, dtype)
    firsts = zip(*(state.float().unbind(0) for state in states), strict=True)
    lasts = []
    with full_precision(x.device.type):
        x = x.transpose(0, 1) if bound["batch_first"] else x
        for number in range(count):
            found = []
            for is_reverse in (False, True)[:directions]:
                direction = next(steps)
                products = direction.input(x)
                each = products.unbind(0) if sizes is None else products.split(sizes)
                outputs, last = direction.unrolled(each, next(firsts), is_reverse)
                found.append(torch.stack(outputs) if sizes is None else torch.cat(outputs))
                lasts.append(last)
            x = found[0] if directions == 1 else torch.cat(found, -1)
            if bound["train"] and bound["dropout"] > 0 and number < count - 1:
                x = F.dropout(x, p=bound["dropout"], training=True)
        x = x.transpose(0, 1) if bound["batch_first"] else x
        return x.to(dtype), *(torch.stack(states).to(dtype) for states in zip(*lasts, strict=True))


def cell(met: Met, kind: str) -> Any:
    """lstm_cell, gru_cell, rnn_tanh_cell, rnn_relu_cell: one step, whose state keeps its dtype."""
    bound, _ = met.bind("input", "hx", "w_ih", "w_hh", b_ih=None, b_hh=None)
    x, states, weights = bound["input"], _several(bound["hx"]), (bound["w_ih"], bound["w_hh"])
    groups = [{"linear_input": (weights[0], bound["b_ih"]), "linear_hidden": (weights[1], bound["b_hh"])}]
    reason = why_untouched(met.call.attachment.rule, (x, *states, *weights))
    if reason is not None:
        return met.not_covered(kind, reason, macs_of_recurrence(x, weights))
    with full_precision(x.device.type):
        direction = next(_directions(met.call, kind.removesuffix("_cell"), groups, autocast_dtype(x) or x.dtype))
        found = direction.next(direction.input(x), tuple(state.float() for state in states))
    found = tuple(new.to(state.dtype) for new, state in zip(found, states, strict=True))
    return found if kind == "lstm_cell" else found[0]


def quantized_cell(met: Met, kind: str) -> Any:
    """quantized_lstm_cell and its like: of packed weights."""
    macs = macs_of_recurrence(met.args[0], met.args[2:4])
    return met.not_covered(kind, "a quantized kernel computes it as a whole", macs)
