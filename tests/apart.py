"""A second opinion on whole models: products in NumPy, met below autograd by torch's dispatcher; no code of fmaq's."""

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ACCUMULATOR = "M7E4b10 product=M7E4b12 chunk=16"
"""What `product` sums in."""


def truncated(x: np.ndarray, bias: int) -> np.ndarray:
    """M7E4 with a bias: 7 bits after the first, the smallest 2^−bias, the largest (2 − 2^−7)·2^(15−bias)."""
    unit = np.ldexp(1.0, np.frexp(x)[1] - 8)
    y = np.where(np.abs(x) < 2.0**-bias, 0.0, np.trunc(x / unit) * unit)
    return np.clip(y, -(2 - 2.0**-7) * 2.0 ** (15 - bias), (2 - 2.0**-7) * 2.0 ** (15 - bias))


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(…, M, K) times (…, K, N) in `ACCUMULATOR`; float64 holds every sum of two such numbers."""
    left, right = (x.detach().double().numpy() for x in (a, b))
    total = np.zeros((*left.shape[:-1], right.shape[-1]))
    for start in range(0, left.shape[-1], 16):
        chunk = np.zeros_like(total)
        for k in range(start, min(start + 16, left.shape[-1])):
            step = truncated(left[..., :, k, None] * right[..., k, None, :], 12)
            chunk = truncated(step + chunk, 10)
        total = truncated(total + chunk, 10)
    return torch.from_numpy(total).float()


class Apart(TorchDispatchMode):
    """Computes mm, bmm and addmm so, and refuses fused products; results have the first operand's dtype.

    Without gradients: products of a backward pass would be met as well.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name == "bmm" and args[0].shape[-1] == 1 and args[0].shape[-2] > args[1].shape[-1]:
            return func(*args)  # position angles: (d/2, 1) times (1, L)
        if name in ("mm", "bmm"):
            return product(*args).to(args[0].dtype)
        if name == "addmm":
            bias, a, b = args
            return (bias.float() + product(a, b)).to(a.dtype)
        assert not any(word in name for word in ("attention", "linear", "baddbmm", "conv", "einsum")), name
        return func(*args, **(kwargs or {}))
