"""Products with 4-bit weights as sums of whole numbers: near fp64, and each row for itself."""

import ctypes
from collections.abc import Iterator
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
from safetensors.torch import load_file, save_file
from tiny_models import random_prompt, small_engine, write_tiny_llama
from torch import Tensor

from core.huge_pages import Arena
from core.kernels import panel_linear
from core.kernels.packed_weights import BLOCK, Form
from core.kernels.panel_linear import PanelLinear

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 24, 40)


@pytest.fixture(scope="module")
def formed(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The library, where it multiplies digits."""
    library = load_form("native", tmp_path_factory.mktemp("form"))
    if not library.has_digits():
        pytest.skip("the processor sums no whole numbers of 8 bits in 512")
    return library


@pytest.fixture(params=(1, 3))
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def most_off(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """How far digits may be from fp64: [T, O].

    A feature is off by at most 2^-22 of its block's largest; each block adds fp32's roundings of
    what its numbers and its base sum to, at most 16 times its largest weights.
    """
    size_TG = x_TI.double().abs().unflatten(1, (-1, BLOCK)).amax(2)
    weight_OG = weight_OI.double().abs().unflatten(1, (-1, BLOCK)).sum(2)
    most_OG = weight_OI.double().abs().unflatten(1, (-1, BLOCK)).amax(2) * BLOCK
    rounded_TO = size_TG @ weight_OG.T * 2.0**-22
    summed_TO = size_TG @ most_OG.T * 16 * (3 + size_TG.shape[1]) * 2.0**-24
    return rounded_TO + summed_TO + 1e-36


def assert_as_fp64(found_TO: Tensor, x_TI: Tensor, weight_OI: Tensor) -> None:
    exact_TO = x_TI.double() @ weight_OI.double().T
    off_TO = (found_TO.double() - exact_TO).abs()
    assert (off_TO <= most_off(x_TI, weight_OI)).all(), off_TO.max()


@pytest.mark.parametrize("kind", ["q4_1", "q4_0"])
@pytest.mark.parametrize("num_out", [1, 47, 48, 960])
@pytest.mark.parametrize("num_in", [32, 576])
def test_each_row_is_multiplied_as_if_alone(
    kind: str, num_out: int, num_in: int, formed: ctypes.CDLL, threads: None
) -> None:
    weight_OI = on_grid(kind, num_out, num_in)
    linear = PanelLinear(formed, Arena(), weight_OI)
    assert linear.matrix.form == Form.GRID_4
    x_TI = noise(ROWS[-1], num_in, seed=1) * noise(1, num_in, seed=2).exp()
    alone_TO = torch.cat([linear(row_I[None]) for row_I in x_TI])
    assert_as_fp64(alone_TO, x_TI, weight_OI)
    for num_rows in ROWS:
        assert linear(x_TI[:num_rows]).equal(alone_TO[:num_rows]), num_rows
    assert linear(x_TI[:0]).shape == (0, num_out)


@pytest.mark.parametrize("spread", [0, 1, 2])
@pytest.mark.parametrize("outlier", [1, 300, 10_000])
def test_it_is_as_near_as_fp32(
    spread: int, outlier: int, formed: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features of different sizes, one far from all others: rounding them loses no more than fp32
    loses in sums, give or take a twentieth."""
    weight_OI, x_TI = on_grid("q4_1", 576, 1536), noise(64, 1536, seed=3)
    x_TI *= noise(1, 1536, seed=4).mul(spread).exp()
    x_TI[:, 77] *= outlier
    exact_TO = x_TI.double() @ weight_OI.double().T
    off = []
    for _ in range(2):
        found_TO = PanelLinear(formed, Arena(), weight_OI)(x_TI)
        off.append((found_TO - exact_TO).pow(2).mean().sqrt())
        monkeypatch.setattr(panel_linear, "pack_exactly", lambda weight_OI: None)
    assert off[0] < 1.05 * off[1]


@pytest.mark.parametrize("width", [1, 48, 100])
def test_gated_products(width: int, formed: ctypes.CDLL, threads: None) -> None:
    weight_OI, x_TI = on_grid("q4_1", 2 * width, 96), noise(40, 96, seed=5)
    gate_TO, up_TO = (x_TI.double() @ weight_OI.double().T).chunk(2, dim=1)
    expected_TO = torch.nn.functional.silu(gate_TO) * up_TO
    alone_TO = torch.cat([multiply_gated(formed, weight_OI, row_I[None]) for row_I in x_TI])
    torch.testing.assert_close(alone_TO.double(), expected_TO, rtol=1e-5, atol=1e-5)
    for num_rows in ROWS:
        own_TO = multiply_gated(formed, weight_OI, x_TI[:num_rows])
        assert own_TO.equal(alone_TO[:num_rows]), num_rows


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 2**16),
    scale=st.integers(-149, 100),
    outlier=st.integers(0, 40),
    num_rows=st.integers(1, 9),
)
def test_any_size_of_features(
    seed: int, scale: int, outlier: int, num_rows: int, formed: ctypes.CDLL
) -> None:
    weight_OI = on_grid("q4_1", 50, 64, seed)
    x_TI = (noise(num_rows, 64, seed=seed).double() * 2.0**scale).float()
    x_TI[seed % num_rows, seed % 64] *= 2.0 ** min(outlier, 120 - scale)
    assert_as_fp64(PanelLinear(formed, Arena(), weight_OI)(x_TI), x_TI, weight_OI)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("num_rows", [1, 2, 4, 8, 13])
def test_what_is_not_finite_stays_in_its_row(
    value: float, num_rows: int, formed: ctypes.CDLL
) -> None:
    linear = PanelLinear(formed, Arena(), on_grid("q4_1", 50, 64))
    x_TI = noise(num_rows, 64, seed=6)
    expected_TO = linear(x_TI)
    bad = num_rows // 2
    x_TI[bad, 40] = value
    found_TO = linear(x_TI)
    assert not found_TO[bad].isfinite().any()
    rest = [row for row in range(num_rows) if row != bad]
    assert found_TO[rest].equal(expected_TO[rest])


def test_the_largest_numbers_and_weights_overflow_nothing(formed: ctypes.CDLL) -> None:
    """All of a block as large as can be, with the number 15: what is summed needs all 32 bits."""
    weight_OI = torch.full((48, 64), 15.0)
    weight_OI[:, ::32] = 0.0
    linear = PanelLinear(formed, Arena(), weight_OI)
    assert linear.matrix.form == Form.GRID_4
    below_2 = float(torch.nextafter(torch.tensor(2.0), torch.tensor(0.0)))
    for x in (1.0, below_2, -below_2, 2.0**100, -(2.0**100)):
        assert_as_fp64(linear(torch.full((5, 64), x)), torch.full((5, 64), x), weight_OI)
    assert linear(torch.zeros(5, 64)).equal(torch.zeros(5, 48))


def test_an_engine_with_adapters(tmp_path: Path, adapters, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that fill tiles with one adapter, lone rows and the base's, beside fp32."""
    path = write_tiny_llama(tmp_path / "grid")
    tensors = load_file(path / "model.safetensors")
    for name, weight in tensors.items():
        if "proj" in name:
            tensors[name] = on_grid("q4_1", *weight.shape, seed=len(name)) * 2
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    found = []
    for _ in range(2):
        engine = small_engine(path, MemoryFactorSource.of(*adapters.values()))
        requests = [
            request(f"{n}", random_prompt(n, 9 + 5 * n), greedy(12, logprobs=2), digest)
            for n, digest in enumerate([None, *adapters, None])
        ]
        found.append(run_all(engine, requests))
        forms = {layer.down.matrix.form for layer in engine.model.weights.layers}
        assert forms == {Form.FP32 if len(found) == 2 else Form.GRID_4}
        monkeypatch.setattr(panel_linear, "pack_exactly", lambda weight_OI: None)
    own, fp32 = found
    for name, result in own.items():
        assert result.token_ids == fp32[name].token_ids
        for mine, theirs in zip(result.logprobs, fp32[name].logprobs, strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
