"""The bench of thousands of adapters, without a server: what is uploaded, and the report."""

import json
from email.parser import BytesParser
from email.policy import HTTP
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save_file

from loadtest.bench.sampled_exactness import SampledExactness
from loadtest.bench.scale import ScaleResult
from loadtest.bench.scale_command import scale_page
from loadtest.bench.server import MULTIPART, upload_body
from loadtest.bench.variants import Variants
from loadtest.stats import distribution

BANK = "base_model.vblora_vector_bank"
INDICES = "base_model.model.a.vblora_logits_A_topk_indices"


@pytest.fixture
def template(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "VBLORA", "r": 6}))
    tensors = {
        BANK: rng.normal(size=(16, 4)).astype(np.float32),
        INDICES: np.argsort(rng.random((6, 16)))[:, :3].astype(np.uint8),
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.mark.parametrize("shared_bank", [False, True])
def test_variants_are_distinct_and_the_same_each_time(template: Path, shared_bank: bool) -> None:
    variants = Variants(template, shared_bank=shared_bank)
    names = [name for name, _ in variants.uploads([(0, "a"), (1, "b")])]
    assert names == ["a", "b"]
    weights = [variants.files(n)["adapter_model.safetensors"] for n in (0, 1, 0)]
    assert weights[0] == weights[2] != weights[1]
    first, second = (load(data) for data in weights[:2])
    assert np.array_equal(first[BANK], second[BANK]) == shared_bank
    assert np.array_equal(first[INDICES], second[INDICES]) != shared_bank
    for tensors in (first, second):
        assert tensors[INDICES].dtype == np.uint8
        assert all(len(set(row)) == 3 for row in tensors[INDICES].tolist())


def test_variants_of_another_rank_use_other_vectors_of_a_scaled_bank(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "topk": 3}))
    rng = np.random.default_rng(0)
    b_indices = INDICES.replace("A_topk", "B_topk")
    tensors = {
        BANK: rng.normal(size=(16, 4)).astype(np.float32),
        INDICES: np.argsort(rng.random((2, 5, 16)))[..., :3].astype(np.uint8),
        b_indices: np.argsort(rng.random((7, 2, 16)))[..., :3].astype(np.uint8),
        INDICES.replace("indices", "weights"): rng.random((2, 5, 2)).astype(np.float32),
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    files = Variants(tmp_path, shared_bank=False, rank=32).files(0)
    assert json.loads(files["adapter_config.json"]) == {"r": 32, "topk": 3}
    found = load(files["adapter_model.safetensors"])
    assert found[INDICES].shape == (32, 5, 3) and found[b_indices].shape == (7, 32, 3)
    assert found[INDICES.replace("indices", "weights")].shape == (32, 5, 2)
    assert len({rows.tobytes() for rows in found[INDICES]}) == 32
    assert all(len(set(row)) == 3 for row in found[b_indices].reshape(-1, 3).tolist())
    assert found[BANK].std() == pytest.approx(0.5 * tensors[BANK].std(), rel=0.1)
    smaller = Variants(tmp_path, shared_bank=False, rank=1).files(0)
    assert load(smaller["adapter_model.safetensors"])[INDICES].shape == (1, 5, 3)


def test_the_report_counts_per_adapter_and_by_round() -> None:
    some = distribution([0.01, 0.02, 0.03])
    result = ScaleResult(
        1000, 64, 16, True, some, some, some, pss_bytes=1000 << 20, store_bytes=500 << 20,
        lora_bytes=5 << 20, base_without=[100.0, 200.0], base_with=[99.0, 150.0],
        zipf_few=[80.0, 80.0], zipf_all=[60.0, 40.0], quiet=[300.0, 300.0],
        registering=[290.0, 292.0], foreign_cores=[0.0, 0.3],
        exactness=SampledExactness(500, 40, 39, 1, 12),
    )  # fmt: skip
    page = scale_page(result, {"cores": 2})
    assert "# 1,000 adapters in one server, one shared bank" in page
    assert "| memory (PSS) per registered adapter, none used yet | 1.000 MiB |" in page
    assert "by that memory | 5.0 times |" in page
    assert "| the last 3 | 20.0 / 30.0 ms |" in page
    assert "| base alone, all registered | 124.5 (99.0 to 150.0) | 0.87 |" in page
    assert "| Zipf's law over 64 | 80.0 (80.0 to 80.0) |  |" in page
    assert "| Zipf's law over all | 50.0 (40.0 to 60.0) | 0.62 |" in page
    assert "1.000 of 40 answers that were judged, over 12 adapters and the base, of 500" in page
    assert "1 ties set aside" in page
    assert "- cores: 2\n- other programs: at most 0.30 cores in a wave" in page


def test_an_upload_is_one_body_that_a_form_parser_reads() -> None:
    body = upload_body("a/b", {"adapter_config.json": b"{}", "x.safetensors": b"\r\n--\0"})
    message = BytesParser(policy=HTTP).parsebytes(
        f"Content-Type: {MULTIPART['Content-Type']}\r\n\r\n".encode() + body
    )
    parts = list(message.iter_parts())
    names = [part.get_param("name", header="content-disposition") for part in parts]
    assert names == ["id", "files", "files"]
    assert [part.get_filename() for part in parts[1:]] == ["adapter_config.json", "x.safetensors"]
    assert parts[0].get_content().strip() == "a/b"
