"""Training VB-LoRA: data, settings, the loss against a plain one, resuming, a shared bank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from training_base import write_small_base
from transformers import AutoTokenizer

from adapters import AdapterStore, CompactVBLoRA, read_peft_adapter
from adapters.training.errors import TrainingError
from adapters.training.examples import Example, make_example, read_examples
from adapters.training.loss import answer_loss
from adapters.training.recipe import Recipe
from adapters.training.trainer import AdapterTrainer, shuffled
from core.model_config import read_base_info, read_model_config

RECIPE = Recipe(num_steps=6, batch_size=2, num_vectors=16, vector_length=32)


@pytest.fixture(scope="module")
def tokenizer(default_base: Path) -> Any:
    return AutoTokenizer.from_pretrained(default_base)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return write_small_base(tmp_path_factory.mktemp("training") / "base", tokenizer)


@pytest.fixture(scope="module")
def examples(tokenizer: Any) -> list[Example]:
    """Chats, which begin alike, and texts, which do not."""
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"What comes after {number}?"},
                {"role": "assistant", "content": f"{number + 1}, of course."},
            ]
        }
        for number in range(4)
    ]
    texts = [
        {"prompt": prompt, "completion": completion}
        for prompt, completion in (("One, two,", " three"), ("A, B", ", C"), ("Red", " and blue"))
    ]
    return [make_example(content, tokenizer) for content in chats + texts]


def trainer_of(base: Path, examples: list[Example], **options: Any) -> AdapterTrainer:
    return AdapterTrainer(base, RECIPE, shuffled(examples, RECIPE), **options)


def run(trainer: AdapterTrainer, steps: int | None = None) -> list[float]:
    losses = []
    while not trainer.is_done and len(losses) != steps:
        losses.append(trainer.step())
    return losses


def plain_loss(model: Any, batch: list[Example]) -> torch.Tensor:
    """Each example by itself, its whole text through the whole model."""
    losses = []
    for example in batch:
        ids = torch.tensor([[*example.prompt, *example.answer]])
        predicting = model(input_ids=ids).logits[0][len(example.prompt) - 1 : -1]
        targets = torch.tensor(example.answer)
        losses.append(functional.cross_entropy(predicting, targets, reduction="none"))
    return torch.cat(losses).mean()


@pytest.mark.parametrize("chosen", [[0], [0, 1, 2, 3], [4, 5, 6], [0, 4]], ids=str)
def test_loss_and_gradients_are_those_of_the_plain_loss(
    chosen: list[int], base: Path, examples: list[Example]
) -> None:
    model = trainer_of(base, examples).model
    batch = [examples[number] for number in chosen]
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    loss, plain = answer_loss(model, batch), plain_loss(model, batch)
    torch.testing.assert_close(loss, plain)
    pairs = zip(
        torch.autograd.grad(loss, trained), torch.autograd.grad(plain, trained), strict=True
    )
    for gradient, expected in pairs:
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


def test_bank_and_logits_have_the_papers_learning_rates(
    base: Path, examples: list[Example]
) -> None:
    bank, logits = trainer_of(base, examples).optimizer.param_groups
    assert (bank["lr"], logits["lr"]) == (1e-3, 1e-2)
    assert [tuple(weight.shape) for weight in bank["params"]] == [(16, 32)]
    assert len(logits["params"]) == 2 * 7 * 2


@pytest.mark.parametrize("interrupted_after", [1, 4])
def test_a_resumed_training_ends_as_one_that_was_not_interrupted(
    interrupted_after: int, base: Path, examples: list[Example], tmp_path: Path
) -> None:
    whole = trainer_of(base, examples)
    losses = run(whole)
    first = trainer_of(base, examples)
    begun = run(first, interrupted_after)
    first.write_state(tmp_path / "state.pt", {"curve": [{"step": 1}]})
    second = trainer_of(base, examples)
    assert second.read_state(tmp_path / "state.pt") == {"curve": [{"step": 1}]}
    assert begun + run(second) == losses
    for name, trainer in (("whole", whole), ("second", second)):
        trainer.save(tmp_path / name, "base")
    files = [
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        for name in ("whole", "second")
    ]
    assert files[0] == files[1]
    assert sorted(files[0]) == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads(files[0]["adapter_config.json"])["base_model_name_or_path"] == "base"


def test_a_state_of_other_settings_is_refused(
    base: Path, examples: list[Example], tmp_path: Path
) -> None:
    trainer_of(base, examples).write_state(tmp_path / "s.pt", {})
    other = Recipe(num_steps=6, batch_size=2, num_vectors=16, vector_length=32, rank=2)
    with pytest.raises(TrainingError, match="was made with rank 4, not 2"):
        AdapterTrainer(base, other, shuffled(examples, other)).read_state(tmp_path / "s.pt")
    bank = torch.randn(16, 32)
    with pytest.raises(TrainingError, match="was made with train_bank True, not False"):
        trainer_of(base, examples, bank=bank).read_state(tmp_path / "s.pt")


def test_it_learns(base: Path, examples: list[Example]) -> None:
    rates = {"bank_learning_rate": 0.03, "logits_learning_rate": 0.1}
    recipe = Recipe(num_steps=80, num_vectors=32, vector_length=32, rank=8, **rates)
    trainer = AdapterTrainer(base, recipe, shuffled(examples, recipe))
    before = trainer.loss_over(examples)
    run(trainer)
    assert trainer.loss_over(examples) < before - 0.5  # its head is as random as its layers


def test_loss_over_many_is_the_mean_over_their_tokens(base: Path, examples: list[Example]) -> None:
    trainer = trainer_of(base, examples)
    with torch.no_grad():
        expected = float(plain_loss(trainer.model, examples))
    assert trainer.loss_over(examples) == pytest.approx(expected, rel=1e-5)


def test_a_shared_bank_stays_and_is_stored_once(
    base: Path, examples: list[Example], tmp_path: Path
) -> None:
    first = trainer_of(base, examples)
    run(first)
    first.save(tmp_path / "first", "base")
    info = read_base_info(base)
    owner = read_peft_adapter(tmp_path / "first", info)
    assert isinstance(owner, CompactVBLoRA)
    recipe = Recipe(num_steps=3, batch_size=2, seed=1)  # the bank says how many and how long
    second = AdapterTrainer(base, recipe, shuffled(examples, recipe), bank=owner.bank.vectors_HB)
    (group,) = second.optimizer.param_groups
    assert group["lr"] == 1e-2 and second.recipe.num_vectors == 16
    run(second)
    second.save(tmp_path / "second", "base")
    other = read_peft_adapter(tmp_path / "second", info)
    assert isinstance(other, CompactVBLoRA)
    assert other.bank.digest == owner.bank.digest and other.digest != owner.digest
    store = AdapterStore.open(tmp_path / "store", info)
    for name in ("first", "second"):
        store.add(name, tmp_path / name)
    assert len(list((tmp_path / "store").rglob("*bank*/*"))) <= 2


def test_each_pass_has_every_example_once_in_another_order(examples: list[Example]) -> None:
    recipe = Recipe(batch_size=7, num_steps=3)
    passes = [list(shuffled(examples, recipe)(step)) for step in range(3)]
    for drawn in passes:
        assert sorted(drawn, key=lambda e: e.text) == sorted(examples, key=lambda e: e.text)
    assert passes[0] != passes[1] != passes[2]


def test_the_longest_vector_that_fits(base: Path) -> None:
    config = read_model_config(base)
    assert Recipe().length_for(config) == 32  # of 64, 32 and 96
    assert Recipe(target_modules=("q_proj",)).length_for(config) == 64
    with pytest.raises(TrainingError, match="vector_length is 48, must divide 32"):
        Recipe(vector_length=48).length_for(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"bank_learning_rate": 0.0}, "bank_learning_rate is 0.0"),
        ({"logits_learning_rate": float("nan")}, "logits_learning_rate is nan"),
        ({"topk": 9, "num_vectors": 8}, "topk is 9, must be at most num_vectors"),
        ({"target_modules": ("q_proj", "lm_head")}, "lm_head"),
        ({"target_modules": ()}, "nothing"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        Recipe(**settings)


def test_a_chat_is_what_its_template_makes_of_it(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    example = make_example({"messages": messages}, tokenizer)
    text = tokenizer.decode([*example.prompt, *example.answer])
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>")
    assert example.text == "Hello."


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: no JSON"),
        ("[1]", "line 2: .*no JSON object"),
        ("{}", "line 2: its keys are none, must be prompt and completion, or messages"),
        ('{"prompt": "a"}', "line 2: its keys are prompt"),
        ('{"prompt": "a", "completion": 3}', "line 2: completion is '3', must be a string"),
        ('{"prompt": "", "completion": "b"}', "line 2: prompt and answer must not be empty"),
        ('{"prompt": "a", "completion": ""}', "line 2: prompt and answer must not be empty"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "line 2: messages must be"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}',
            "line 2: messages must be",
        ),
        ('{"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}', "messages"),
        (json.dumps({"prompt": "word " * 50, "completion": "b"}), "line 2: 5. tokens, must be at"),
    ],
)
def test_bad_lines_are_named(line: str, message: str, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "data").write_text('{"prompt": "a", "completion": "b"}\n' + line + "\n")
    with pytest.raises(TrainingError, match=message):
        read_examples(tmp_path / "data", tokenizer, 20)


def test_a_file_without_examples(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("\n\n")
    with pytest.raises(TrainingError, match="has no examples"):
        read_examples(tmp_path / "data", tokenizer, 20)


def test_a_file_that_is_no_text(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(TrainingError, match="is not in UTF-8"):
        read_examples(tmp_path / "data", tokenizer, 20)


def test_line_separators_inside_a_string_end_no_line(tokenizer: Any, tmp_path: Path) -> None:
    content = {"prompt": "a\u2028b\x85c", "completion": " d"}
    (tmp_path / "data").write_text(json.dumps(content, ensure_ascii=False) + "\n")
    (example,) = read_examples(tmp_path / "data", tokenizer, 20)
    assert tokenizer.decode(example.prompt) == content["prompt"]


def test_a_base_without_a_chat_template(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    plain.chat_template = None
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    with pytest.raises(TrainingError, match="no chat template"):
        make_example({"messages": messages}, plain)
