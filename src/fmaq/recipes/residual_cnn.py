"""The demo's network: a residual CNN for 8×8 images, small enough to fine-tune on a laptop in seconds."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import pad, relu


class Block(nn.Module):
    """Two 3×3 convolutions with batch norm, and a shortcut that subsamples and zero-pads (arXiv 1512.03385)."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.stride, self.new = stride, out - channels

    def forward(self, x: Tensor) -> Tensor:
        shortcut = pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new))
        y = relu(self.norm1(self.conv1(x)))
        return relu(self.norm2(self.conv2(y)) + shortcut)


class ResidualCNN(nn.Module):
    """Images (N, 1, 8, 8) to (N, 10) logits: 8 layers, 42 k parameters, 0.8 M multiply-accumulates an image."""

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(Block(width, width), Block(width, 2 * width, 2), Block(2 * width, 2 * width))
        self.classifier = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(relu(self.norm(self.stem(x))))
        return self.classifier(x.mean((2, 3)))


def residual_cnn(width: int = 16, classes: int = 10) -> ResidualCNN:
    """The network, with weights from torch's current seed."""
    return ResidualCNN(width, classes)
