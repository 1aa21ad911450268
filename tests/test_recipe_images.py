"""Images as examples: the same whether they stay decoded or not, and named where they cannot be read."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fmaq.recipes import images
from fmaq.recipes.data import load_data
from fmaq.recipes.explain import RecipeError
from fmaq.recipes.recipe import HuggingFaceData, ImageFolderData

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")


def recipe_of(folder: Path, **options: Any) -> ImageFolderData:
    return ImageFolderData(kind="image_folder", test=folder, **options)


def write_images(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    """Random images of these sizes (width, height), of the classes b and a in turn."""
    draw = np.random.default_rng(0)
    for number, (width, height) in enumerate(sizes):
        path = folder / "ba"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return folder


def test_image_folder(tmp_path: Path) -> None:
    for name, value in (("b", 255), ("a", 0)):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (6, 4), (value, 0, 0)).save(tmp_path / name / "1.png")
    _, test = load_data(recipe_of(tmp_path, resize=8, crop=6))
    assert test.inputs.shape == (2, 3, 6, 6)
    assert test.inputs[:, 0, 0, 0].tolist() == [0.0, 1.0]
    assert test.targets.tolist() == [0, 1]


def test_empty_image_folder(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="has no images; it should have a folder of images for each class"):
        load_data(recipe_of(tmp_path))


@pytest.mark.parametrize("kept", [0, 3 * 48, 2**30])
def test_images_are_the_same_whether_they_stay_decoded_or_not(
    tmp_path: Path, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "KEPT_BYTES", kept)
    _, test = load_data(recipe_of(write_images(tmp_path, [(4, 4)] * 7), mean=[0.5], std=[0.25]))
    files = sorted(tmp_path.rglob("*.png"))
    raw = np.stack([np.asarray(Image.open(path)) for path in files]).transpose(0, 3, 1, 2)
    expected = (torch.tensor(raw).float() / 255 - 0.5) / 0.25
    labels = torch.tensor(["ab".index(path.parent.name) for path in files])
    for index in (slice(0, 3), slice(3, 6), slice(6, 9), torch.tensor([5, 0, 5, 2]), slice(0, 3), slice(None)):
        x, y = test.batch(index)
        assert torch.equal(x, expected[index]) and torch.equal(y, labels[index])
    assert torch.equal(test.inputs, expected) and torch.equal(test.first(2).inputs, expected[:2])
    assert len(test.kept) == min(kept // 48, 7) and test.counted().tolist() == [1] * 7


def test_images_are_decoded_when_they_are_wanted(tmp_path: Path) -> None:
    write_images(tmp_path, [(4, 4), (4, 4), (4, 4), (6, 4)])  # in the classes' order 1, 3, 0, 2
    broken = tmp_path / "b" / "2.png"
    broken.write_bytes(broken.read_bytes()[:50])
    _, test = load_data(recipe_of(tmp_path))
    assert test.batch(torch.tensor([0]))[0].shape == (1, 3, 4, 4) and list(test.kept) == [0]
    with pytest.raises(RecipeError, match=r"cannot read the image .*b.2\.png: "):
        test.batch(torch.tensor([3]))
    with pytest.raises(RecipeError, match=r"differ in size, 4 × 4 and 6 × 4, the latter that of .*3\.png; give data"):
        test.batch(torch.tensor([1]))


def test_the_digest_of_images_is_of_their_names_lengths_and_preparation(tmp_path: Path) -> None:
    recipe = recipe_of(write_images(tmp_path, [(4, 4)] * 3))
    first = load_data(recipe)[1].digest()
    assert load_data(recipe)[1].digest() == first
    cropped = load_data(recipe_of(tmp_path, crop=2))[1]
    assert cropped.digest() != first and cropped.batch(slice(0, 3))[0].shape == (3, 3, 2, 2)
    path = tmp_path / "b" / "0.png"
    path.write_bytes(path.read_bytes() + b"\0")
    longer = load_data(recipe)[1].digest()
    path.rename(tmp_path / "a" / "0.png")
    assert len({first, longer, load_data(recipe)[1].digest()}) == 3


def test_images_of_a_table_are_those_of_the_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    folder = write_images(tmp_path / "images", [(4, 4)] * 4)
    load = {"path": "imagefolder", "data_dir": str(folder), "cache_dir": str(tmp_path / "cache")}
    tables = [datasets.load_dataset(**load, split="train") for _ in range(2)]
    recipe = HuggingFaceData(kind="huggingface", id="mine")
    found = [images.table_of_images(recipe, table, "image", torch.tensor(table["label"])) for table in tables]
    _, expected = load_data(recipe_of(folder))
    assert torch.equal(found[0].inputs, expected.inputs) and torch.equal(found[0].targets, expected.targets)
    assert found[0].digest() == found[1].digest() != found[0].first(3).digest()
