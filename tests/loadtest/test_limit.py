"""The least time of a wave, counted by hand on a shape that fits into the head."""

import json
from pathlib import Path

import pytest

from loadtest.bench.limit import (
    BaseShape,
    MachineSpeed,
    limits_of,
    measure_speed,
    read_shape,
    step_seconds,
    wave_limit,
)
from loadtest.bench.plan import SHORT

SHAPE = BaseShape(body_weights=100, head_weights=10, attention=3, kv=2)
SLOW_ARITHMETIC = MachineSpeed(flops_per_second=1.0, bytes_per_second=1e12)
SLOW_MEMORY = MachineSpeed(flops_per_second=1e12, bytes_per_second=1.0)


def test_the_shape_is_that_of_the_config(tmp_path: Path) -> None:
    config = {
        "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "vocab_size": 5,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    per_layer = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 3 * 8 * 16
    assert read_shape(tmp_path) == BaseShape(3 * per_layer, 40, 24, 24)


def test_a_prompt_meets_the_body_in_each_row_and_the_head_once() -> None:
    # 2 sequences of 3 tokens: row k sees k places, 6 in all; scores and sums are 2 FLOPs each
    flops = 2 * 6 * 100 + 2 * 2 * 10 + 2 * 6 * 4 * 3
    assert step_seconds(SHAPE, SLOW_ARITHMETIC, 2, 3, 3) == flops
    assert step_seconds(SHAPE, SLOW_MEMORY, 2, 3, 3) == 4 * (110 + 2 * 3 * 2)


def test_a_wave_is_its_prompts_and_its_decodes() -> None:
    prompts = step_seconds(SHAPE, SLOW_MEMORY, 2, 3, 3)
    decodes = sum(4 * (110 + 2 * context * 2) for context in (4, 5, 6))
    rate = wave_limit(SHAPE, SLOW_MEMORY, 2, 3, 4)
    assert rate == pytest.approx(2 * 4 / (prompts + decodes))


def test_only_waves_of_the_base_at_once_have_a_limit() -> None:
    limits = limits_of(SHAPE, SLOW_MEMORY, SHORT, ("W2", "W3"))
    assert limits == {"W2": wave_limit(SHAPE, SLOW_MEMORY, 4, 24, 12)}


def test_this_machine_is_measured() -> None:
    speed = measure_speed(1, short=True)
    assert speed.flops_per_second > 1e8
    assert speed.bytes_per_second > 1e7
    assert speed.at_best(SLOW_MEMORY) == MachineSpeed(
        max(speed.flops_per_second, 1e12), speed.bytes_per_second
    )
