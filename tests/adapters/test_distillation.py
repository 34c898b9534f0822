"""A fit that is trained on: the divergence it begins with and lowers, and what stays as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft_oracle import LlamaOnDisk, load_in_peft, save_lora
from torch.nn import functional
from training_base import write_small_base
from transformers import AutoTokenizer

from adapters import CompactVBLoRA, read_peft_adapter, rebuild_factors
from adapters.training.distillation import Distillation
from adapters.training.examples import Example, make_example
from adapters.training.fitting import balanced, fit_bank, sub_vectors
from adapters.training.recipe import Recipe
from adapters.training.trainer import shuffled
from adapters.training.vblora_files import write_vblora
from core.model_config import read_base_info

RECIPE = Recipe(num_steps=30, batch_size=2)


@pytest.fixture(scope="module")
def tokenizer(default_base: Path) -> Any:
    return AutoTokenizer.from_pretrained(default_base)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return write_small_base(tmp_path_factory.mktemp("distillation") / "base", tokenizer)


@pytest.fixture(scope="module")
def examples(tokenizer: Any) -> list[Example]:
    return [
        make_example({"prompt": f"{n} and", "completion": f" {n + 1}, {n + 2}"}, tokenizer)
        for n in range(6)
    ]


def fitted(base: Path, root: Path, topk: int, **settings: Any) -> tuple[Path, Path, Any]:
    """A LoRA adapter, its fit, and the LoRA's pairs."""
    save_lora(LlamaOnDisk(base), root / "lora", lora_alpha=40, **settings)
    wanted = rebuild_factors(read_peft_adapter(root / "lora", read_base_info(base))).pairs
    pairs = {key: balanced(pair, 4) for key, pair in wanted.items()}
    fit = fit_bank(sub_vectors(pairs, 16), num_vectors=32, topk=topk, rounds=4)
    write_vblora(root / "fit", fit, pairs, "base")
    return root / "lora", root / "fit", wanted


def plain_divergence(base: Path, lora: Path, fit: Path, examples: list[Example]) -> float:
    """Each example by itself through two models of PEFT's."""
    teacher, student = (load_in_peft(LlamaOnDisk(base), path) for path in (lora, fit))
    sums, tokens = 0.0, 0
    for example in examples:
        ids = torch.tensor([[*example.prompt, *example.answer]])
        places = slice(len(example.prompt) - 1, -1)
        with torch.no_grad():
            wanted, own = (m(input_ids=ids).logits[0][places] for m in (teacher, student))
        loss = functional.kl_div(
            own.log_softmax(-1), wanted.log_softmax(-1), reduction="sum", log_target=True
        )
        sums, tokens = sums + loss.item(), tokens + len(example.answer)
    return sums / tokens


@pytest.mark.parametrize(
    ("topk", "settings"), [(2, {}), (1, {}), (3, {"target_modules": ["v_proj", "down_proj"]})]
)
def test_answers_come_nearer_to_the_teachers(
    topk: int, settings: dict[str, Any], base: Path, examples: list[Example], tmp_path: Path
) -> None:
    lora, fit, teacher = fitted(base, tmp_path, topk, **settings)
    info = read_base_info(base)
    before = read_peft_adapter(fit, info)
    training = Distillation(base, fit, teacher, RECIPE, shuffled(examples, RECIPE))
    begun = training.loss_over(examples)
    assert begun == pytest.approx(plain_divergence(base, lora, fit, examples), rel=1e-3)
    while not training.is_done:
        training.step()
    ended = training.loss_over(examples)
    assert ended < 0.9 * begun
    training.save(fit, "base")
    assert plain_divergence(base, lora, fit, examples) == pytest.approx(ended, rel=1e-3)
    after = read_peft_adapter(fit, info)
    assert isinstance(before, CompactVBLoRA) and isinstance(after, CompactVBLoRA)
    assert after.modules == before.modules
    same = after.indices_NK.sort(1).values == before.indices_NK.sort(1).values
    assert same.float().mean() > 0.95, "other vectors are mixed than the fit's"


def test_a_weight_of_zero_is_no_trap(base: Path, examples: list[Example], tmp_path: Path) -> None:
    """PEFT makes -inf or NaN of stored weights that leave nothing for the last one."""
    from safetensors.torch import load_file, save_file

    _, fit, teacher = fitted(base, tmp_path, 2)
    file = fit / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("_topk_weights"):
            tensor[0] = 1.0
            tensor[-1] = 1.0 + 1e-6
    save_file(tensors, file, {"format": "pt"})
    training = Distillation(base, fit, teacher, RECIPE, shuffled(examples, RECIPE))
    assert all(torch.isfinite(torch.tensor(training.step())) for _ in range(3))
    for name, weight in training.model.named_parameters():
        assert torch.isfinite(weight).all(), name
