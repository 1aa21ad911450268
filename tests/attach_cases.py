"""Models whose products are emulated, and policies for them."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from fmaq import ops
from fmaq.emulation import Policy
from fmaq.numerics import Accumulator

ACC = Accumulator("M5E4b8", product="M5E4b9", chunk=4)
POLICY = Policy(accumulator=ACC)
QUANTIZED = Policy(accumulator=ACC, weight="M4E3", activation="M2E3")


def no_mode_is_left() -> bool:
    return torch.overrides._get_current_function_mode_stack() == []


class Called(nn.Module):
    """A module whose forward is a function of it and its inputs, with parameters by name."""

    def __init__(self, function, **parameters: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, *inputs):
        return self.function(self, *inputs)


class SmallCNN(nn.Module):
    """Convolutions (grouped, with a bias, without), a batch norm and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, stride=2, groups=2)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.conv2(F.relu(self.norm(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


class Attention(nn.Module):
    """Attention by functional matmul between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)
        self.out = nn.Linear(6, 6)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out((q @ k.mT / math.sqrt(6)).softmax(-1) @ v)


def emulated_attention(model: Attention, x: torch.Tensor, acc: Accumulator = ACC) -> torch.Tensor:
    q, k, v = ops.linear(x, model.qkv.weight, model.qkv.bias, acc).chunk(3, -1)
    probabilities = (ops.matmul(q, k.mT, acc) / math.sqrt(6)).softmax(-1)
    return ops.linear(ops.matmul(probabilities, v, acc), model.out.weight, model.out.bias, acc)


def fm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return ops.matmul(a, b, ACC)
