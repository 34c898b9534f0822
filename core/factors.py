"""The only thing that core knows of an adapter: a digest that yields low-rank factors per module.

Shape legend: R rank, I input features of a module, O output features of a module.

Knows nothing of vector banks, of adapter names, or of where factors come from; `FactorSource` is
the seam behind which another package rebuilds and caches them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol

from torch import Tensor

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a Llama block that an adapter may change, in the order of the forward."""

_MLP_PROJECTIONS = frozenset({"gate_proj", "up_proj", "down_proj"})


class ModuleKey(NamedTuple):
    """Which linear layer: the decoder layer's index and one of `PROJECTIONS`."""

    layer: int
    projection: str

    @property
    def path(self) -> str:
        """Its name in transformers' LlamaForCausalLM."""
        block = "mlp" if self.projection in _MLP_PROJECTIONS else "self_attn"
        return f"model.layers.{self.layer}.{block}.{self.projection}"


class LowRankPair(NamedTuple):
    """One module's increment: y += scale * (x @ a_RI.T) @ b_RO, both factors rank-major.

    `a_RI` is PEFT's lora_A.weight; `b_RO` is the transpose of PEFT's lora_B.weight, so that pairs
    of several adapters stack along the first dimension of both.
    """

    a_RI: Tensor
    b_RO: Tensor
    scale: float


@dataclass(frozen=True, eq=False)
class AdapterFactors:
    """All factors of one adapter, rebuilt. Immutable while any lease on it is held.

    Tensors are contiguous, on the engine's device and in its dtype.

    Modules that the adapter leaves alone have no pair. Pairs may differ in rank. Where a module
    with a pair has a gain_O too, what the base gives is multiplied with it before the increment is
    added, as DoRA does. `num_bytes` is the size of the storage that pairs and gains view.
    """

    digest: str
    pairs: Mapping[ModuleKey, LowRankPair]
    num_bytes: int
    gains: Mapping[ModuleKey, Tensor] = field(default_factory=dict)

    @cached_property
    def max_rank(self) -> int:
        """The largest rank of any pair; 0 for an adapter without pairs."""
        return max((pair.a_RI.shape[0] for pair in self.pairs.values()), default=0)


class FactorLease(Protocol):
    """A promise that `factors` stays valid until `release()`, which may be called once only."""

    @property
    def factors(self) -> AdapterFactors:
        """The leased factors."""
        ...

    def release(self) -> None:
        """Give the lease back; the factors may be dropped from now on."""
        ...


class FactorSource(Protocol):
    """Where an engine gets factors. Called from the engine's thread: no method may block."""

    def prefetch(self, digest: str) -> None:
        """Start loading in the background unless loaded or loading. Never raises."""
        ...

    def try_acquire(self, digest: str) -> FactorLease | None:
        """Return a lease, or None while the factors are still being loaded (starts a load).

        Raises AdapterUnavailableError when loading has failed (asking again later tries again).
        """
        ...
