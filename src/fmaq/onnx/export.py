"""Writing attached models as ONNX: with products of the domain `fmaq`, or plain, for everybody else."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import ModelProto, numpy_helper
from torch import nn

from fmaq.emulation import Policy, attach, detach, policy_of
from fmaq.emulation.rule import FP32, OWN_FIELDS
from fmaq.onnx.operators import DOMAIN, OPERATORS, TRANSLATIONS
from fmaq.whole_files import write_bytes

DROPPED = ("activation", "estimator", "backward", "per_token", "noise", *(f for f in OWN_FIELDS if f != "b_max"))
"""What a plain model has not, beside its accumulators."""


def export(
    model: nn.Module,
    args: tuple[Any, ...],
    path: str | Path,
    kwargs: Mapping[str, Any] | None = None,
    plain: bool = False,
    **how: Any,
) -> Path:
    """Write a model as ONNX, its emulated products as operators of the domain `fmaq` (see `fmaq.onnx.operators`).

    `fmaq.onnx.session(path)` runs it in onnxruntime. A plain model has none of these operators, and runs everywhere:
    its weights are quantized as the policy says, its activations are not, and its products are ordinary ones.

    Args:
        model: attached; in training mode it is exported as such.
        args, kwargs: what it is called with, for an example.
        path: the file to write, `.onnx`.
        plain: without accumulators.
        how: what `torch.onnx.export` takes besides, `dynamic_shapes` or `input_names` say.

    Returns:
        The path.

    Raises:
        ValueError: the model is attached to no policy; or, plain, what is quantized as a weight depends on inputs.
    """
    policy = policy_of(model)
    if policy is None:
        raise ValueError(
            "the model is attached to no policy: call fmaq.attach(model, policy) before, or export it as it is"
        )
    if plain:
        model = attach(detach(copy.deepcopy(model)), _plain(policy))
    table = TRANSLATIONS | dict(how.pop("custom_translation_table", {}))
    with torch.no_grad():
        program = torch.onnx.export(
            model,
            args,
            kwargs=dict(kwargs or {}),
            dynamo=True,
            custom_translation_table=table,
            **{"verbose": False} | how,
        )
    assert program is not None
    proto = program.model_proto
    if plain:
        proto = _folded(proto)
    write_bytes(Path(path), proto.SerializeToString())
    return Path(path)


def _plain(policy: Policy) -> Policy:
    """The policy with weights' formats alone."""

    def entry(fields: Mapping[str, Any] | None) -> dict[str, Any] | None:
        if fields is None:
            return None
        kept = {name: value for name, value in fields.items() if name not in DROPPED}
        if "products" in kept:
            kept["products"] = {name: entry(one) for name, one in kept["products"].items()}
        return kept | ({"accumulator": FP32} if "accumulator" in kept else {})

    whole = dict(policy.to_mapping())
    layers = {name: entry(one) for name, one in whole.pop("layers", {}).items()}
    return Policy.parse((entry(whole) or {}) | {"accumulator": FP32, "layers": layers})


def _folded(model: ModelProto) -> ModelProto:
    """The model with quantized weights as initializers.

    Raises:
        ValueError: something else is quantized.
    """
    values = {x.name: numpy_helper.to_array(x) for x in model.graph.initializer}
    compute = {operator.name: operator.on_arrays for operator in OPERATORS}
    kept: list[Any] = []
    for node in model.graph.node:
        if node.op_type == "Constant" and not node.domain:
            values[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        if node.domain != DOMAIN:
            kept.append(node)
            continue
        missing = [name for name in node.input if name not in values]
        if missing:
            raise ValueError(
                f"{node.op_type} {node.name} quantizes {missing[0]} as a weight, and it is computed from the inputs: a "
                "plain model has no operator for that. Leave that layer's weight format out of the policy"
            )
        attributes = {a.name: _text(onnx.helper.get_attribute_value(a)) for a in node.attribute}
        found = compute[node.op_type](*(values[name] for name in node.input), **attributes)
        values[node.output[0]] = found
        model.graph.initializer.append(numpy_helper.from_array(found, node.output[0]))
    del model.graph.node[:]
    model.graph.node.extend(kept)
    _remove(model.opset_import, [i for i, one in enumerate(model.opset_import) if one.domain == DOMAIN])
    used = {name for node in kept for name in node.input} | {x.name for x in model.graph.output}
    _remove(model.graph.initializer, [i for i, x in enumerate(model.graph.initializer) if x.name not in used])
    onnx.checker.check_model(model)
    return model


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def _remove(repeated: Any, positions: Sequence[int]) -> None:
    for position in reversed(positions):
        del repeated[position]
