"""README: its Python runs as it stands, and its commands name what there is; `make readme` runs the commands."""

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from typer.main import get_command

import fmaq
from fmaq.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme", ROOT / ".ci" / "readme.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


COMMANDS = list(script().commands(README))


class Network(nn.Module):
    """Has the layers that README names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.layer1 = nn.Sequential(nn.ModuleDict({"conv1": nn.Conv2d(4, 4, 3)}))
        self.classifier = nn.Sequential(nn.Linear(4, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.layer1[0]["conv1"](self.conv1(x)).mean((2, 3)))


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model, a, b = Network(), torch.randn(4, 8), torch.randn(8, 3)
    x, q = torch.randn(2, 3, 8, 8), torch.randn(1, 2, 4, 8)
    names = {"model": model, "batches": [torch.randn(2, 3, 8, 8)], "x": x, "a": a, "b": b, "q": q, "k": q, "v": q}
    images = {"weight": torch.randn(4, 3, 3, 3), "bias": torch.randn(4)}
    blocks = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names | images | {"fmaq": fmaq} if block is blocks[2] else names)
    assert isinstance(names["policy"], fmaq.Policy) and names["events"]["layer1.0.conv1"].steps > 0


def test_the_script_finds_the_commands_and_what_they_need() -> None:
    text = (
        "```sh\nmake a  # why\nfmaq b -a 'x y'\n```\n\n<!-- needs data -->\n```sh\nmake c\n```\n```yaml\nno: 1\n```\n"
    )
    assert list(script().commands(text)) == [("make a", None), ("fmaq b -a 'x y'", None), ("make c", "data")]


@pytest.mark.parametrize("command", [command for command, _ in COMMANDS])
def test_the_readmes_commands_name_what_there_is(command: str) -> None:
    first, *words = shlex.split(command)
    if first == "make":
        assert re.search(rf"^{words[0]}: ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        return
    assert first == "fmaq"
    group = get_command(app)
    while hasattr(group, "commands"):
        group = group.commands[words.pop(0)]
    options = {name for parameter in group.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if word.startswith("-")} <= options
    assert all((ROOT / word).is_file() for word in words if word.endswith(".yaml") and not word.startswith("runs/"))


def test_only_what_cannot_be_had_with_the_package_is_left_out_and_every_command_is_shown() -> None:
    needing = [command for command, needs in COMMANDS if needs is not None]
    assert all(re.search("fetch|minilm|smollm2|resnet20|reproduce", command) for command in needing)
    shown = {command.split()[1] for command, needs in COMMANDS if command.startswith("fmaq") and needs is None}
    assert shown | {"demo"} == set(get_command(app).commands)  # `make demo` is `fmaq demo`
    assert set(script().QUICK) <= {command for command, _ in COMMANDS}
