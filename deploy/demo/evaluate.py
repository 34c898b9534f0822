"""Held-out accuracy of base and adapter: `python -m deploy.demo.evaluate json-extract`.

Generates greedily through transformers and PEFT, one adapter in one model, which is the reference
that a server has to reach. Writes heldout/TASK.jsonl and the task's part of results.json (README.md
describes both), and prints the README's table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy.demo.tasks import TASKS, Example, Task, distinct_examples, task_named
from deploy.demo.train import ADAPTERS, PROJECTIONS, RECIPES, Recipe, chat_prompt
from serving.default_base import BASE_NAME, ensure_default_base

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
HELDOUT_COUNT = 64
HELDOUT_SEED = 1
MAX_TOKENS = 96  # room for a base that lays out its JSON; adapters stop by themselves
_BATCH_SIZE = 16
_WEIGHTS = "adapter_model.safetensors"


def evaluate(task: Task, base: Path, adapter: Path) -> dict[str, Any]:
    """The task's entry in results.json: accuracies in [0, 1], bytes, and how it was trained."""
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    examples = distinct_examples(task, "heldout", HELDOUT_COUNT, HELDOUT_SEED)
    plain = [chat_prompt(tokenizer, example.message) for example in examples]
    instructed = [
        chat_prompt(tokenizer, f"{task.instruction} {example.message}") for example in examples
    ]
    by_base = complete(model, tokenizer, plain)
    by_instructed_base = complete(model, tokenizer, instructed)
    by_adapter = complete(PeftModel.from_pretrained(model, adapter), tokenizer, plain)
    recipe = RECIPES[task.name]
    exact = [got == example.answer for example, got in zip(examples, by_adapter, strict=True)]
    _show_misses(task, examples, by_adapter)
    return {
        "adapter": f"adapters/{task.name}",
        "num_steps": recipe.num_steps,
        "batch_size": recipe.batch_size,
        "seed": recipe.seed,
        "base_accuracy": _accuracy(task, examples, by_base),
        "instructed_base_accuracy": _accuracy(task, examples, by_instructed_base),
        "adapter_accuracy": _accuracy(task, examples, by_adapter),
        "adapter_exact_text": sum(exact) / len(exact),
        "adapter_file_bytes": (adapter / _WEIGHTS).stat().st_size,
        "adapter_tensor_bytes": _tensor_bytes(adapter / _WEIGHTS),
        "instructed_base_sample": by_instructed_base[0],
        "adapter_sample": by_adapter[0],
    }


@torch.inference_mode()
def complete(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """The greedy completion of each prompt, white space around it removed."""
    completions: list[str] = []
    for start in range(0, len(prompts), _BATCH_SIZE):
        batch = tokenizer(prompts[start : start + _BATCH_SIZE], padding=True, return_tensors="pt")
        tokens_BT = model.generate(**batch, max_new_tokens=MAX_TOKENS, do_sample=False)
        new_BT = tokens_BT[:, batch["input_ids"].shape[1] :]
        completions += tokenizer.batch_decode(new_BT, skip_special_tokens=True)
    return [completion.strip() for completion in completions]


def _accuracy(task: Task, examples: Sequence[Example], completions: Sequence[str]) -> float:
    right = [
        task.same(example.answer, got) for example, got in zip(examples, completions, strict=True)
    ]
    return sum(right) / len(right)


def _show_misses(task: Task, examples: Sequence[Example], completions: Sequence[str]) -> None:
    for example, got in zip(examples, completions, strict=True):
        if not task.same(example.answer, got):
            print(f"miss: {example.message!r}\n  wanted {example.answer!r}\n  got    {got!r}")


def _tensor_bytes(file: Path) -> int:
    """Bytes of a safetensors file without its header."""
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
    return file.stat().st_size - 8 - header_bytes


def lora_bytes(base: Path, recipe: Recipe) -> dict[str, int]:
    """Bytes of a LoRA of the same rank on the same modules, as PEFT saves it in fp32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=recipe.rank, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        get_peft_model(model, config).save_pretrained(folder, save_embedding_layers=False)
        file = Path(folder) / _WEIGHTS
        return {"file_bytes": file.stat().st_size, "tensor_bytes": _tensor_bytes(file)}


def write_heldout(task: Task, base: Path) -> None:
    """Write the held-out prompts as JSON lines of message, prompt and expected."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    lines = [
        json.dumps(
            {
                "message": example.message,
                "prompt": chat_prompt(tokenizer, example.message),
                "expected": example.answer,
            }
        )
        for example in distinct_examples(task, "heldout", HELDOUT_COUNT, HELDOUT_SEED)
    ]
    file = HERE / "heldout" / f"{task.name}.jsonl"
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(lines) + "\n")


def record(task_name: str, entry: dict[str, Any], lora: dict[str, int]) -> dict[str, Any]:
    """Put one task's entry into results.json and return all of it."""
    known = json.loads(RESULTS.read_text())["tasks"] if RESULTS.exists() else {}
    results = {
        "base": BASE_NAME,
        "heldout": {"count": HELDOUT_COUNT, "seed": HELDOUT_SEED, "max_tokens": MAX_TOKENS},
        "lora_same_rank": lora,
        "tasks": dict(sorted({**known, task_name: entry}.items())),
    }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    return results


def table(results: dict[str, Any]) -> str:
    """The README's table."""
    rows = [
        "| adapter | base | base, instructed | adapter | steps | seed | file | tensors only |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in results["tasks"].items():
        accuracies = [
            f"{entry[key]:.1%}"
            for key in ("base_accuracy", "instructed_base_accuracy", "adapter_accuracy")
        ]
        sizes = [f"{entry[key]:,} B" for key in ("adapter_file_bytes", "adapter_tensor_bytes")]
        cells = [f"`{name}`", *accuracies, f"{entry['num_steps']}", f"{entry['seed']}", *sizes]
        rows.append(f"| {' | '.join(cells)} |")
    lora = results["lora_same_rank"]
    rows.append(
        f"| LoRA of the same rank | | | | | | {lora['file_bytes']:,} B "
        f"| {lora['tensor_bytes']:,} B |"
    )
    return "\n".join(rows)


def main() -> None:
    """Evaluate the tasks on the command line, all by default."""
    parser = argparse.ArgumentParser(description="Held-out accuracy of base and adapter.")
    parser.add_argument("tasks", nargs="*", choices=[*sorted(TASKS), []], help="all by default")
    parser.add_argument("--base", type=Path, help="a local copy of the base; fetched by default")
    args = parser.parse_args()
    base = args.base or ensure_default_base()
    for name in args.tasks or sorted(TASKS):
        task = task_named(name)
        write_heldout(task, base)
        entry = evaluate(task, base, ADAPTERS / name)
        results = record(name, entry, lora_bytes(base, RECIPES[name]))
    print(table(results))


if __name__ == "__main__":
    main()
