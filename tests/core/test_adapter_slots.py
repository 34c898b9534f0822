"""Low-rank increments of a batch, by stacks and by kernels, against a slow loop over rows."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from memory_factors import random_factors
from operations import GATE_UP, Adding, KernelAdding, StackedAdding
from tiny_models import write_tiny_llama
from torch import Tensor

from core.batch import AdapterRows
from core.factors import PROJECTIONS, AdapterFactors, ModuleKey
from core.kernels.build import load_library
from core.model_config import ModelConfig, read_model_config
from core.torch_ops import silu_mul
from core.weights import FUSED_PROJECTIONS

CPU = torch.device("cpu")
NAMES = tuple("abcdefgh")


class Held:
    """A lease on factors that nobody takes away."""

    def __init__(self, factors: AdapterFactors) -> None:
        self.factors = factors

    def release(self) -> None: ...


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return read_model_config(
        write_tiny_llama(tmp_path_factory.mktemp("slots") / "m", intermediate_size=100)
    )


def slow_add(
    config: ModelConfig, rows: Sequence[AdapterRows], layer: int, fused: int, x_TI: Tensor,
    y_TO: Tensor,
) -> Tensor:  # fmt: skip
    """gain * y + scale * B (A x), row by row and projection by projection, in fp64."""
    out = y_TO.double().clone()
    for entry in rows:
        if entry.lease is None:
            continue
        for row in range(entry.start, entry.end):
            start = 0
            for name in FUSED_PROJECTIONS[fused]:
                num_out = config.projection_shape(name)[0]
                key, own = ModuleKey(layer, name), slice(start, start + num_out)
                pair = entry.lease.factors.pairs.get(key)
                gain_O = entry.lease.factors.gains.get(key)
                if gain_O is not None:
                    out[row, own] *= gain_O.double()
                if pair is not None:
                    h_R = pair.a_RI.double() @ x_TI[row].double()
                    out[row, own] += pair.scale * (pair.b_RO.double().T @ h_R)
                start += num_out
    return out


def check_all_modules(
    config: ModelConfig, adding: Adding, rows: Sequence[AdapterRows], dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    product = adding.bind(rows)
    adding.check_integrity()
    if all(entry.lease is None for entry in rows):
        assert product is None
        return
    assert product is not None
    for layer in range(config.num_layers):
        for fused, names in enumerate(FUSED_PROJECTIONS):
            shapes = [config.projection_shape(name) for name in names]
            num_in, num_out = shapes[0][1], sum(shape[0] for shape in shapes)
            x_TI = torch.randn(rows[-1].end, num_in, generator=generator).to(dtype)
            weight_OI = torch.randn(num_out, num_in, generator=generator).to(dtype)
            base_TO = x_TI.double() @ weight_OI.double().T
            expected = slow_add(config, rows, layer, fused, x_TI, base_TO)
            if adding.activates and fused == GATE_UP:
                base_TO, expected = silu_mul(base_TO), silu_mul(expected)
            with torch.inference_mode():
                y_TO = product(layer, fused, weight_OI, x_TI).double()
            bound = 1e-5 if dtype == torch.float32 else 2e-2
            assert (y_TO - expected).abs().max() <= bound * expected.abs().max()
            for entry in rows:
                if entry.lease is None:
                    own = slice(entry.start, entry.end)
                    largest = base_TO[own].abs().max()
                    assert (y_TO[own] - base_TO[own]).abs().max() <= bound * largest


def lay_out(known: dict[str, AdapterFactors], wanted: Sequence[tuple[str | None, int]]) -> Any:
    rows, start = [], 0
    for name, count in wanted:
        lease = None if name is None else Held(known[name])
        rows.append(AdapterRows(lease, start, start + count))
        start += count
    return tuple(rows)


def make_adding(config: ModelConfig, dtype: torch.dtype, way: str) -> Adding:
    if way == "stacks":
        return StackedAdding(config, CPU, dtype)
    library = load_library()
    if library is None:
        pytest.skip("no C compiler here")
    return KernelAdding(config, library, after=way == "after")


def random_adapters(config: ModelConfig, seed: int, dtype: torch.dtype) -> dict[str, Any]:
    """Eight adapters of ranks 1 to 16 and of different targets, one of them without pairs.

    Of two some modules have gains, of one only some of those that share a product.
    """
    targets = [
        FUSED_PROJECTIONS[0],
        ("v_proj",),
        ("gate_proj", "down_proj"),
        ("o_proj",),
        ("q_proj", "up_proj"),
        tuple(name for names in FUSED_PROJECTIONS for name in names),
    ]
    ranks = (1, 2, 4, 16, 3, 8, 1)
    known = {
        name: random_factors(
            config, name, rank=rank, projections=targets[(n + seed) % len(targets)], seed=seed,
            scale=(1.0, 0.5, 2.0)[n % 3], layers=(None, (1,))[n == 3], dtype=dtype,
            gained={"c": PROJECTIONS, "f": ("k_proj", "up_proj", "down_proj")}.get(name, ()),
        )
        for n, (name, rank) in enumerate(zip(NAMES, ranks, strict=False))
    }  # fmt: skip
    return known | {"h": AdapterFactors("h", {}, 0)}


WAYS = pytest.mark.parametrize(
    ("dtype", "way"),
    [
        (torch.float32, "stacks"),
        (torch.bfloat16, "stacks"),
        (torch.float32, "within"),
        (torch.float32, "after"),
    ],
    ids=["fp32", "bf16", "within", "after"],
)

CASES: dict[str, list[tuple[str | None, int]]] = {
    "one_adapter": [("d", 7)],
    "one_row": [("a", 1)],
    "base_and_one": [(None, 5), ("c", 3)],
    "decodes_of_all": [(None, 1), *((name, 1) for name in NAMES)],
    "skewed": [(None, 2), ("a", 60), ("b", 1), ("c", 1), ("d", 2), ("e", 1)],
    "prompts": [("a", 40), ("d", 70), ("f", 33)],
    "same_adapter_twice": [("a", 2), ("b", 1), (None, 3), ("a", 30), ("b", 9)],
    "only_an_empty_one": [("h", 3), (None, 2)],
    "base_at_the_end": [("a", 1), ("b", 1), (None, 2)],
}


@pytest.mark.parametrize("case", CASES)
@WAYS
def test_increments_equal_the_slow_loop(
    case: str, dtype: torch.dtype, way: str, config: ModelConfig
) -> None:
    known = random_adapters(config, 0, dtype)
    adding = make_adding(config, dtype, way)
    rows = lay_out(known, CASES[case])
    if case == "only_an_empty_one":
        product = adding.bind(rows)
        if product is not None:
            ones = torch.ones(5, 64, dtype=dtype)
            y_TO = product(0, 1, torch.eye(64, dtype=dtype), ones)
            assert torch.equal(y_TO, ones)
        return
    check_all_modules(config, adding, rows, dtype, seed=1)


@pytest.mark.parametrize("way", ["within", "after"])
def test_a_row_gets_the_same_alone_and_beside_others(way: str, config: ModelConfig) -> None:
    """Bit for bit, in a tile and as a lone row: sampled tokens do not depend on the batch."""
    known = random_adapters(config, 0, torch.float32)
    adding = make_adding(config, torch.float32, way)
    for name, fused in (("a", 0), ("d", 1), ("e", 2), ("f", 1)):  # ranks 1, 16, 3 and 8, no gains
        num_out = sum(config.projection_shape(one)[0] for one in FUSED_PROJECTIONS[fused])
        num_in = config.projection_shape(FUSED_PROJECTIONS[fused][0])[1]
        generator = torch.Generator().manual_seed(fused)
        x_TI = torch.randn(17, num_in, generator=generator)
        weight_OI = torch.randn(num_out, num_in, generator=generator)
        together = adding.bind(lay_out(known, [(None, 1), (name, 16)]))
        assert together is not None
        y_TO = together(1, fused, weight_OI, x_TI)
        for row in range(1, 17):
            alone = adding.bind(lay_out(known, [(name, 1)]))
            assert alone is not None
            assert torch.equal(alone(1, fused, weight_OI, x_TI[row : row + 1])[0], y_TO[row]), row


class BindingMachine(RuleBasedStateMachine):
    """Active sets come and go; after each bind every module's sum is right."""

    config: ModelConfig
    dtype = torch.float32
    way = "stacks"

    @initialize(seed=st.integers(0, 20))
    def start(self, seed: int) -> None:
        self.known = random_adapters(self.config, seed, self.dtype)
        self.adding = make_adding(self.config, self.dtype, self.way)
        self.num_binds = 0

    @rule(
        wanted=st.lists(
            st.tuples(
                st.one_of(st.none(), st.sampled_from(NAMES[:-1])),
                st.one_of(st.just(1), st.integers(1, 12), st.just(40)),
            ),
            min_size=1,
            max_size=6,
        )
    )
    def bind(self, wanted: list[tuple[str | None, int]]) -> None:
        self.num_binds += 1
        rows = lay_out(self.known, wanted)
        check_all_modules(self.config, self.adding, rows, self.dtype, self.num_binds)

    @rule(name=st.sampled_from(NAMES[:-1]))
    def bind_one_alone(self, name: str) -> None:
        rows = lay_out(self.known, [(name, 2)])
        check_all_modules(self.config, self.adding, rows, self.dtype, 0)

    @invariant()
    def intact(self) -> None:
        if hasattr(self, "adding"):
            self.adding.check_integrity()


@WAYS
def test_random_active_sets(dtype: torch.dtype, way: str, config: ModelConfig) -> None:
    own = {"config": config, "dtype": dtype, "way": way}
    machine = type("Machine", (BindingMachine,), own)
    case = machine.TestCase()
    case.settings = settings(max_examples=8, stateful_step_count=8, deadline=None, derandomize=True)
    case.runTest()


def test_stacks_hold_what_is_active_and_forget_the_rest(config: ModelConfig) -> None:
    """Bytes follow the widest active set, not the number of adapters that have passed."""
    many = {f"n{n}": random_factors(config, f"n{n}", rank=4, seed=n) for n in range(30)}
    adding = StackedAdding(config, CPU, torch.float32)
    one = many["n0"].num_bytes
    for name in many:
        check_all_modules(config, adding, lay_out(many, [(name, 2)]), torch.float32, 0)
    assert adding.num_bytes <= 1.25 * one
    several = [(f"n{n}", 1) for n in range(8)]
    check_all_modules(config, adding, lay_out(many, several), torch.float32, 0)
    assert 8 * one <= adding.num_bytes <= 8 * 1.25 * one


def test_an_adapter_that_stays_is_not_copied_again(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {f"n{n}": random_factors(config, f"n{n}", rank=4, seed=n) for n in range(5)}
    adding = StackedAdding(config, CPU, torch.float32)
    filled: list[str] = []
    plain_fill = adding._fill

    def fill(factors: AdapterFactors, first: int, last: int) -> None:
        filled.append(factors.digest)
        plain_fill(factors, first, last)

    monkeypatch.setattr(adding, "_fill", fill)
    adding.bind(lay_out(known, [("n0", 1), ("n1", 1), ("n2", 1), ("n3", 1)]))
    filled.clear()
    for _ in range(5):
        adding.bind(lay_out(known, [("n0", 1), ("n1", 1)]))
        adding.bind(lay_out(known, [("n3", 9), (None, 2), ("n2", 1)]))
    assert filled == []
    adding.bind(lay_out(known, [("n0", 1), ("n4", 1)]))
    assert filled == ["n4"]
    adding.check_integrity()
