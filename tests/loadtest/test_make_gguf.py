"""GGUF files against transformers' own reader of them, and adapters against their definition."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from loadtest.peers.make_gguf import write_base, write_lora
from loadtest.peers.make_tiny_base import VOCAB_SIZE, tokenizer

NUM_HEADS, NUM_KV_HEADS, WIDTH, RANK = 4, 2, 64, 2


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "own head"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=request.param,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def config_of(base: Path) -> dict:
    return json.loads((base / "config.json").read_text())


def test_a_base_comes_back_as_it_was(base: Path, tmp_path: Path) -> None:
    write_base(base, config_of(base), tmp_path / "base.gguf")
    back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="base.gguf")
    plain = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.arange(1, 30)[None]
    with torch.inference_mode():
        assert torch.allclose(back(ids).logits, plain(ids).logits, atol=1e-4)


def test_scaled_rotations_are_refused(base: Path, tmp_path: Path) -> None:
    scaled = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}
    with pytest.raises(SystemExit, match="llama3"):
        write_base(base, config_of(base) | {"rope_parameters": scaled}, tmp_path / "base.gguf")


def test_an_adapters_b_is_in_llama_cpps_order_and_its_a_is_not(base: Path, tmp_path: Path) -> None:
    shapes = {"q_proj": (NUM_HEADS, WIDTH), "k_proj": (NUM_KV_HEADS, WIDTH // 2), "v_proj": (0, 32)}
    tensors = {}
    for module, (_, num_rows) in shapes.items():
        name = f"base_model.model.model.layers.1.self_attn.{module}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, WIDTH)
        tensors[f"{name}.lora_B.weight"] = torch.randn(num_rows, RANK)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 4}')
    write_lora(tmp_path, config_of(base), tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    found = {t.name: np.array(t.data).reshape(t.shape[::-1]) for t in reader.tensors}
    assert reader.fields["adapter.lora.alpha"].contents() == 4.0
    for module, (num_heads, num_rows) in shapes.items():
        name = f"base_model.model.model.layers.1.self_attn.{module}"
        a, b = (tensors[f"{name}.lora_{factor}.weight"].numpy() for factor in "AB")
        short = f"blk.1.attn_{module[0]}.weight"
        assert np.array_equal(found[f"{short}.lora_a"], a)
        half = num_rows // num_heads // 2 if num_heads else 0
        for row in range(num_rows):
            head, place = divmod(row, 2 * half) if half else (0, row)
            source = head * 2 * half + place // 2 + place % 2 * half if half else row
            assert np.array_equal(found[f"{short}.lora_b"][row], b[source])
