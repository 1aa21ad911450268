"""SmolLM2-135M-Instruct with adapters to train: LoRA (Hu et al. 2021, arXiv 2106.09685) on every layer but the head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / ".cache" / "examples" / "smollm2"


def with_adapters(rank: int = 8, alpha: int = 16) -> tuple[Any, Any]:
    """The model, of which the adapters alone are trained, and its tokenizer.

    Raises:
        FileNotFoundError: the checkpoint has not been fetched.
        ImportError: peft is missing.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not FOLDER.exists():
        raise FileNotFoundError(f"{FOLDER} is missing; run `make fetch`, which downloads what the examples need")
    file = next(FOLDER.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=file, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, gguf_file=file)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config), tokenizer
