"""Files laid out like one before are read by its plan, and exactly as `read_vblora` reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft_oracle import TinyLlama, edit_config, read_tensors, save_vblora, write_tensors
from test_hostile_files import FUZZ, mutated
from test_refusals import TOPK_TENSORS, WEIGHTS, Tensors

from adapters.compact import CompactVBLoRA
from adapters.errors import AdapterError
from adapters.peft_adapter import PeftReader, compact_from_files
from adapters.peft_files import PeftFiles, read_peft_files
from adapters.vblora_plans import VBLoRAPlans
from core.model_config import BaseInfo


def files_of(path: Path) -> PeftFiles:
    return read_peft_files(path, max_config_bytes=2**20, max_weights_bytes=2**24)


def slowly(files: PeftFiles, base: BaseInfo) -> CompactVBLoRA:
    compact = compact_from_files(files, base)
    assert isinstance(compact, CompactVBLoRA)
    return compact


def plans_from(path: Path, base: BaseInfo) -> VBLoRAPlans:
    plans = VBLoRAPlans(base)
    plans.learn(files_of(path), slowly(files_of(path), base))
    return plans


def test_a_plan_reads_what_the_slow_way_reads(vblora_dirs: list[Path], base: BaseInfo) -> None:
    plans = plans_from(vblora_dirs[0], base)
    for path in vblora_dirs:
        read = plans.read(files_of(path))
        expected = slowly(files_of(path), base)
        assert read is not None
        assert read.digest == expected.digest
        assert read.modules == expected.modules
        assert torch.equal(read.bank.vectors_HB, expected.bank.vectors_HB)
        assert torch.equal(read.indices_NK, expected.indices_NK)
        assert torch.equal(read.weights_NJ, expected.weights_NJ)
    assert len(plans) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"topk": 3, "r": 2},
        {"topk": 1},
        {"num_vectors": 300},
        {"target_modules": ["v_proj", "down_proj"]},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16, "target_modules": "all-linear", "layers_to_transform": None},
        {"layers_to_transform": [1], "target_modules": ["q_proj", "gate_proj"]},
    ],
    ids=str,
)
def test_plans_of_other_shapes(
    settings: dict[str, Any], llama: TinyLlama, base: BaseInfo, tmp_path: Path
) -> None:
    for seed in (1, 2):
        save_vblora(llama, tmp_path / str(seed), seed=seed, **settings)
    read = plans_from(tmp_path / "1", base).read(files_of(tmp_path / "2"))
    assert read is not None
    assert read.digest == slowly(files_of(tmp_path / "2"), base).digest


def test_full_logits_have_no_plan(llama: TinyLlama, base: BaseInfo, tmp_path: Path) -> None:
    save_vblora(llama, tmp_path, save_only_topk_weights=False)
    assert len(plans_from(tmp_path, base)) == 0


def test_several_dtypes_have_no_plan(
    vblora_dirs: list[Path], base: BaseInfo, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(vblora_dirs[0], tmp_path / "mixed"))
    tensors = read_tensors(path)
    write_tensors(path, {**tensors, WEIGHTS: tensors[WEIGHTS].half()})
    assert len(plans_from(path, base)) == 0


@pytest.mark.parametrize(
    ("changed", "has_plan"),
    [
        ({"vblora_dropout": 0.5, "base_model_name_or_path": "other", "revision": "x"}, True),
        ({"target_modules": "reversed"}, True),
        ({"r": 2}, False),
        ({"topk": 1}, False),
        ({"num_vectors": 31}, False),
        ({"r": 4.0}, False),
        ({"target_modules": ["q_proj"]}, False),
        ({"layers_to_transform": [0]}, False),
        ({"exclude_modules": ["q_proj"]}, False),
    ],
    ids=str,
)
def test_which_configs_share_a_plan(
    changed: dict[str, Any], has_plan: bool, vblora_dirs: list[Path], base: BaseInfo, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(vblora_dirs[0], tmp_path / "changed"))
    if changed.get("target_modules") == "reversed":
        config = json.loads((path / "adapter_config.json").read_text())
        changed = {"target_modules": config["target_modules"][::-1]}
    edit_config(path, **changed)
    read = plans_from(vblora_dirs[0], base).read(files_of(path))
    assert (read is not None) == has_plan
    if read is not None:
        assert read.digest == slowly(files_of(path), base).digest


@pytest.mark.parametrize("name", TOPK_TENSORS)
def test_wrong_tensors_are_refused_in_the_same_words(
    name: str, vblora_dirs: list[Path], base: BaseInfo, tmp_path: Path
) -> None:
    change: Callable[[Tensors], None] = TOPK_TENSORS[name][0]
    path = Path(shutil.copytree(vblora_dirs[0], tmp_path / "wrong"))
    tensors = read_tensors(path)
    change(tensors)
    write_tensors(path, tensors)
    assert refusal(lambda: experienced(vblora_dirs[0], base).read(files_of(path))) == refusal(
        lambda: compact_from_files(files_of(path), base)
    )


def test_a_refused_config_is_refused_with_a_plan_too(
    vblora_dirs: list[Path], base: BaseInfo, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(vblora_dirs[0], tmp_path / "refused"))
    edit_config(path, modules_to_save=["lm_head"])
    plans = plans_from(vblora_dirs[0], base)
    assert refusal(lambda: plans.read(files_of(path))) == refusal(
        lambda: compact_from_files(files_of(path), base)
    )


@FUZZ
@given(data=st.data())
def test_mutated_files_read_alike(
    data: st.DataObject, vblora_dirs: list[Path], base: BaseInfo
) -> None:
    files = files_of(vblora_dirs[0])
    changed = PeftFiles(files.config, data.draw(mutated(files.weights)), {})
    assert outcome(lambda: experienced(vblora_dirs[0], base).read(changed)) == outcome(
        lambda: compact_from_files(changed, base)
    )


def test_only_the_plans_used_last_are_kept(
    llama: TinyLlama, base: BaseInfo, tmp_path: Path, vblora_dirs: list[Path]
) -> None:
    plans = plans_from(vblora_dirs[0], base)
    for num_vectors in range(40, 50):
        path = tmp_path / str(num_vectors)
        save_vblora(llama, path, num_vectors=num_vectors, target_modules=["q_proj"])
        plans.learn(files_of(path), slowly(files_of(path), base))
        assert plans.read(files_of(vblora_dirs[0])) is not None
    assert len(plans) == 8
    assert plans.read(files_of(tmp_path / "40")) is None
    assert plans.read(files_of(tmp_path / "49")) is not None


def experienced(path: Path, base: BaseInfo) -> PeftReader:
    """A reader that has read `path`."""
    reader = PeftReader(base)
    reader.read(files_of(path))
    return reader


def refusal(read: Callable[[], object]) -> tuple[type[AdapterError], str]:
    with pytest.raises(AdapterError) as caught:
        read()
    return type(caught.value), str(caught.value)


def outcome(read: Callable[[], object]) -> object:
    try:
        compact = read()
    except AdapterError as error:
        return type(error), str(error)
    assert isinstance(compact, CompactVBLoRA)
    return compact.digest
