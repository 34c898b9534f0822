"""A random Llama that is slow enough to be caught in mid-stream, and what PEFT says with it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tiny_model import load_tokenizer, save_tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

MAX_MODEL_LEN = 8192


def save_model(path: Path) -> None:
    """Tiny model's tokenizer with more and wider layers, a long context, clear best tokens."""
    save_tiny_model(path)
    vocab_size = len(load_tokenizer(path))
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocab_size,
        max_position_embeddings=MAX_MODEL_LEN,
        initializer_range=0.12,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(path)


class Oracle:
    """Greedy tokens of transformers and PEFT, one adapter at a time."""

    def __init__(self, model: Path) -> None:
        self._model_path = model
        self._base = LlamaForCausalLM.from_pretrained(model).eval()

    def tokens(self, prompt: list[int], num_tokens: int, adapter: Path | None = None) -> list[int]:
        """The `num_tokens` most probable tokens; end-of-sequence ends nothing."""
        model: Any = self._base
        if adapter is not None:
            with warnings.catch_warnings():  # PEFT uses what transformers has deprecated
                warnings.simplefilter("ignore")
                fresh = LlamaForCausalLM.from_pretrained(self._model_path)
                model = PeftModel.from_pretrained(fresh, adapter).eval()
        with torch.inference_mode():
            answer = model.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=num_tokens,
                min_new_tokens=None,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        tokens: list[int] = answer[0, len(prompt) :].tolist()
        return tokens
