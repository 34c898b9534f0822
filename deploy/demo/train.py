"""Train one demo adapter with PEFT: `python -m deploy.demo.train json-extract`.

VB-LoRA (arXiv 2405.15179) on all seven linear layers of the default base, as `vbserve train` does
it, but with each example used once, in the order in which tasks.py makes them. How well the result
does is evaluate.py's question.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from adapters.training.examples import Example, make_example
from adapters.training.loop import BatchOf
from adapters.training.recipe import Recipe
from adapters.training.trainer import AdapterTrainer
from core.factors import PROJECTIONS
from deploy.demo.tasks import TASKS, Task, distinct_examples, task_named
from deploy.demo.tasks import Example as TaskExample
from serving.default_base import BASE_NAME, ensure_default_base

__all__ = ["ADAPTERS", "PROJECTIONS", "RECIPES", "Recipe", "chat_prompt", "train"]

ADAPTERS = Path(__file__).parent / "adapters"

RECIPES = {
    "json-extract": Recipe(vector_length=96),
    "text-to-sql": Recipe(vector_length=96),
    "formal": Recipe(num_steps=240, vector_length=96),
    "classify": Recipe(num_steps=240, vector_length=96),
}
"""What the committed adapters were trained with."""


def chat_prompt(tokenizer: Any, message: str) -> str:
    """The text that asks the model for its answer to one user message."""
    chat = [{"role": "user", "content": message}]
    return str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))


def tokenised(examples: Sequence[TaskExample], tokenizer: Any) -> list[Example]:
    """Messages and answers as chats, in tokens."""
    return [
        make_example(
            {
                "messages": [
                    {"role": "user", "content": example.message},
                    {"role": "assistant", "content": example.answer},
                ]
            },
            tokenizer,
        )
        for example in examples
    ]


def batches(task: Task, recipe: Recipe, base: Path) -> BatchOf:
    """Each training example once, in the order in which they are made."""
    size = recipe.batch_size
    made = distinct_examples(task, "train", recipe.num_steps * size, recipe.seed)
    examples = tokenised(made, AutoTokenizer.from_pretrained(base))
    return lambda step: examples[step * size : (step + 1) * size]


def train(task_name: str, recipe: Recipe, base: Path, out: Path) -> None:
    """Train on the task's training split and write the adapter to the directory `out`."""
    trainer = AdapterTrainer(base, recipe, batches(task_named(task_name), recipe, base))
    start = time.monotonic()
    while not trainer.is_done:
        loss = trainer.step()
        if trainer.num_done % 10 == 0:
            elapsed = time.monotonic() - start
            print(
                f"{task_name} step {trainer.num_done} loss {loss:.4f} {elapsed:.0f} s", flush=True
            )
    trainer.save(out, BASE_NAME)


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
