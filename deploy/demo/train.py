"""Train one demo adapter with PEFT: `python -m deploy.demo.train json-extract`.

VB-LoRA (arXiv 2405.15179) on all seven linear layers of the default base, with the paper's learning
rates; the loss is over the answer's tokens and the end-of-sequence token only. What an example is
comes from tasks.py; how well the result does is evaluate.py's question.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, VBLoRAConfig, get_peft_model
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy.demo.tasks import TASKS, Example, distinct_examples, task_named
from serving.default_base import BASE_NAME, ensure_default_base

ADAPTERS = Path(__file__).parent / "adapters"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Recipe:
    """How an adapter is trained. Learning rates are the paper's, and fall linearly to zero."""

    num_steps: int = 300
    batch_size: int = 4
    seed: int = 0
    bank_learning_rate: float = 1e-3
    logits_learning_rate: float = 1e-2
    rank: int = 4
    topk: int = 2
    num_vectors: int = 256
    vector_length: int = 96


RECIPES = {
    "json-extract": Recipe(),
    "text-to-sql": Recipe(),
    "formal": Recipe(num_steps=240),
    "classify": Recipe(num_steps=240),
}
"""What the committed adapters were trained with."""


def chat_prompt(tokenizer: Any, message: str) -> str:
    """The text that asks the model for its answer to one user message."""
    chat = [{"role": "user", "content": message}]
    return str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))


def train(task_name: str, recipe: Recipe, base: Path, out: Path) -> None:
    """Train on the task's training split and write the adapter to the directory `out`."""
    torch.manual_seed(recipe.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = _new_adapter(base, recipe)
    optimizer = _optimizer(model, recipe)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, recipe.num_steps)
    count = recipe.num_steps * recipe.batch_size
    examples = distinct_examples(task_named(task_name), "train", count, recipe.seed)
    start = time.monotonic()
    for step in range(recipe.num_steps):
        batch = examples[step * recipe.batch_size : (step + 1) * recipe.batch_size]
        loss = _answer_loss(model, tokenizer, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 10 == 9:
            elapsed = time.monotonic() - start
            print(f"{task_name} step {step + 1} loss {loss.item():.4f} {elapsed:.0f} s", flush=True)
    _save(model, out)


def _new_adapter(base: Path, recipe: Recipe) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = VBLoRAConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        topk=recipe.topk,
        num_vectors=recipe.num_vectors,
        vector_length=recipe.vector_length,
        target_modules=list(PROJECTIONS),
        vblora_dropout=0.0,
        save_only_topk_weights=True,
    )
    return get_peft_model(model, config)


def _optimizer(model: PeftModel, recipe: Recipe) -> torch.optim.Optimizer:
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    bank = [weight for name, weight in trained if "vector_bank" in name]
    logits = [weight for name, weight in trained if "vector_bank" not in name]
    groups = [
        {"params": bank, "lr": recipe.bank_learning_rate},
        {"params": logits, "lr": recipe.logits_learning_rate},
    ]
    return torch.optim.AdamW(groups, weight_decay=0.0)


def _answer_loss(model: PeftModel, tokenizer: Any, batch: Sequence[Example]) -> Tensor:
    """Mean cross-entropy of the answers' tokens, the end-of-sequence token included."""
    prompts = [tokenizer(chat_prompt(tokenizer, example.message)).input_ids for example in batch]
    answers = [tokenizer(example.answer + tokenizer.eos_token).input_ids for example in batch]
    shared = _shared_start(prompts)
    hidden_BTD = _hidden_states(
        model, shared, [p + a for p, a in zip(prompts, answers, strict=True)]
    )
    predicting, targets = [], []
    for hidden_TD, prompt, answer in zip(hidden_BTD, prompts, answers, strict=True):
        first = len(prompt) - len(shared) - 1  # the prompt's last token predicts the answer's first
        predicting.append(hidden_TD[first : first + len(answer)])
        targets += answer
    logits_NV = model.get_base_model().lm_head(torch.cat(predicting))
    return functional.cross_entropy(logits_NV, torch.tensor(targets))


def _shared_start(prompts: Sequence[list[int]]) -> list[int]:
    """The tokens with which all prompts begin, short of any prompt's last token."""
    shared = 0
    while len({tuple(prompt[: shared + 1]) for prompt in prompts}) == 1:
        shared += 1
        if shared == min(map(len, prompts)) - 1:
            break
    return prompts[0][:shared]


def _hidden_states(model: PeftModel, shared: list[int], rows: Sequence[list[int]]) -> Tensor:
    """Last hidden states (B, T, D) of each row after the shared start, padded on the right.

    The shared start is a third to a half of all tokens: it is computed once for the whole batch.
    """
    decoder = model.get_base_model().model
    cache = decoder(input_ids=torch.tensor([shared]), use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(rows))
    rests = [torch.tensor(row[len(shared) :]) for row in rows]
    attended = [torch.ones(len(row), dtype=torch.long) for row in rows]
    hidden: Tensor = decoder(
        input_ids=pad_sequence(rests, batch_first=True),
        attention_mask=pad_sequence(attended, batch_first=True),
        past_key_values=cache,
    ).last_hidden_state
    return hidden


def _save(model: PeftModel, out: Path) -> None:
    config = model.peft_config["default"]
    config.base_model_name_or_path = BASE_NAME  # not the path that it had on this machine
    config.target_modules = list(PROJECTIONS)  # a set until here, of another order in each run
    model.save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)  # PEFT's empty form


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("--base", type=Path, help="a local copy of the base; fetched by default")
    parser.add_argument(
        "--out", type=Path, help="the adapter's directory, adapters/TASK by default"
    )
    parser.add_argument("--steps", type=int, help="the task's recipe by default")
    parser.add_argument("--seed", type=int, help="the task's recipe by default")
    args = parser.parse_args()
    given = {"num_steps": args.steps, "seed": args.seed}
    changes = {name: value for name, value in given.items() if value is not None}
    recipe = replace(RECIPES[args.task], **changes)
    train(args.task, recipe, args.base or ensure_default_base(), args.out or ADAPTERS / args.task)


if __name__ == "__main__":
    main()
