"""The demo's network, trained in float32 on scikit-learn's digits when it is first needed: seconds, and no download."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import nn

from fmaq import Policy
from fmaq.recipes.data import digits
from fmaq.recipes.demo import FLOAT32
from fmaq.recipes.residual_cnn import residual_cnn
from fmaq.training import finetune
from fmaq.training.files import write_bytes

WEIGHTS = Path(__file__).resolve().parents[2] / ".cache" / "examples" / "digits" / "float32.safetensors"


def trained() -> nn.Module:
    """The residual CNN for (N, 1, 8, 8) images; its weights are kept in `WEIGHTS`."""
    if not WEIGHTS.exists():
        print(f"training the digits' network in float32, once; it is kept in {WEIGHTS}", file=sys.stderr)
        torch.manual_seed(0)
        model = residual_cnn()
        train, _ = digits()
        finetune(model, Policy(), train, None, FLOAT32)
        write_bytes(WEIGHTS, save({name: tensor.contiguous() for name, tensor in model.state_dict().items()}))
    model = residual_cnn()
    model.load_state_dict(load_file(WEIGHTS))
    return model
