"""A Llama of a few kilobytes with a tokenizer and a chat template, and PEFT adapters of it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, VBLoRAConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXTS = [
    "The quick brown fox jumps over the lazy dog, twice a day. ",
    "Hello there, how are you? Fine so far.\n\n",
    "naïve café — 東京都 🙂",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] == 'forbidden' %}{{ raise_exception('not this') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MAX_MODEL_LEN = 256


def save_tiny_model(path: Path) -> None:
    """Write model and tokenizer to `path`; the end-of-sequence token is <|im_end|>."""
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_MODEL_LEN,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(path)


def load_tokenizer(path: Path) -> Any:
    return AutoTokenizer.from_pretrained(path)


def _tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_vblora(model: Path, path: Path, *, seed: int = 0) -> None:
    """A VB-LoRA adapter as PEFT saves it, only the top-k weights."""
    config = VBLoRAConfig(
        r=4,
        num_vectors=32,
        vector_length=16,
        target_modules=["q_proj", "v_proj"],
        save_only_topk_weights=True,
        task_type="CAUSAL_LM",
    )
    _save(model, path, config, seed)


def save_dora(model: Path, path: Path) -> None:
    """A DoRA adapter, whose registration reads the base's weights."""
    config = LoraConfig(r=4, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM")
    _save(model, path, config, 0)


def save_unserved(model: Path, path: Path) -> None:
    """An adapter that is not served: with biases."""
    config = LoraConfig(r=4, lora_bias=True, target_modules=["q_proj"], task_type="CAUSAL_LM")
    _save(model, path, config, 0)


def _save(model: Path, path: Path, config: Any, seed: int) -> None:
    with warnings.catch_warnings():  # PEFT uses what transformers has deprecated
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(LlamaForCausalLM.from_pretrained(model), config)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in peft_model.named_parameters():
            if "vblora" in name:
                parameter.data.normal_(0, 1, generator=generator)
        peft_model.save_pretrained(path)
