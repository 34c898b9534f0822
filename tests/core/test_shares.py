"""Items that threads share: each is done once, whoever is late, and products stay the same."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from grids import on_grid
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_forms import load_form
from operations import multiply_gated
from torch import Tensor

from core.huge_pages import Arena
from core.kernels import build
from core.kernels.int8_linear import Int8Linear
from core.kernels.panel_linear import PanelLinear

HARNESS = """
#include "shares.h"
#include <time.h>

/* done[i] counts item i, by[i] is its thread. Thread `late`, where there is one, waits in its first
 * item until all others are done, or for `seconds`. */
void deal(int64_t items, int num_threads, int late, double seconds, int64_t *done, int64_t *by) {
    share_t shares[num_threads];
    share_out(shares, items, num_threads);
    int64_t total = 0;
#pragma omp parallel num_threads(num_threads)
    for (int64_t i, direction; (i = next_item(shares, num_threads, &direction)) >= 0;) {
        time_t end = time(NULL) + seconds;
        while (omp_get_thread_num() == late && time(NULL) < end &&
               __atomic_load_n(&total, __ATOMIC_RELAXED) < items - 1) {}
        by[i] = omp_get_thread_num();
        __atomic_fetch_add(&done[i], 1, __ATOMIC_RELAXED);
        __atomic_fetch_add(&total, 1, __ATOMIC_RELAXED);
    }
}
"""


@pytest.fixture(scope="module")
def deal(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Runs the harness: how often each item was done, and by which thread."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here")
    folder = tmp_path_factory.mktemp("shares")
    (folder / "harness.c").write_text(HARNESS)
    include = str(Path(build.__file__).parent)
    source, linked = str(folder / "harness.c"), str(folder / "harness.so")
    flags = ("-O2", "-fopenmp", "-fPIC", "-shared", "-std=gnu11", "-I", include)
    subprocess.run([compiler, *flags, source, "-o", linked], check=True)
    library = ctypes.CDLL(linked)
    library.deal.argtypes = [ctypes.c_int64, ctypes.c_int, ctypes.c_int, ctypes.c_double]
    library.deal.argtypes += [ctypes.c_void_p] * 2

    def run(items: int, num_threads: int, late: int = -1) -> tuple[np.ndarray, np.ndarray]:
        done, by = np.zeros(items, np.int64), np.full(items, -1)
        library.deal(items, num_threads, late, 60.0, done.ctypes.data, by.ctypes.data)
        return done, by

    return run


@settings(deadline=None, max_examples=300)
@given(items=st.integers(0, 200), num_threads=st.integers(1, 7))
def test_each_item_is_done_once(items: int, num_threads: int, deal) -> None:
    done, by = deal(items, num_threads)
    assert (done == 1).all()
    assert ((by >= 0) & (by < num_threads)).all()


@pytest.mark.parametrize("late", [0, 1, 2])
@pytest.mark.parametrize("items", [3, 4, 20, 101])
def test_a_late_thread_is_left_its_first_item(items: int, late: int, deal) -> None:
    """The others take all else, or the late one would wait until the harness loses its patience."""
    done, by = deal(items, 3, late)
    assert (done == 1).all()
    assert (by == late).sum() <= 1


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


PRODUCTS: dict[str, Callable[[ctypes.CDLL, Tensor], Tensor]] = {
    "fp32": lambda library, x_TI: PanelLinear(library, Arena(), noise(1000, 96))(x_TI),
    "4 bits": lambda library, x_TI: PanelLinear(library, Arena(), on_grid("q4_0", 1000, 96))(x_TI),
    "gated": lambda library, x_TI: multiply_gated(library, noise(1000, 96), x_TI),
    "int8": lambda library, x_TI: Int8Linear(library, Arena(), noise(1000, 96))(x_TI),
}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("form", ["native", "avx2", "plain"])
def test_products_do_not_depend_on_threads(
    product: str, form: str, tmp_path_factory: pytest.TempPathFactory, threads
) -> None:
    """Bit for bit, with more threads than cores too, which are late all the time."""
    library = load_form(form, tmp_path_factory.mktemp("form"))
    for num_rows in (1, 3, 5, 8, 17):
        x_TI = noise(num_rows, 96, seed=num_rows)
        threads(1)
        alone = PRODUCTS[product](library, x_TI)
        for num_threads in (2, 3, 7):
            threads(num_threads)
            assert torch.equal(PRODUCTS[product](library, x_TI), alone)
