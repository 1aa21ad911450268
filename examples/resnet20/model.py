"""The CIFAR-10 ResNets of He et al. 2015 (arXiv 1512.03385, section 4.2), with parameter-free shortcuts (option A)."""

from torch import Tensor, nn
from torch.nn.functional import pad, relu


def conv3x3(channels: int, out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)


class Block(nn.Module):
    """Two convolutions, and a shortcut that subsamples and pads the new channels with zeros."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(channels, out, stride), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = conv3x3(out, out), nn.BatchNorm2d(out)
        self.stride, self.new = stride, out - channels

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x[:, :, :: self.stride, :: self.stride]
        shortcut = pad(shortcut, (0, 0, 0, 0, self.new // 2, self.new - self.new // 2))
        y = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        return relu(y + shortcut)


class ResNet(nn.Module):
    """Three groups of `blocks` blocks, of 16, 32 and 64 channels; images are (N, 3, 32, 32)."""

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(3, 16), nn.BatchNorm2d(16)
        self.layer1 = self._group(16, 16, 1, blocks)
        self.layer2 = self._group(16, 32, 2, blocks)
        self.layer3 = self._group(32, 64, 2, blocks)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _group(channels: int, out: int, stride: int, blocks: int) -> nn.Sequential:
        return nn.Sequential(Block(channels, out, stride), *(Block(out, out, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def resnet20(classes: int = 10) -> ResNet:
    """20 layers, 0.27 M parameters, 41 M multiply-accumulates an image."""
    return ResNet(3, classes)


def resnet56(classes: int = 10) -> ResNet:
    """56 layers, 0.85 M parameters, 126 M multiply-accumulates an image."""
    return ResNet(9, classes)
