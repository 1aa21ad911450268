"""How many multiply-accumulates torch's own functions do: where nothing is emulated, for the shares of a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

PRODUCT_KERNELS = {
    *("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_", "addbmm", "addbmm_", "mv", "addmv", "addmv_", "dot"),
    *("vdot", "convolution", "convolution_overrideable", "mkldnn_convolution", "_trilinear", "linear"),
    *("_grouped_mm", "_scaled_mm", "_int_mm", "_addmm_activation", "_cdist_forward"),
    *("mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn", "_native_multi_head_attention", "_transformer_encoder_layer_fwd"),
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"),
    *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
}
"""Names in `torch.ops.aten` of the kernels that hold matrix products."""


def macs_of_kernel(func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> int | None:
    """Multiply-accumulates of one of torch's kernels; None where unknown."""
    packet = func.overloadpacket
    name = packet.__name__
    count: Callable[..., int] | None = flop_registry.get(packet)
    if count is not None:
        return count(*args, **kwargs, out_val=result) // 2
    if name in ("mv", "dot", "vdot"):
        return int(args[0].numel())
    if name in ("addmv", "addmv_"):
        return int(args[1].numel())
    if name in ("addmm_", "_addmm_activation", "baddbmm_", "addbmm", "addbmm_"):
        return int(args[1].numel() * args[2].shape[-1])
    if name == "linear":
        return int(args[0].numel() * args[1].shape[0])
    if name == "_cdist_forward":
        return int(result.numel() * args[0].shape[-1])
    if name.startswith("_scaled_dot_product"):
        query, key, value = args[:3]
        return int(query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1]))
    if name == "mkldnn_rnn_layer":
        return macs_of_recurrence(args[0], args[1:3])
    return None


def macs_of_recurrence(x: Tensor, weights: Sequence[Any]) -> int:
    """Those of a recurrent layer or cell: each of its matrices multiplies each vector of x, (..., inputs), once."""
    matrices = sum(w.numel() for w in weights if isinstance(w, Tensor) and w.dim() == 2)
    return int(x.numel() // max(1, x.shape[-1]) * matrices)


class CountingMacs(TorchDispatchMode):
    """Adds up the multiply-accumulates of the kernels that run inside; `total` is None where none is known."""

    def __init__(self) -> None:
        super().__init__()
        self.total: int | None = None

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in PRODUCT_KERNELS:
            macs = macs_of_kernel(func, args, kwargs or {}, result)
            self.total = self.total if macs is None else (self.total or 0) + macs
        return result
