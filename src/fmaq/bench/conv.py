"""Convolutions against `torch.conv2d`: ResNet-18's 3×3 at its four sizes, depthwise 3×3, and 1×1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fmaq import kernels
from fmaq.bench.rows import Case, Operation, Row, comparing
from fmaq.numerics import Accumulator


@dataclass(frozen=True)
class Shape:
    """A convolution with stride 1 and padding that keeps the size.

    Attributes:
        size: height and width. channels, outputs: in and out. kernel: height and width, odd.
        target: the most that the ratio should be; None where none is set.
    """

    name: str
    size: int
    channels: int
    outputs: int
    kernel: int
    groups: int
    target: float | None
    images: int = 8

    @property
    def macs(self) -> int:
        return self.images * self.size**2 * self.outputs * self.channels // self.groups * self.kernel**2

    @property
    def work(self) -> str:
        """The shape in words."""
        return f"{self.images}×{self.channels}×{self.size}² → {self.outputs}"


SHAPES = (
    Shape("3×3", 56, 64, 64, 3, 1, 3.0),
    Shape("3×3", 28, 128, 128, 3, 1, 3.0),
    Shape("3×3", 14, 256, 256, 3, 1, 3.0),
    Shape("3×3", 7, 512, 512, 3, 1, 3.0),
    Shape("depthwise 3×3", 112, 32, 32, 3, 32, 4.0),
    Shape("1×1", 56, 64, 256, 1, 1, None),
)


def cases(shapes: tuple[Shape, ...] = SHAPES) -> list[Case]:
    """A case a shape: operands like a network's, rectified normal inputs and weights by He et al. 2015."""
    return [_case(shape) for shape in shapes]


def _case(shape: Shape) -> Case:
    def prepare() -> tuple[Operation, Operation]:
        generator = torch.Generator().manual_seed(0)
        inputs = shape.channels // shape.groups
        x = torch.randn(shape.images, shape.channels, shape.size, shape.size, generator=generator).relu()
        weight = torch.randn(shape.outputs, inputs, shape.kernel, shape.kernel, generator=generator)
        weight *= (2 / (inputs * shape.kernel**2)) ** 0.5
        around = shape.kernel // 2
        geometry = kernels.Geometry((1, 1), (around, around), (1, 1), shape.groups)

        def ours() -> Tensor:
            return kernels.conv(x, weight, Accumulator.paper12, geometry)

        return ours, lambda: torch.conv2d(x, weight, None, 1, around, 1, shape.groups)

    return Case(Row("conv", shape.work, shape.name, shape.target, macs=shape.macs), comparing(prepare))
