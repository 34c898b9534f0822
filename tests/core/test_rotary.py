"""Rotary tables that are kept and those that are computed are transformers' own."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from core.model_config import ModelConfig
from core.rotary import Rotary

POSITIONS = [[0], [3, 0, 700], [1023], [5, 1024], [0, 8191, 2], [8192, 7], [100_000]]


@pytest.mark.parametrize("order", [POSITIONS, POSITIONS[::-1]], ids=["rising", "falling"])
def test_tables_of_any_positions(order: list[list[int]], tiny_config: ModelConfig) -> None:
    """Whatever positions came before: those that are kept grow with what is asked for."""
    rotary = Rotary(tiny_config, torch.device("cpu"), torch.float32)
    oracle = LlamaRotaryEmbedding(tiny_config.hf)
    for positions in order:
        position_T = torch.tensor(positions)
        expected = oracle(torch.zeros(1), position_T[None])
        for table_TD, expected_1TD in zip(rotary.tables(position_T, None), expected, strict=True):
            assert torch.equal(table_TD, expected_1TD[0])
