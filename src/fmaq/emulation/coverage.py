"""Which products of a model are emulated, by what, and why not: a table from one forward pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from fmaq.emulation import calls
from fmaq.emulation.attach import hooked, policy_of
from fmaq.emulation.noise import call_counts, restart_calls
from fmaq.emulation.products import ONE_STEP, FmaqCoverageWarning, Product, listening, why_not
from fmaq.emulation.rule import FP32
from fmaq.emulation.sizes import PRODUCT_KERNELS, macs_of_kernel
from fmaq.emulation.unmet import names_of, unmet_products

Shapes = tuple[tuple[int, ...], ...]

OUTSIDE = "outside of every attached module"


@dataclass(frozen=True)
class CoverageRow:
    """Products of one layer that are alike.

    Attributes:
        layer: full name of the module whose forward calls them; "" is the model itself.
        product: "linear", "conv2d", "matmul", "attention_scores" ...
        shapes: of the operands.
        calls: how many there were.
        macs: multiply-accumulates of all of them; None where unknown.
        accumulator: that sums them, or "fp32".
        formats: that each operand was quantized to; None where it stays as it was.
        codes: integer codes are multiplied and summed, in place of values.
        covered: the sums are emulated.
        reason: why not; "" where they are.
    """

    layer: str
    product: str
    shapes: Shapes
    calls: int
    macs: int | None
    accumulator: str
    formats: tuple[str | None, ...]
    covered: bool
    reason: str
    codes: bool = False


class Coverage:
    """A table of the products of one forward pass, in the order of their first calls. It prints itself."""

    def __init__(self, rows: list[CoverageRow]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[CoverageRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def to_dicts(self) -> list[dict[str, Any]]:
        """The rows as plain mappings."""
        return [asdict(row) for row in self.rows]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the forward pass, as far as they are known."""
        return sum(row.macs or 0 for row in self.rows)

    @property
    def share(self) -> float:
        """The part of the multiply-accumulates that is emulated, 0 to 1; products of one step do not count.

        Those of unknown size, which are not emulated either, cannot count: see `unknown`.
        """
        counted = [row for row in self.rows if row.reason != ONE_STEP]
        total = sum(row.macs or 0 for row in counted)
        return sum(row.macs or 0 for row in counted if row.covered) / total if total else 0.0

    @property
    def unknown(self) -> int:
        """How many products of unknown size there were, none of them emulated."""
        return sum(row.calls for row in self.rows if row.macs is None)

    def __str__(self) -> str:
        heads = ("layer", "product", "operands", "calls", "MACs", "formats", "accumulator", "not covered")
        lines = [heads, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        text.insert(1, "  ".join("-" * width for width in widths))
        beside = f"; not emulated beside them: products of unknown size, {self.unknown}" if self.unknown else ""
        return "\n".join([*text, f"{self.macs:,} MACs; {self.share:.1%} of them emulated{beside}"])

    __repr__ = __str__


def coverage(model: nn.Module | Callable[..., Any], *inputs: Any, **kwargs: Any) -> Coverage:
    """Run an attached model once, and tell which of its products are emulated, by what, and why not.

    The model, its buffers and torch's random state are afterwards as they were; nothing is recorded for gradients. A
    warning names what the policy says of products, by index or kind, that were not met.

    An elementwise product that is summed afterwards, `(x * y).sum()`, is no product to torch, and not in the table.

    Args:
        model: attached; or one of its methods, such as `model.training_step`.
        inputs, kwargs: of its forward, or of the method.

    Raises:
        TypeError: `model` is neither a module nor a module's method.
        ValueError: the model is not attached.
    """
    run = model
    if not isinstance(model, nn.Module):
        model = getattr(run, "__self__", None)  # type: ignore[assignment]
        if not isinstance(model, nn.Module):
            raise TypeError(f"coverage takes a torch.nn.Module or one's method, got {type(run).__name__}")
    if all(policy_of(module) is None for module in model.modules()):
        raise ValueError("the model is attached to no policy; call fmaq.attach(model, policy) before fmaq.coverage")
    rows: list[CoverageRow] = []
    met: set[tuple[str, str, int]] = set()
    with undisturbed(model), hooked(model), warnings.catch_warnings():
        warnings.simplefilter("ignore", FmaqCoverageWarning)
        heard = listening(lambda product: met.add((product.layer, product.kind, product.index)))
        with listening(lambda product: rows.append(_row(product))), heard, meeting_the_rest(rows.append):
            run(*inputs, **kwargs)
    policy = policy_of(model)
    for entry in unmet_products(policy, names_of(model), met) if policy is not None else ():
        warnings.warn(f"coverage: no call had {entry}", FmaqCoverageWarning, stacklevel=2)
    return Coverage(_merged(rows))


@contextmanager
def meeting_the_rest(note: Callable[[CoverageRow], None]) -> Iterator[None]:
    """Note the products that reach torch's kernels in a `with` block without any handler having met them.

    Those of gradients are none of a forward, and are not noted.
    """
    with _Unmet(note):
        yield


class _Unmet(TorchDispatchMode):
    """Finds products that reached torch's kernels without any handler having met them."""

    def __init__(self, note: Callable[[CoverageRow], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            result = func(*args, **(kwargs or {}))
        name, call = func.overloadpacket.__name__, calls.innermost_call()
        is_gradient = call is None and torch._C._current_graph_task_id() != -1
        if name in PRODUCT_KERNELS and not calls.is_handling() and not is_gradient:
            shapes = tuple(tuple(x.shape) for x in args if isinstance(x, torch.Tensor))
            layer, reason = "", OUTSIDE
            if call is not None:
                layer, rule = call.attachment.name, call.attachment.rule
                is_wanted = rule is not None and not rule.is_plain
                reason = "called where no handler meets it" if is_wanted else why_not(rule, ()) or ""
            macs = macs_of_kernel(func, args, kwargs or {}, result)
            self._note(CoverageRow(layer, name, shapes, 1, macs, FP32, (None,) * len(shapes), False, reason))
        return result


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Without gradients; buffers, random state and the counts of calls are put back."""
    counts = call_counts(model)
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices), torch.no_grad():
        try:
            yield
        finally:
            for module, name, buffer, content in buffers:
                module._buffers[name] = buffer.copy_(content)
            restart_calls(model, counts)


def _row(product: Product) -> CoverageRow:
    rule = product.rule
    covered = product.reason is None
    return CoverageRow(
        layer=product.layer,
        product=product.kind,
        shapes=tuple(tuple(x.shape) for x in product.operands),
        calls=1,
        macs=product.macs,
        accumulator=str(rule.accumulator) if covered and rule is not None else FP32,
        formats=product.formats or (None,) * len(product.operands),
        covered=covered,
        reason=product.reason or "",
        codes=product.scale is not None,
    )


def _merged(rows: list[CoverageRow]) -> list[CoverageRow]:
    """Rows that are alike as one, their calls and multiply-accumulates added."""
    alike: dict[CoverageRow, list[CoverageRow]] = {}
    for row in rows:
        alike.setdefault(replace(row, calls=0, macs=None), []).append(row)
    return [
        replace(group[0], calls=len(group), macs=None if group[0].macs is None else sum(row.macs or 0 for row in group))
        for group in alike.values()
    ]


def _cells(row: CoverageRow) -> tuple[str, ...]:
    return (
        row.layer or "(model)",
        row.product,
        " · ".join("×".join(str(size) for size in shape) or "scalar" for shape in row.shapes),
        str(row.calls),
        "?" if row.macs is None else f"{row.macs:,}",
        " · ".join(name or "–" for name in row.formats) + " codes" * row.codes if any(row.formats) else "",
        row.accumulator,
        row.reason,
    )
