"""docs/huggingface.md: its Python runs as it stands, on a tiny Llama."""

import re
from pathlib import Path

import pytest
import torch

import fmaq
from huggingface_cases import inputs, tiny
from test_huggingface_training import MAP

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "huggingface.md").read_text(encoding="utf-8")


def test_the_python_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    monkeypatch.chdir(tmp_path)
    tiny("llama", num_hidden_layers=1).save_pretrained("llama")
    ids = inputs("llama", 4)["input_ids"]
    device_map = {name: place for name, place in MAP.items() if name != "model.layers.1"}
    names = {"checkpoint": "llama", "batches": [{"input_ids": ids}], "prompt": ids[:, :3], "torch": torch}
    names |= {"device_map": device_map, "targets": ["q_proj", "v_proj"]}
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 6
    for block in blocks:
        exec(compile(block, "huggingface.md", "exec"), names)
    restored = fmaq.from_pretrained(peft.AutoPeftModelForCausalLM, "adapter")
    assert torch.equal(restored(ids).logits, names["adapted"].eval()(ids).logits)
