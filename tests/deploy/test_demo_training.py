"""The demo adapters' training script on a tiny base: what it leaves on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from training_base import write_small_base
from transformers import AutoTokenizer

from deploy.demo import train as training

RECIPE = training.Recipe(num_steps=3, batch_size=2, num_vectors=16, vector_length=32)


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, default_base: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(default_base)
    return write_small_base(tmp_path_factory.mktemp("tiny") / "base", tokenizer)


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
