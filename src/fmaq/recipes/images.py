"""Images of files and of tables as examples: decoded when a batch of them is asked for, so that there may be many."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmaq.recipes.explain import RecipeError
from fmaq.recipes.recipe import HuggingFaceData, ImageFolderData
from fmaq.training.examples import Examples

IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}

KEPT_BYTES = 2**30
"""How much of a split's images stays decoded, a byte a value: 7,133 images of 224 × 224."""

THREADS = min(8, os.cpu_count() or 1)


class Images(Examples):
    """Images (N, 3, H, W), resized, cropped and normalised as a recipe says, with a class each.

    They are decoded by a few threads when a batch is asked for; after a slice, the next one is while the batch is used.
    The first `KEPT_BYTES` of them stay decoded.

    Args:
        open_image: gives an image of Pillow's by its number; called from several threads.
        names: of the images, for what is said of one.
        targets: (N,) classes.
        recipe: where to resize, crop and normalise.
        contents: says what the images are, where decoding them all would take too long: what `digest` is of.
    """

    def __init__(
        self,
        open_image: Callable[[int], Any],
        names: Sequence[str],
        targets: Tensor,
        recipe: ImageFolderData | HuggingFaceData,
        contents: Sequence[str],
    ) -> None:
        self.open_image, self.names, self.targets, self.recipe = open_image, names, targets, recipe
        self.contents = contents
        self.kept: dict[int, Tensor] = {}
        self.begun: dict[int, Future[Tensor]] = {}
        self.pool = ThreadPoolExecutor(THREADS, "images")
        self.shape: torch.Size | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} images)"

    @property
    def inputs(self) -> Tensor:  # type: ignore[override]
        """All at once."""
        return self.batch(slice(None))[0]

    def batch(self, index: Any) -> tuple[Tensor, Tensor]:
        """The images and classes that a slice or a tensor of indices picks.

        Raises:
            RecipeError: an image cannot be read, or differs in size from others; names it.
        """
        targets = self.targets[index]
        numbers = torch.arange(len(self))[index].tolist()
        self._begin(numbers)
        if isinstance(index, slice):
            self._begin(range(numbers[-1] + 1, min(numbers[-1] + 1 + len(numbers), len(self))))
        found = {n: self._finish(n) for n in dict.fromkeys(numbers)}
        x = torch.stack([found[n] for n in numbers])
        return normalised(x, self.recipe.scale, self.recipe.mean, self.recipe.std), targets

    def _begin(self, numbers: Iterable[int]) -> None:
        for n in numbers:
            if n not in self.kept and n not in self.begun:
                self.begun[n] = self.pool.submit(self._decode, n)

    def _finish(self, number: int) -> Tensor:
        if number in self.kept:
            return self.kept[number]
        image = self.begun.pop(number).result()
        self.shape = self.shape or image.shape
        if image.shape != self.shape:
            sizes = " and ".join(f"{w} × {h}" for _, h, w in (self.shape, image.shape))
            raise RecipeError(
                f"images differ in size, {sizes}, the latter that of {self.names[number]}; give data.resize and "
                f"data.crop"
            )
        if (len(self.kept) + 1) * image.numel() <= KEPT_BYTES:
            self.kept[number] = image
        return image

    def _decode(self, number: int) -> Tensor:
        try:
            with self.open_image(number) as image:
                return _bytes(image, self.recipe.resize, self.recipe.crop)
        except Exception as error:  # of Pillow, and of its decoders
            raise RecipeError(f"cannot read the image {self.names[number]}: {error}") from None

    def first(self, count: int) -> Images:
        """The first `count`."""
        parts = self.names[:count], self.targets[:count], self.recipe, self.contents[:count]
        return Images(self.open_image, *parts)

    def digest(self) -> str:
        """A hash of `contents`, the classes, and how images are resized, cropped and normalised."""
        how = self.recipe.model_dump(include={"resize", "crop", "scale", "mean", "std"})
        state = hashlib.sha256(repr(how).encode())
        state.update("\0".join(self.contents).encode(errors="surrogateescape"))
        state.update(self.targets.numpy().tobytes())
        return state.hexdigest()[:16]


def image_folder(recipe: ImageFolderData, folder: Path) -> Images:
    """The images of a folder that has a folder for each class.

    Its digest is of the files' names and sizes: a file whose pixels change, but not its length, is not noticed.

    Raises:
        RecipeError: there are none.
    """
    from PIL import Image

    classes = sorted(p.name for p in folder.iterdir() if p.is_dir())
    files = [
        (p, i)
        for i, name in enumerate(classes)
        for p in sorted((folder / name).iterdir())
        if p.suffix.lower() in IMAGES
    ]
    if not files:
        raise RecipeError(f"{folder} has no images; it should have a folder of images for each class")
    paths = [str(path) for path, _ in files]
    contents = [f"{path.parent.name}/{path.name} {path.stat().st_size}" for path, _ in files]
    targets = torch.tensor([label for _, label in files])
    return Images(lambda number: Image.open(paths[number]), paths, targets, recipe, contents)


def table_of_images(recipe: HuggingFaceData, table: Any, column: str, labels: Tensor) -> Images:
    """The images of a column of a table of `datasets`; the digest is of the table's fingerprint."""
    names = [f"{number} of {recipe.id}" for number in range(len(table))]
    contents = [f"{table._fingerprint} {number}" for number in range(len(table))]
    return Images(lambda number: table[number][column], names, labels, recipe, contents)


def image_tensor(image: Any, resize: int | None = None, crop: int | None = None) -> Tensor:
    """A PIL image as (3, H, W), 0 to 255: the shorter side resized, then the centre cropped."""
    return _bytes(image, resize, crop).float()


def _bytes(image: Any, resize: int | None, crop: int | None) -> Tensor:
    from PIL import Image

    image = image.convert("RGB")
    if resize is not None:
        ratio = resize / min(image.size)
        size = (round(image.width * ratio), round(image.height * ratio))
        image = image.resize(size, Image.Resampling.BILINEAR)
    if crop is not None:
        left, top = (image.width - crop) // 2, (image.height - crop) // 2
        image = image.crop((left, top, left + crop, top + crop))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalised(x: Tensor, scale: float, mean: list[float] | None, std: list[float] | None) -> Tensor:
    """x / scale, then (x − mean) / std along dimension 1."""
    x = x.float() / scale
    shape = (1, -1, *[1] * (x.dim() - 2))
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) not in (1, x.shape[1]):
            raise RecipeError(f"data.{name} has {len(values)} values, but the data have {x.shape[1]} channels")
    if mean is not None:
        x = x - torch.tensor(mean).view(shape)
    if std is not None:
        x = x / torch.tensor(std).view(shape)
    return x.contiguous()
