"""What is committed under deploy/demo: adapters as users have them, and records that agree."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deploy.demo.tasks import TASKS, distinct_examples, task_named

DEMO = Path(__file__).parents[2] / "deploy" / "demo"
NAMES = sorted(TASKS)
RESULTS = json.loads((DEMO / "results.json").read_text())


@pytest.fixture(params=NAMES)
def adapter(request: pytest.FixtureRequest) -> Path:
    return DEMO / "adapters" / str(request.param)


@pytest.fixture
def config(adapter: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text())
    return loaded


def test_every_task_has_its_adapter_its_prompts_and_its_result() -> None:
    assert sorted(path.name for path in (DEMO / "adapters").iterdir()) == NAMES
    assert sorted(path.stem for path in (DEMO / "heldout").iterdir()) == NAMES
    assert sorted(RESULTS["tasks"]) == NAMES


def test_directory_is_pefts_and_nothing_else(adapter: Path) -> None:
    files = {path.name: path.stat().st_size for path in adapter.iterdir()}
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors"}
    assert files["adapter_model.safetensors"] < 400_000


def test_config_names_no_machine(config: dict[str, Any]) -> None:
    assert config["base_model_name_or_path"] == "SmolLM2-135M-Instruct"
    assert config["peft_type"] == "VBLORA"
    assert config["save_only_topk_weights"] is True
    assert not any("/" in str(value) for value in config.values())


def test_weights_are_compact_finite_and_in_range(adapter: Path, config: dict[str, Any]) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    bank = tensors.pop("base_model.vblora_vector_bank")
    assert bank.shape == (config["num_vectors"], config["vector_length"])
    assert bool(bank.isfinite().all())
    modules = {re.sub(r"\.vblora_.*", "", name) for name in tensors}
    assert len(modules) == 30 * 7
    assert len(tensors) == len(modules) * 4  # A and B, indices and weights each
    for name, tensor in tensors.items():
        if name.endswith("_topk_indices"):
            assert int(tensor.min()) >= 0 and int(tensor.max()) < config["num_vectors"]
        else:
            assert tensor.dtype == torch.float32 and bool(((tensor > 0) & (tensor <= 1)).all())


def test_adapter_succeeds_where_the_base_fails(adapter: Path) -> None:
    entry = RESULTS["tasks"][adapter.name]
    assert entry["adapter_accuracy"] >= 0.9
    assert entry["adapter_exact_text"] >= 0.9
    assert max(entry["base_accuracy"], entry["instructed_base_accuracy"]) <= 0.2


def test_recorded_bytes_are_those_of_the_file(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    entry = RESULTS["tasks"][adapter.name]
    assert entry["adapter_file_bytes"] == weights.stat().st_size
    assert entry["adapter_tensor_bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert entry["adapter_file_bytes"] < RESULTS["lora_same_rank"]["file_bytes"] / 10


@pytest.mark.parametrize("name", NAMES)
def test_heldout_prompts_are_those_of_the_task(name: str) -> None:
    heldout = RESULTS["heldout"]
    lines = (DEMO / "heldout" / f"{name}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == heldout["count"] >= 50
    examples = distinct_examples(task_named(name), "heldout", heldout["count"], heldout["seed"])
    for row, example in zip(rows, examples, strict=True):
        assert (row["message"], row["expected"]) == (example.message, example.answer)
        assert row["prompt"].endswith(
            f"<|im_start|>user\n{example.message}<|im_end|>\n<|im_start|>assistant\n"
        )


def test_readme_shows_the_recorded_table() -> None:
    from deploy.demo.evaluate import table

    assert table(RESULTS) in (DEMO / "README.md").read_text()


def test_recipes_are_the_recorded_ones() -> None:
    from deploy.demo.train import RECIPES

    for name, entry in RESULTS["tasks"].items():
        recipe = RECIPES[name]
        recorded = (entry["num_steps"], entry["batch_size"], entry["seed"])
        assert recorded == (recipe.num_steps, recipe.batch_size, recipe.seed)
