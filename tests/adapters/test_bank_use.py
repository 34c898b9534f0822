"""What an adapter makes of its bank, counted by hand and from PEFT's own files."""

from pathlib import Path

import pytest
import torch
from peft_oracle import TinyLlama, save_vblora

from adapters.bank_use import bank_use
from adapters.compact import CompactVBLoRA
from adapters.peft_adapter import read_peft_adapter
from core.model_config import read_base_info


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    return TinyLlama(tmp_path_factory.mktemp("models") / "tiny")


def read(llama: TinyLlama, path: Path, **settings: object) -> CompactVBLoRA:
    save_vblora(llama, path, **settings)
    adapter = read_peft_adapter(path, read_base_info(llama.path))
    assert isinstance(adapter, CompactVBLoRA)
    return adapter


def test_weights_of_all_layers_sum_to_their_sub_vectors(llama: TinyLlama, tmp_path: Path) -> None:
    adapter = read(llama, tmp_path, topk=3, target_modules=["q_proj", "down_proj"])
    use = bank_use(adapter)
    assert use.layers == (0, 1) and use.weight_LH.shape == (2, 32) and use.topk == 3
    # q: 64 -> 64, down: 128 -> 64, rank 4, sub-vectors of 16; each one's weights sum to 1
    assert torch.allclose(use.weight_LH.sum(1), torch.full((2,), 4.0 * (128 + 192) / 16))
    assert set(use.entropy_bits) == {"q_proj", "down_proj"}
    assert len(use.entropy_bits["q_proj"]) == 2 * 4 * 128 // 16


def test_use_is_that_of_each_sub_vector(llama: TinyLlama, tmp_path: Path) -> None:
    adapter = read(llama, tmp_path, target_modules=["v_proj"], layers_to_transform=[1], r=1)
    use = bank_use(adapter)
    expected = torch.zeros(32)
    for indices, (first,) in zip(adapter.indices_NK, adapter.weights_NJ, strict=True):
        expected[int(indices[0])] += first
        expected[int(indices[1])] += 1 - first
    assert use.layers == (1,)
    assert torch.allclose(use.weight_LH[0], expected, atol=1e-6)
    assert use.num_unused == int((expected == 0).sum()) > 0


def test_entropy_lies_between_one_vector_and_equal_shares(llama: TinyLlama, tmp_path: Path) -> None:
    alone = bank_use(read(llama, tmp_path / "one", topk=1))
    assert alone.mean_entropy_bits == 0 == alone.most_entropy_bits
    adapter = read(llama, tmp_path / "four", topk=4)
    even = CompactVBLoRA(
        adapter.base_fingerprint,
        adapter.modules,
        adapter.bank,
        adapter.indices_NK,
        torch.full_like(adapter.weights_NJ, 0.25),
    )
    assert bank_use(even).mean_entropy_bits == pytest.approx(2.0)
    assert 0 < bank_use(adapter).mean_entropy_bits < 2
