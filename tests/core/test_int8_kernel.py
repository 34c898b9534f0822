"""The int8 product in each form of its kernel, and in torch, against slow products."""

from collections.abc import Callable

import pytest
import torch
from int8_reference import held, slow_rounded
from kernel_forms import FORMS, load_form
from torch import Tensor

from core.huge_pages import Arena
from core.int8 import BLOCK, TorchInt8Linear, quantise
from core.kernels.int8_linear import Int8Linear
from core.linear import Linear

MakeInt8 = Callable[..., Linear]


@pytest.fixture(scope="module", params=[*FORMS, "torch"])
def make(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MakeInt8:
    """Makes linears of one form of the kernel, or of torch."""
    if request.param == "torch":
        return TorchInt8Linear
    library = load_form(request.param, tmp_path_factory.mktemp("int8"))
    return lambda weight_OI, **options: Int8Linear(library, Arena(), weight_OI, **options)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole_steps(num_rows: int, num_in: int, seed: int) -> Tensor:
    """Inputs that 8 bits hold exactly: whole numbers up to 127, by powers of two per block."""
    generator = torch.Generator().manual_seed(seed)
    x_TI = torch.randint(-127, 128, (num_rows, num_in), generator=generator).float()
    x_TI[:, ::BLOCK] = 127
    powers = torch.randint(-20, 20, (num_rows, -(-num_in // BLOCK)), generator=generator)
    return x_TI * 2.0 ** powers.repeat_interleave(BLOCK, 1)[:, :num_in]


def relative_error(own: Tensor, expected: Tensor) -> float:
    assert own.shape == expected.shape
    assert torch.isfinite(own).all()
    return float((own - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


@pytest.mark.parametrize("shape", [(1, 1), (5, 31), (7, 33), (48, 64)])
def test_each_weight_is_within_half_a_step(shape: tuple[int, int]) -> None:
    weight_OI = noise(*shape) * torch.logspace(-6, 6, shape[0])[:, None]
    weight_OI[0] = 0
    q_OI, scale_OG = quantise(weight_OI)
    assert q_OI.shape[1] % BLOCK == 0 and q_OI.dtype == torch.int8
    assert q_OI.abs().max() <= 127
    step_OI = scale_OG.float().repeat_interleave(BLOCK, 1)[:, : shape[1]]
    assert ((held(weight_OI) - weight_OI).abs() <= 0.5001 * step_OI).all()
    for scale_O, block_OB in zip(scale_OG.T, weight_OI.split(BLOCK, 1), strict=True):
        assert (scale_O.float() <= block_OB.abs().amax(1) / 127 * 1.008).all()


@pytest.mark.parametrize("num_out", [1, 47, 48, 145])
@pytest.mark.parametrize("num_in", [1, 16, 64, 577])
def test_products(num_out: int, num_in: int, make: MakeInt8) -> None:
    """Every remainder of rows and outputs, with inputs that 8 bits hold, and with any in 15."""
    weight_OI = noise(num_out, num_in, seed=1)
    by_terms = {terms: make(weight_OI, num_terms=terms) for terms in (1, 2)}
    exact_IO = held(weight_OI).double().T
    for num_rows in (1, 2, 3, 4, 5, 8, 23):
        x_TI = whole_steps(num_rows, num_in, seed=num_rows)
        assert relative_error(by_terms[1](x_TI), (x_TI.double() @ exact_IO).float()) < 3e-6
        x_TI = noise(num_rows, num_in, seed=num_rows)
        assert relative_error(by_terms[2](x_TI), (x_TI.double() @ exact_IO).float()) < 1e-4
        expected_TO = slow_rounded(x_TI).double() @ exact_IO
        assert relative_error(by_terms[1](x_TI), expected_TO.float()) < 1e-2
    for linear in by_terms.values():
        assert linear(noise(0, num_in)).shape == (0, num_out)
        assert not linear.shares_storage_with(weight_OI)


@pytest.mark.parametrize("num_terms", [1, 2])
def test_a_row_does_not_depend_on_its_batch(num_terms: int, make: MakeInt8) -> None:
    """Also not on a row that is not finite, which is told as such."""
    linear = make(noise(100, 200, seed=1), num_terms=num_terms)
    x_TI = noise(21, 200, seed=2)
    alone = [linear(x_TI[n : n + 1]) for n in range(21)]
    assert torch.equal(linear(x_TI), linear(x_TI))
    x_TI[3, 5], x_TI[9, 199], x_TI[10] = torch.nan, torch.inf, -torch.inf
    together = linear(x_TI)
    for n in range(21):
        if n in (3, 9, 10):
            assert not torch.isfinite(together[n]).any()
        else:
            assert relative_error(together[n : n + 1], alone[n]) < 1e-6


def test_zeros_and_tiny_blocks(make: MakeInt8) -> None:
    linear = make(noise(50, 64, seed=1))
    x_TI = torch.zeros(3, 64)
    x_TI[1], x_TI[2, :32] = 1e-40, 1e-38
    assert linear(x_TI).abs().max() < 1e-30


def test_bytes_are_little_more_than_a_quarter_of_fp32(make: MakeInt8) -> None:
    weight_OI = noise(96, 640)
    assert make(weight_OI).num_bytes == weight_OI.numel() * (1 + 2 / BLOCK)
