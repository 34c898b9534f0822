"""Matrices in fewer bits: found where exact, refused where not, multiplied to the very same."""

import ctypes
from pathlib import Path

import pytest
import torch
from engine_runs import greedy, request, run_all
from grids import on_grid
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_forms import load_form
from memory_factors import MemoryFactorSource
from operations import multiply_gated
from tiny_models import random_prompt, small_engine, write_tiny_llama
from torch import Tensor

from core.huge_pages import Arena
from core.kernels import panel_linear
from core.kernels.packed_weights import BLOCK, Form, PackedWeights, pack_exactly
from core.kernels.panel_linear import PanelLinear


def given_back(packed: PackedWeights) -> Tensor:
    """The matrix that `packed` stands for, by fp64."""
    if packed.form in (Form.FP16, Form.BF16):
        dtype = torch.float16 if packed.form is Form.FP16 else torch.bfloat16
        return packed.number_OI.view(dtype).float()
    assert packed.step_OG is not None and packed.base_OG is not None
    most = 15 if packed.form is Form.GRID_4 else 255
    assert packed.number_OI.min() >= 0 and packed.number_OI.max() <= most
    number_OGB = packed.number_OI.double().unflatten(1, (-1, BLOCK))
    step, base = packed.step_OG.double()[..., None], packed.base_OG.double()[..., None]
    return (number_OGB * step + base).float().flatten(1)


KINDS = {
    "q4_1": Form.GRID_4,
    "q4_0": Form.GRID_4,
    "q8_0": Form.GRID_8,
    "bf16": Form.BF16,
    "fp16": Form.FP16,
}
WORDS = {Form.GRID_4: 5, Form.GRID_8: 9, Form.BF16: 16, Form.FP16: 16}
"""Of 32 weights, with a grid's steps and bases."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 32), (5, 64), (100, 96)])
def test_the_smallest_exact_form_is_found(kind: str, shape: tuple[int, int]) -> None:
    weight_OI = on_grid(kind, *shape)
    packed = pack_exactly(weight_OI)
    assert packed is not None and packed.form is KINDS[kind]
    assert given_back(packed).equal(weight_OI)


@pytest.mark.parametrize("kind", KINDS)
def test_one_weight_beside_the_grid_keeps_fp32(kind: str) -> None:
    weight_OI = on_grid(kind, 40, 64)
    weight_OI[37, 50] = torch.nextafter(weight_OI[37, 50], torch.tensor(1.0))
    assert pack_exactly(weight_OI) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("kind", ["q4_1", "q8_0"])
def test_what_fp16_cannot_say_is_on_no_grid(kind: str, value: float) -> None:
    weight_OI = on_grid(kind, 9, 64)
    weight_OI[4, 3] = value
    assert pack_exactly(weight_OI) is None


@pytest.mark.parametrize("value", [0.0, -0.5, 1.0])
def test_blocks_of_one_value(value: float) -> None:
    weight_OI = on_grid("q4_1", 6, 64)
    weight_OI[2, 32:] = value
    packed = pack_exactly(weight_OI)
    assert packed is not None and given_back(packed).equal(weight_OI)


def test_only_whole_blocks_are_packed() -> None:
    assert pack_exactly(torch.zeros(3, 48)) is None
    assert pack_exactly(torch.zeros(0, 64)) is None


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    scale=st.floats(-30, 12).map(lambda power: 2.0**power),
    kind=st.sampled_from(sorted(KINDS)),
    changed=st.booleans(),
)
def test_what_is_packed_gives_every_weight_back(
    seed: int, scale: float, kind: str, changed: bool
) -> None:
    """At every scale of fp16, its subnormals and overflow too: exact, or not packed."""
    weight_OI = on_grid(kind, 7, 64, seed) * scale
    if changed:
        weight_OI[seed % 7, seed % 64] *= 1.001
    packed = pack_exactly(weight_OI)
    assert packed is None or given_back(packed).equal(weight_OI)


@pytest.fixture(scope="module", params=("avx512", "avx2", "plain"))
def formed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The library as processors without sums of whole numbers have it."""
    return load_form(request.param, tmp_path_factory.mktemp("form"))


def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panel_linear, "pack_exactly", lambda weight_OI: None)


ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 24, 40)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_out", [1, 47, 48, 960])
@pytest.mark.parametrize("num_in", [32, 576])
def test_products_are_those_of_fp32_bit_for_bit(
    kind: str, num_out: int, num_in: int, formed: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight_OI = on_grid(kind, num_out, num_in)
    own = PanelLinear(formed, Arena(), weight_OI)
    unpacked(monkeypatch)
    expected = PanelLinear(formed, Arena(), weight_OI)
    assert own.num_bytes * 32 == expected.num_bytes * WORDS[KINDS[kind]]
    for num_rows in ROWS:
        x_TI = torch.randn(num_rows, num_in, generator=torch.Generator().manual_seed(num_rows))
        assert own(x_TI).equal(expected(x_TI)), num_rows
    assert own(torch.empty(0, num_in)).shape == (0, num_out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 48, 100])
def test_gated_products_too(
    kind: str, width: int, formed: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight_OI = on_grid(kind, 2 * width, 96)
    inputs = [torch.randn(n, 96, generator=torch.Generator().manual_seed(n)) for n in ROWS]
    own = [multiply_gated(formed, weight_OI, x_TI) for x_TI in inputs]
    unpacked(monkeypatch)
    for x_TI, y_TO in zip(inputs, own, strict=True):
        assert y_TO.equal(multiply_gated(formed, weight_OI, x_TI))


def test_extreme_steps_are_widened_exactly(formed: ctypes.CDLL) -> None:
    """fp16's subnormals, its largest and both signs, as the processor's own way converts them."""
    step = torch.tensor([2.0**-24, 3 * 2.0**-20, 2.0**-14, 1.0, 4000.0, -0.25])
    base = torch.tensor([-(2.0**-24), 0.0, 65504.0, -65504.0, -60000.0, 2.0**-15])
    number = torch.arange(BLOCK).remainder(16).float()
    weight_OI = base[:, None] + number * step[:, None]
    packed = PackedWeights(
        Form.GRID_4, number.to(torch.int16).repeat(6, 1), step.half()[:, None], base.half()[:, None]
    )
    assert given_back(packed).equal(weight_OI)
    linear = PanelLinear(formed, Arena(), weight_OI, packed=packed)
    assert linear(torch.eye(BLOCK)).equal(weight_OI.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_engine_computes_the_same_with_half_the_bytes(
    dtype: torch.dtype, tmp_path: Path, adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint saved in halves, prompts and decodes, base and adapters in one batch."""
    path = write_tiny_llama(tmp_path / "halves", dtype=dtype)
    found, sizes = [], []
    for _ in range(2):
        engine = small_engine(path, MemoryFactorSource.of(*adapters.values()))
        digests = [None, *adapters, None]
        requests = [
            request(f"{n}", random_prompt(n, 9 + 5 * n), greedy(12, logprobs=2), digest)
            for n, digest in enumerate(digests)
        ]
        results = run_all(engine, requests)
        found.append({name: (r.token_ids, r.logprobs) for name, r in results.items()})
        layers = engine.model.weights.layers
        sizes.append(sum(layer.qkv.num_bytes + layer.down.num_bytes for layer in layers))
        unpacked(monkeypatch)
    assert found[0] == found[1]
    assert 2 * sizes[0] == sizes[1]
