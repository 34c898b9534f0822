"""The judge of exactness against transformers' own greedy generation, on a tiny real model."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loadtest.peers.peft_peer import verdict

PROMPT = [5, 9, 2, 40, 11]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def greedy(model: LlamaForCausalLM) -> list[int]:
    ids = torch.tensor([PROMPT])
    mask = torch.ones_like(ids)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    return out[0, len(PROMPT) :].tolist()


def test_greedy_output_is_equal(model: LlamaForCausalLM, greedy: list[int]) -> None:
    assert len(greedy) == 20
    item = {"prompt": PROMPT, "adapter": None, "output": greedy}
    assert verdict(model, item)["first_difference"] is None


@pytest.mark.parametrize("place", [0, 7, 19])
def test_the_first_other_token_is_found(
    model: LlamaForCausalLM, greedy: list[int], place: int
) -> None:
    other = [*greedy[:place], (greedy[place] + 1) % 64, *greedy[place + 1 :]]
    found = verdict(model, {"prompt": PROMPT, "adapter": None, "output": other})
    assert found["first_difference"] == place
    assert found["expected"] == greedy[place]
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPT + greedy[:place]])).logits[0, -1]
    best, second = logits.topk(2).values.tolist()
    assert found["lead"] == pytest.approx(best - second, abs=1e-4)
