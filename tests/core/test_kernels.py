"""Each compiled kernel against its slow twin in torch, and what happens without a compiler."""

import ctypes
import logging
import stat
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from grids import on_grid
from kernel_forms import load_form
from operations import KernelOperations, TorchOperations, multiply_gated
from tiny_models import write_tiny_llama
from torch import Tensor

from core.batch import Batch, build_batch
from core.engine_config import EngineConfig
from core.factors import LowRankPair
from core.huge_pages import Arena
from core.kernels import build
from core.kernels.panel_linear import PanelLinear
from core.kernels.structs import PAIR, Increments
from core.kv_storage import KVStorage
from core.loading import load_engine
from core.model_config import ModelConfig, read_model_config
from core.requests import GenerationRequest, SamplingParams
from core.sequence import Chunk, Sequence
from core.torch_layers import TorchLayers
from core.torch_ops import silu_mul

CPU = torch.device("cpu")
SHAPES = {  # heads, key heads, head_dim
    "grouped": (4, 2, 16),
    "one_key_head": (6, 1, 10),
    "each_its_own": (3, 3, 64),
    "three_a_key_head": (6, 2, 64),
    "four_and_wide": (4, 1, 128),
    "between": (12, 2, 80),
}


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    loaded = build.load_library()
    if loaded is None:
        pytest.skip("no C compiler here")
    return loaded


@pytest.fixture(scope="module", params=("native", "avx2", "plain"))
def formed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The library as other processors have it."""
    return load_form(request.param, tmp_path_factory.mktemp("form"))


@pytest.fixture(scope="module", params=SHAPES)
def config(request: pytest.FixtureRequest, tmp_path_factory) -> ModelConfig:
    num_heads, num_kv_heads, head_dim = SHAPES[request.param]
    path = write_tiny_llama(
        tmp_path_factory.mktemp("kernels") / "m",
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        hidden_size=48,
        rms_norm_eps=1e-4,
    )
    return read_model_config(path)


@pytest.fixture
def twins(config: ModelConfig, library: ctypes.CDLL) -> tuple[KernelOperations, TorchOperations]:
    return KernelOperations(config, library), TorchOperations(config)


def noise(*shape: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


def assert_near(own: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    assert own.shape == expected.shape
    assert torch.isfinite(expected).all()
    bound = relative * expected.abs().max().clamp(min=1e-30)
    assert (own - expected).abs().max() <= bound


@pytest.mark.parametrize("num_rows", [1, 2, 5, 33])
@pytest.mark.parametrize("spread", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("with_delta", [True, False])
def test_rms_norm(num_rows: int, spread: float, with_delta: bool, twins) -> None:
    weight_H = noise(48, seed=1)
    delta_TH = noise(num_rows, 48, seed=2, spread=spread) if with_delta else None
    x_TH = noise(num_rows, 48, spread=spread)
    outs, sums = [], []
    for ops in twins:
        summed_TH = x_TH.clone()
        outs.append(ops.rms_norm(summed_TH, weight_H, delta_TH))
        sums.append(summed_TH)
    assert_near(*outs)
    assert torch.equal(*sums)
    assert with_delta or torch.equal(sums[0], x_TH)


@pytest.mark.parametrize("width", [1, 7, 96])
def test_silu_mul(width: int, twins) -> None:
    """From deep in the tail to far beyond where exp overflows."""
    for seed, spread in enumerate((0.1, 3.0, 50.0, 1e4)):
        x = noise(9, 2 * width, seed=seed, spread=spread)
        x[0] = 0.0
        x[1, :width], x[2, :width] = 1e30, -1e30
        x[1:3, width:] = 2.0
        assert_near(*(ops.silu_mul(x.clone())[3:] for ops in twins))
        assert_near(*(ops.silu_mul(x.clone())[:3] for ops in twins))
        assert_near(*(ops.silu_mul(x.clone())[2] + 1 for ops in twins))


@pytest.mark.parametrize("num_rows", [1, 3, 40])
def test_rotate_and_store(num_rows: int, config: ModelConfig, twins) -> None:
    width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    qkv_TO = noise(num_rows, width)
    angles = noise(num_rows, config.head_dim // 2, seed=3).repeat(1, 2)
    cos_sin = 1.3 * angles.cos(), 1.3 * angles.sin()
    slot_T = torch.randperm(64, generator=torch.Generator().manual_seed(4))[:num_rows]
    found = []
    for ops in twins:
        kv = KVStorage(config, 16, 4, CPU, torch.float32)
        query = ops.rotate_and_store(qkv_TO.clone(), cos_sin, kv, 1, slot_T)
        found.append((query, kv.keys[1].clone(), kv.values[1].clone()))
        assert not kv.keys[0].any(), "another layer was written"
    for own, expected in zip(*found, strict=True):
        assert_near(own, expected)


def ragged_batch(spans: list[tuple[int, int]], page_size: int) -> Batch:
    """Chunks (tokens before, tokens of the chunk) over scattered pages, one unused page first."""
    num_pages = [-(-(before + count) // page_size) for before, count in spans]
    order = torch.randperm(sum(num_pages), generator=torch.Generator().manual_seed(len(spans)))
    pages = iter((order + 1).tolist())
    chunks = []
    for (before, count), needed in zip(spans, num_pages, strict=True):
        request = GenerationRequest("r", (5,) * (before + count), SamplingParams())
        seq = Sequence.start(request, arrived=0.0)
        seq.pages = list(islice(pages, needed))
        chunks.append(Chunk(seq, before, count))
    return build_batch(chunks, page_size, CPU, with_lengths=False)


@pytest.mark.parametrize("page_size", [1, 4, 16, 24])
@pytest.mark.parametrize(
    "spans",
    [
        [(0, 1)],
        [(15, 1)],
        [(16, 1), (0, 1), (39, 1)],
        [(4, 1)] * 9,
        [(63, 1), (2, 1)],
        [(0, 2)],
        [(0, 150)],
        [(70, 9), (0, 65), (16, 16), (1, 48)],
        [(30, 1), (0, 33), (5, 1), (129, 7)],
    ],
    ids=str,
)
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_attention(
    page_size: int, spans: list[tuple[int, int]], spread: float, config: ModelConfig, twins
) -> None:
    """Single rows and prompts over ragged pages; large scores leave one key all the weight."""
    check_attention(twins, config, page_size, spans, spread)


@pytest.mark.parametrize(
    "spans", [[(39, 1)], [(16, 1), (0, 1), (39, 1), (31, 1), (95, 1)], [(30, 1), (3, 70)]], ids=str
)
def test_attention_on_other_processors(
    spans: list[tuple[int, int]], config: ModelConfig, formed: ctypes.CDLL
) -> None:
    twins = KernelOperations(config, formed), TorchOperations(config)
    check_attention(twins, config, 16, spans, 1.0)


def check_attention(
    twins, config: ModelConfig, page_size: int, spans: list[tuple[int, int]], spread: float
) -> None:
    batch = ragged_batch(spans, page_size)
    num_pages = 1 + sum(-(-(before + count) // page_size) for before, count in spans)
    kv = KVStorage(config, num_pages, page_size, CPU, torch.float32)
    kv.keys[1].copy_(noise(*kv.keys[1].shape, seed=5, spread=spread))
    kv.values[1].copy_(noise(*kv.values[1].shape, seed=6))
    # The engine passes the query heads as a view of a wider tensor.
    wide = noise(len(batch.token_T), config.num_heads + 3, config.head_dim, seed=7)
    query_TND = wide[:, : config.num_heads]
    assert_near(*(ops.attention(query_TND, kv, 1, batch) for ops in twins), relative=3e-5)


def test_attention_sees_nothing_of_later_or_foreign_places(config: ModelConfig, twins) -> None:
    """NaN behind a row's own length, in its last page and in a page of nobody, changes nothing."""
    batch = ragged_batch([(20, 1), (3, 30)], 16)
    wide = noise(len(batch.token_T), config.num_heads, config.head_dim, seed=7)
    found = []
    for foreign in (0.0, float("nan")):
        kv = KVStorage(config, 7, 16, CPU, torch.float32)
        for tensor, seed in ((kv.keys[1], 5), (kv.values[1], 6)):
            tensor.copy_(noise(*tensor.shape, seed=seed))
            tensor[:16] = foreign
            for page, used in ((batch.decode.page_SP[0, 1], 5), (batch.prompts.page_QP[0, 2], 1)):
                tensor[page * 16 + used : (page + 1) * 16] = foreign
        found.append(twins[0].attention(wide, kv, 1, batch))
    assert torch.equal(*found)


@pytest.mark.parametrize("num_out", [1, 47, 48, 960])
@pytest.mark.parametrize("num_in", [1, 16, 577])
def test_panels(num_out: int, num_in: int, formed: ctypes.CDLL) -> None:
    """Every remainder of rows and outputs, against fp64."""
    weight_OI = noise(num_out, num_in, seed=1)
    linear = PanelLinear(formed, Arena(), weight_OI)
    for num_rows in (1, 2, 3, 4, 7, 8, 9, 15, 16, 40):
        x_TI = noise(num_rows, num_in, seed=num_rows)
        expected = x_TI.double() @ weight_OI.double().T
        assert_near(linear(x_TI), expected.float(), relative=3e-6)
    assert linear(noise(0, num_in)).shape == (0, num_out)
    assert linear.num_bytes >= weight_OI.nbytes and not linear.shares_storage_with(weight_OI)


@pytest.mark.parametrize("width", [1, 47, 48, 100])
def test_gated_panels(width: int, formed: ctypes.CDLL) -> None:
    """Halves that fill panels and halves that don't, against fp64."""
    weight_OI = noise(2 * width, 33, seed=1)
    for num_rows in (0, 1, 2, 5, 6, 7, 8, 9, 16, 40):
        x_TI = noise(num_rows, 33, seed=num_rows)
        own = multiply_gated(formed, weight_OI, x_TI)
        assert own.shape == (num_rows, width)
        if num_rows:
            expected = silu_mul(x_TI.double() @ weight_OI.double().T)
            assert_near(own, expected.float(), relative=3e-6)


INCREMENTS = {  # by width of the projections and their ranks
    "one": ([60], [5]),
    "three": ([48, 20, 33], [8, 8, 8]),
    "long_and_none": ([100, 7], [70, 0]),
    "gated": ([50, 50], [3, 6]),
}


@pytest.mark.parametrize("kind", INCREMENTS)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 16, 23])
@pytest.mark.parametrize("on_a_grid", [False, True])
def test_increments_of_all_rows(
    kind: str, num_rows: int, on_a_grid: bool, formed: ctypes.CDLL
) -> None:
    """Within the product of panels, and gated, against fp64; what is not written is NaN."""
    outs, ranks = INCREMENTS[kind]
    num_in = 64 if on_a_grid else 37
    x_TI = noise(num_rows, num_in, seed=1)
    weight_OI = on_grid("q4_1", sum(outs), num_in) if on_a_grid else noise(sum(outs), 37, seed=2)
    pairs = [
        LowRankPair(noise(rank, num_in, seed=3 + n), noise(rank, out, seed=30 + n), 0.5 + n)
        for n, (out, rank) in enumerate(zip(outs, ranks, strict=True))
    ]
    expected = x_TI.double() @ weight_OI.double().T
    for part, pair in zip(expected.split(outs, dim=1), pairs, strict=True):
        part += pair.scale * (x_TI.double() @ pair.a_RI.double().T) @ pair.b_RO.double()
    inner = torch.full((num_rows, sum(ranks) + 2), torch.nan)
    records = np.array(
        [(p.a_RI.data_ptr(), p.b_RO.data_ptr(), len(p.a_RI), p.scale, 0) for p in pairs], dtype=PAIR
    )
    widths = np.array(outs)
    addresses = records.ctypes.data, widths.ctypes.data
    increments = Increments(*addresses, len(outs), inner.shape[1], inner.data_ptr())
    linear = PanelLinear(formed, Arena(), weight_OI)
    assert_near(linear(x_TI, increments=increments), expected.float(), relative=3e-6)
    if kind == "gated":
        own = multiply_gated(formed, weight_OI, x_TI, increments=increments)
        assert_near(own, silu_mul(expected).float(), relative=3e-6)


def test_an_engine_without_compiled_kernels_uses_torch(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.load_library(tmp_path / "cache") is None
    engine = load_engine(tiny_path, EngineConfig(device="cpu", kv_cache_bytes=1 << 16))
    assert isinstance(engine.model.layers, TorchLayers)


def test_a_compiler_that_fails_is_a_warning_with_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "bin" / "cc"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho no omp.h >&2\nexit 1\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(compiler.parent))
    with caplog.at_level(logging.WARNING):
        assert build.load_library(tmp_path / "cache") is None
    assert "no omp.h" in caplog.text
    assert list((tmp_path / "cache").rglob("*.so")) == []


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, library) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert build.load_library(file) is None


def test_the_library_is_compiled_once(tmp_path: Path, library, monkeypatch) -> None:
    assert build.load_library(tmp_path) is not None
    (built,) = tmp_path.rglob("*.so")
    before = built.stat().st_mtime_ns
    assert build.load_library(tmp_path) is not None
    assert built.stat().st_mtime_ns == before


def test_half_precision_and_compiled_kernels_do_not_meet(tiny_path: Path) -> None:
    config = EngineConfig(device="cpu", dtype="bfloat16", kv_cache_bytes=1 << 16)
    assert isinstance(load_engine(tiny_path, config).model.layers, TorchLayers)
