"""One tiny model, its oracle and three adapters, shared by the tests of the engine."""

from pathlib import Path

import pytest
import torch
from memory_factors import random_factors
from tiny_models import QUERY_VALUE, write_tiny_llama
from transformers import LlamaForCausalLM
from transformers_oracle import load_reference

from core.factors import AdapterFactors
from core.model_config import ModelConfig, read_model_config


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_config(tiny_path: Path) -> ModelConfig:
    return read_model_config(tiny_path)


@pytest.fixture(scope="session")
def reference(tiny_path: Path) -> LlamaForCausalLM:
    return load_reference(tiny_path)


@pytest.fixture(scope="session")
def adapters(tiny_config: ModelConfig) -> dict[str, AdapterFactors]:
    """Of ranks 1 to 16, of all modules or few, of all layers or one, scaled or not."""
    config = tiny_config
    made = (
        random_factors(config, "all-4", rank=4),
        random_factors(config, "one-1", rank=1, projections=QUERY_VALUE, std=0.5),
        random_factors(config, "mlp-2", rank=2, projections=("gate_proj", "down_proj"), scale=2.5),
        random_factors(config, "wide-16", rank=16, std=0.08, scale=0.5),
        random_factors(config, "last-8", rank=8, layers=(1,), projections=("o_proj", "up_proj")),
        random_factors(config, "mixed", rank={"q_proj": 1, "k_proj": 3, "down_proj": 6},
                       projections=("q_proj", "k_proj", "down_proj"), std=0.3),
    )  # fmt: skip
    return {factors.digest: factors for factors in made}


@pytest.fixture(params=[True, False], ids=["kernels", "torch"])
def compiled(request: pytest.FixtureRequest) -> bool:
    """Whether the compiled kernels are used, or torch's operations."""
    return bool(request.param)
