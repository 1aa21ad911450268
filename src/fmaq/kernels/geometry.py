"""Where the windows of a convolution lie in its image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """Of a convolution over 1 to 3 spatial dimensions, a number each.

    Attributes:
        stride, dilation: distances of windows, and of the taps in them.
        padding: zeros on either side of the image.
        groups: of channels.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    def out(self, image: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
        """The spatial sizes of the output, of those of the image and the kernel; less than 1: no window fits."""
        sizes = zip(image, kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)


def torch_conv(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """The convolution in torch's own arithmetic: (N, C, *spatial) with (O, C/groups, *kernel) is (N, O, *out)."""
    no_more = [0] * len(geometry.stride)
    return torch.convolution(
        x, weight, None, geometry.stride, geometry.padding, geometry.dilation, False, no_more, geometry.groups
    )
