"""The training script on a tiny base: its loss against a plain one, and what it leaves on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from deploy.demo import train as training
from deploy.demo.tasks import Example, distinct_examples, task_named

# transformers warns that PEFT 0.21 asks for an attribute by its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

RECIPE = training.Recipe(num_steps=3, batch_size=2, num_vectors=16, vector_length=32)


@pytest.fixture(scope="module")
def tokenizer(default_base: Path) -> Any:
    return AutoTokenizer.from_pretrained(default_base)


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Two layers of random weights with the real tokenizer."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tiny-base")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def _plain_loss(model: Any, tokenizer: Any, batch: list[Example]) -> torch.Tensor:
    """Each example by itself, its whole text through the whole model."""
    losses = []
    for example in batch:
        prompt = tokenizer(training.chat_prompt(tokenizer, example.message)).input_ids
        answer = [*tokenizer(example.answer).input_ids, tokenizer.eos_token_id]
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
        predicting = logits[len(prompt) - 1 : -1]
        losses.append(functional.cross_entropy(predicting, torch.tensor(answer), reduction="none"))
    return torch.cat(losses).mean()


@pytest.mark.parametrize("batch_size", [1, 5])
def test_loss_and_gradients_are_those_of_the_plain_loss(
    batch_size: int, tiny_base: Path, tokenizer: Any
) -> None:
    torch.manual_seed(1)
    model = training._new_adapter(tiny_base, RECIPE)
    batch = distinct_examples(task_named("text-to-sql"), "train", batch_size, 0)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    loss, plain = (
        make_loss(model, tokenizer, batch) for make_loss in (training._answer_loss, _plain_loss)
    )
    torch.testing.assert_close(loss, plain)
    pairs = zip(
        torch.autograd.grad(loss, trained), torch.autograd.grad(plain, trained), strict=True
    )
    for gradient, expected in pairs:
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


def test_the_same_seed_gives_the_same_directory(tiny_base: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        training.train("classify", RECIPE, tiny_base, tmp_path / name)
    first, second = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        for name in ("first", "second")
    )
    assert sorted(first) == ["adapter_config.json", "adapter_model.safetensors"]
    assert first == second
    config = json.loads(first["adapter_config.json"])
    assert config["base_model_name_or_path"] == "SmolLM2-135M-Instruct"
    assert str(tiny_base) not in json.dumps(config)


def test_bank_and_logits_have_the_papers_learning_rates(tiny_base: Path) -> None:
    model = training._new_adapter(tiny_base, RECIPE)
    bank, logits = training._optimizer(model, RECIPE).param_groups
    assert (bank["lr"], logits["lr"]) == (1e-3, 1e-2)
    assert [tuple(weight.shape) for weight in bank["params"]] == [(16, 32)]
    assert len(logits["params"]) == 2 * 7 * 2
