"""The compact form: identity, bytes and back; its factors in one buffer, against a slow loop."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft_oracle import TinyLlama, edit_config, read_tensors, save_vblora, write_tensors
from torch import Tensor

from adapters import (
    Bank,
    BankPool,
    CompactLoRA,
    CompactVBLoRA,
    MalformedAdapterError,
    read_peft_adapter,
    rebuild_factors,
)
from adapters.compact import bank_from_bytes, bank_to_bytes, blob_from_bytes, index_dtype
from adapters.layout import factor_order, in_layout_order, module_spec
from adapters.rebuild import all_weights
from core.factors import PROJECTIONS, ModuleKey
from core.model_config import BaseInfo


@pytest.fixture(scope="module")
def vblora(vblora_dirs: list[Path], base: BaseInfo) -> CompactVBLoRA:
    adapter = read_peft_adapter(vblora_dirs[0], base)
    assert isinstance(adapter, CompactVBLoRA)
    return adapter


@pytest.fixture(scope="module")
def lora(lora_dir: Path, base: BaseInfo) -> CompactLoRA:
    adapter = read_peft_adapter(lora_dir, base)
    assert isinstance(adapter, CompactLoRA)
    return adapter


def slow_sub_vectors(adapter: CompactVBLoRA) -> Tensor:
    """(N, B): one sub-vector at a time, in float64."""
    bank = adapter.bank.vectors_HB.double()
    rows = []
    for indices, weights in zip(
        adapter.indices_NK.tolist(), adapter.weights_NJ.tolist(), strict=True
    ):
        last = max(0.0, 1.0 - sum(weights))
        rows.append(sum(w * bank[i] for i, w in zip(indices, [*weights, last], strict=True)))
    return torch.stack(rows)


def test_gather_equals_the_slow_loop(vblora: CompactVBLoRA) -> None:
    factors = rebuild_factors(vblora)
    expected = slow_sub_vectors(vblora).float().flatten()
    start = 0
    for spec, side in factor_order(vblora.modules):
        pair = factors.pairs[spec.key]
        factor = pair.a_RI if side == "a" else pair.b_RO
        piece = expected[start : start + factor.numel()].view_as(factor)
        torch.testing.assert_close(factor, piece, rtol=1e-6, atol=1e-6)
        start += factor.numel()
    assert start == expected.numel()


@pytest.mark.parametrize("kind", ["vblora", "lora"])
def test_all_factors_lie_in_one_buffer_in_reading_order(
    kind: str, request: pytest.FixtureRequest
) -> None:
    adapter = request.getfixturevalue(kind)
    factors = rebuild_factors(adapter)
    storages = {t.untyped_storage().data_ptr() for p in factors.pairs.values() for t in p[:2]}
    assert len(storages) == 1
    some = factors.pairs[ModuleKey(0, "q_proj")].a_RI
    assert factors.num_bytes == some.untyped_storage().nbytes() == adapter.factor_bytes
    for layer in (0, 1):
        pairs = [factors.pairs[ModuleKey(layer, name)] for name in PROJECTIONS]
        q, k, v, o, gate, up, down = pairs
        expected = [q.a_RI, k.a_RI, v.a_RI, q.b_RO, k.b_RO, v.b_RO, o.a_RI, o.b_RO]
        expected += [gate.a_RI, up.a_RI, gate.b_RO, up.b_RO, down.a_RI, down.b_RO]
        offsets = [t.storage_offset() for t in expected]
        assert offsets == sorted(offsets)
        for before, after in pairwise(expected):
            assert before.is_contiguous()
            assert after.storage_offset() == before.storage_offset() + before.numel()


def test_order_with_modules_left_out(base: BaseInfo) -> None:
    keys = [ModuleKey(1, "up_proj"), ModuleKey(0, "v_proj"), ModuleKey(1, "q_proj")]
    keys += [ModuleKey(0, "q_proj"), ModuleKey(1, "gate_proj")]
    specs = in_layout_order(module_spec(key, 4, 1.0, base.config) for key in keys)
    order = [
        f"{spec.key.layer}{spec.key.projection[0]}{side}" for spec, side in factor_order(specs)
    ]
    assert order == ["0qa", "0va", "0qb", "0vb", "1qa", "1qb", "1ga", "1ua", "1gb", "1ub"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes_round_once_at_the_end(vblora: CompactVBLoRA, dtype: torch.dtype) -> None:
    exact, rounded = rebuild_factors(vblora), rebuild_factors(vblora, dtype=dtype)
    for key, pair in exact.pairs.items():
        assert torch.equal(rounded.pairs[key].a_RI, pair.a_RI.to(dtype))
        assert torch.equal(rounded.pairs[key].b_RO, pair.b_RO.to(dtype))
    assert rounded.num_bytes == exact.num_bytes // 2


def test_factors_do_not_share_memory_with_the_compact_form(lora: CompactLoRA) -> None:
    pair = rebuild_factors(lora).pairs[ModuleKey(0, "q_proj")]
    assert pair.a_RI.untyped_storage().data_ptr() != lora.values.untyped_storage().data_ptr()


def test_the_last_weight_is_clamped_at_zero() -> None:
    weights = all_weights(torch.tensor([[0.25, 0.5], [0.5, 0.50390625]], dtype=torch.bfloat16))
    assert weights.tolist() == [[0.25, 0.5, 0.25], [0.5, 0.50390625, 0.0]]
    assert all_weights(torch.empty(3, 0)).tolist() == [[1.0]] * 3


@pytest.mark.parametrize("kind", ["vblora", "lora"])
def test_bytes_and_back(kind: str, base: BaseInfo, request: pytest.FixtureRequest) -> None:
    adapter = request.getfixturevalue(kind)
    blob = blob_from_bytes(adapter.to_bytes())
    assert blob.digest == adapter.digest and blob.base_fingerprint == base.fingerprint
    again = blob.join(base.config, adapter.bank)
    assert again.digest == adapter.digest and again.modules == adapter.modules
    for name, tensor in adapter.tensors.items():
        assert torch.equal(again.tensors[name], tensor)


def test_bank_bytes_and_back(vblora: CompactVBLoRA) -> None:
    again = bank_from_bytes(bank_to_bytes(vblora.bank))
    assert again.digest == vblora.bank.digest
    assert torch.equal(again.vectors_HB, vblora.bank.vectors_HB)


def test_foreign_bytes_are_refused(vblora: CompactVBLoRA) -> None:
    with pytest.raises(MalformedAdapterError, match="not a compact adapter"):
        blob_from_bytes(bank_to_bytes(vblora.bank))
    with pytest.raises(MalformedAdapterError, match="a bank blob holds one tensor"):
        bank_from_bytes(vblora.to_bytes())


def test_the_header_is_small(vblora: CompactVBLoRA) -> None:
    assert len(vblora.to_bytes()) - vblora.num_bytes < 800


@pytest.mark.parametrize(
    ("num_vectors", "dtype"),
    [(1, "uint8"), (256, "uint8"), (257, "int16"), (2**15, "int16"), (2**15 + 1, "int32")],
)
def test_the_smallest_index_dtype(num_vectors: int, dtype: str) -> None:
    assert index_dtype(num_vectors) == getattr(torch, dtype)


# identity


def digest_after(vblora: Path, tmp_path: Path, base: BaseInfo, name: str, at: int) -> str:
    """The digest once one value of one tensor has changed in its last bit."""
    path = Path(shutil.copytree(vblora, tmp_path / "changed"))
    tensors = read_tensors(path)
    tensors[name].view(torch.uint8).view(-1)[at] ^= 1
    write_tensors(path, tensors)
    return read_peft_adapter(path, base).digest


@pytest.mark.parametrize(
    "name",
    ["base_model.vblora_vector_bank"]
    + [
        f"base_model.model.model.layers.1.mlp.up_proj.vblora_logits_{side}_topk_{what}"
        for side in "AB"
        for what in ("indices", "weights")
    ],
)
def test_one_changed_bit_is_another_adapter(
    name: str, vblora_dirs: list[Path], base: BaseInfo, tmp_path: Path
) -> None:
    before = read_peft_adapter(vblora_dirs[0], base).digest
    at = 2 if "indices" in name else 0  # far from making an index appear twice
    assert digest_after(vblora_dirs[0], tmp_path, base, name, at) != before


def test_another_base_is_another_adapter(vblora_dirs: list[Path], base: BaseInfo) -> None:
    other = BaseInfo(base.path, base.config, "f" * 64)
    digests = {read_peft_adapter(vblora_dirs[0], b).digest for b in (base, other)}
    assert len(digests) == 2


def test_scale_is_part_of_identity(lora_dir: Path, base: BaseInfo, tmp_path: Path) -> None:
    path = Path(shutil.copytree(lora_dir, tmp_path / "lora"))
    before = read_peft_adapter(path, base).digest
    edit_config(path, lora_alpha=9)
    assert read_peft_adapter(path, base).digest != before


def test_what_does_not_change_the_maths_does_not_change_identity(
    vblora_dirs: list[Path], base: BaseInfo, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(vblora_dirs[0], tmp_path / "same"))
    before = read_peft_adapter(path, base).digest
    edit_config(path, vblora_dropout=0.1, base_model_name_or_path="x", target_modules="all-linear")
    assert read_peft_adapter(path, base).digest == before


def test_both_save_modes_of_one_adapter_are_one(
    llama: TinyLlama, base: BaseInfo, tmp_path: Path
) -> None:
    """In float32 PEFT writes the very weights that are computed from the logits."""
    save_vblora(llama, tmp_path / "topk", seed=4, topk=3)
    save_vblora(llama, tmp_path / "logits", seed=4, topk=3, save_only_topk_weights=False)
    digests = {read_peft_adapter(tmp_path / mode, base).digest for mode in ("topk", "logits")}
    assert len(digests) == 1


# banks


def test_equal_banks_are_held_once_and_only_while_used() -> None:
    pool = BankPool()
    first, second = Bank(torch.ones(4, 8)), Bank(torch.ones(4, 8))
    assert first.digest == second.digest != Bank(torch.ones(8, 4)).digest
    assert first.digest != Bank(torch.ones(4, 8, dtype=torch.float16)).digest
    assert pool.intern(first) is first and pool.intern(second) is first
    assert pool.get(first.digest, lambda: pytest.fail("it is there")) is first
    assert pool.num_bytes == 128
    del first
    assert pool.num_bytes == 0
    assert pool.get(second.digest, lambda: second) is second
