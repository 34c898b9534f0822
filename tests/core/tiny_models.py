"""Tiny random Llamas on disk, random factors in memory, and the oracle that both are held to.

The oracle is transformers in fp32 with one adapter at a time merged into the weights as
W + scale * B @ A. It shares no code with core.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from core.engine import Engine
from core.engine_config import EngineConfig
from core.errors import AdapterUnavailableError
from core.factors import PROJECTIONS, AdapterFactors, FactorSource, LowRankPair, ModuleKey
from core.loading import load_engine
from core.model_config import ModelConfig
from core.requests import FinishReason, GenerationRequest, RequestOutput, SamplingParams

TIE_GAP = 1e-3
"""Tokens may differ from the oracle's where its two best logits are closer than this."""

PAGE_BYTES_PER_TOKEN = 2 * 2 * 2 * 16 * 4
"""Keys and values of one token in the default tiny model: 2, layers, kv heads, head_dim, fp32."""

QUERY_VALUE = ("q_proj", "v_proj")


# -- models ------------------------------------------------------------------------------------


def write_tiny_llama(
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write a random Llama (two layers, hidden 64, vocabulary 128) the way its users do."""
    options: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,  # far from flat logits, so that the best token is clear
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**options | overrides))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # all ones hide a norm that is left out or swapped
                parameter.uniform_(0.5, 1.5)
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    return path


def load_reference(path: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """transformers' own model, eager attention."""
    model = LlamaForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")
    return model.eval()


def small_engine(
    path: Path, factors: FactorSource | None = None, *, num_pages: int = 64, **options: Any
) -> Engine:
    """An fp32 CPU engine over a default tiny model with `num_pages` pages of 4 tokens."""
    settings: dict[str, Any] = {
        "device": "cpu",
        "page_size": 4,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 64,
    }
    settings |= options
    settings.setdefault("kv_cache_bytes", num_pages * settings["page_size"] * PAGE_BYTES_PER_TOKEN)
    return load_engine(path, EngineConfig(**settings), factors)


def random_prompt(seed: int, length: int, vocab_size: int = 128) -> tuple[int, ...]:
    """Token ids above the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, vocab_size, (length,), generator=generator).tolist())


# -- adapters ----------------------------------------------------------------------------------


def random_factors(
    config: ModelConfig,
    digest: str,
    *,
    rank: int | Mapping[str, int] = 4,
    projections: Sequence[str] = PROJECTIONS,
    layers: Sequence[int] | None = None,
    scale: float = 1.0,
    std: float = 0.15,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    gained: Sequence[str] = (),
) -> AdapterFactors:
    """Random factors; `rank` is one for all modules or one per projection.

    Of the projections those in `gained` have gains, between -0.5 and 2.5.
    """
    generator = torch.Generator().manual_seed(seed * 7919 + sum(digest.encode()))
    pairs, gains = {}, {}
    for layer in range(config.num_layers) if layers is None else layers:
        for name in projections:
            num_out, num_in = config.projection_shape(name)
            own_rank = rank if isinstance(rank, int) else rank[name]
            a_RI = torch.randn(own_rank, num_in, generator=generator) * std
            b_RO = torch.randn(own_rank, num_out, generator=generator) * std
            pairs[ModuleKey(layer, name)] = LowRankPair(a_RI.to(dtype), b_RO.to(dtype), scale)
            if name in gained:
                gain_O = 3 * torch.rand(num_out, generator=generator) - 0.5
                gains[ModuleKey(layer, name)] = gain_O.to(dtype)
    num_bytes = sum(pair.a_RI.nbytes + pair.b_RO.nbytes for pair in pairs.values())
    num_bytes += sum(gain_O.nbytes for gain_O in gains.values())
    return AdapterFactors(digest, pairs, num_bytes, gains)


@dataclass
class MemoryLease:
    """Counts itself at its source; a second release is an error, as the protocol says."""

    source: MemoryFactorSource
    factors: AdapterFactors
    released: bool = False

    def release(self) -> None:
        assert not self.released, f"the lease on {self.factors.digest} is released twice"
        self.released = True
        self.source.num_leases[self.factors.digest] -= 1


@dataclass
class MemoryFactorSource:
    """A FactorSource over factors in memory, whose loads last and fail as a test wants.

    polls_left   times that `try_acquire` of a digest still answers "not yet"
    failures     digests whose next `try_acquire` raises, and the message (kept until removed)
    """

    known: dict[str, AdapterFactors] = field(default_factory=dict)
    polls_left: Counter[str] = field(default_factory=Counter)
    failures: dict[str, str] = field(default_factory=dict)
    num_leases: Counter[str] = field(default_factory=Counter)
    prefetched: list[str] = field(default_factory=list)
    num_acquire_calls: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, *factors: AdapterFactors) -> MemoryFactorSource:
        return cls({each.digest: each for each in factors})

    @property
    def num_open_leases(self) -> int:
        assert min(self.num_leases.values(), default=0) >= 0
        return self.num_leases.total()

    def hold(self, digest: str) -> None:
        """Keep `digest` loading until `let_go`."""
        with self._lock:
            self.polls_left[digest] = 10**9

    def let_go(self, digest: str) -> None:
        """Its factors are there from now on."""
        with self._lock:
            self.polls_left[digest] = 0

    def prefetch(self, digest: str) -> None:
        self.prefetched.append(digest)

    def try_acquire(self, digest: str) -> MemoryLease | None:
        with self._lock:
            self.num_acquire_calls += 1
            if self.polls_left[digest] > 0:
                self.polls_left[digest] -= 1
                return None
            if digest in self.failures or digest not in self.known:
                raise AdapterUnavailableError(self.failures.get(digest, f"no adapter {digest}"))
            self.num_leases[digest] += 1
            return MemoryLease(self, self.known[digest])


# -- the oracle --------------------------------------------------------------------------------


def _forget_lengths(model: LlamaForCausalLM) -> None:
    """Dynamic rope keeps the longest length it has met until it meets a short one."""
    if model.config.rope_parameters["rope_type"] == "dynamic":
        model(torch.tensor([[1]]))


@contextmanager
def merged(model: LlamaForCausalLM, factors: AdapterFactors | None) -> Iterator[LlamaForCausalLM]:
    """`model` with W + scale * B @ A in place of W, for as long as the context lasts."""
    saved: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for (layer, name), pair in ({} if factors is None else factors.pairs).items():
            block = model.model.layers[layer]
            owner = block.mlp if name in ("gate_proj", "up_proj", "down_proj") else block.self_attn
            weight = getattr(owner, name).weight
            saved.append((weight, weight.clone()))
            weight += (pair.scale * pair.b_RO.T.double() @ pair.a_RI.double()).to(weight.dtype)
        try:
            yield model
        finally:
            for weight, before in saved:
                weight.copy_(before)


def reference_logits(
    model: LlamaForCausalLM, token_ids: Sequence[int], factors: AdapterFactors | None = None
) -> Tensor:
    """Logits [tokens, vocabulary] of one forward over the whole sequence."""
    with merged(model, factors), torch.inference_mode():
        _forget_lengths(model)
        return model(torch.tensor([list(token_ids)])).logits[0]


@dataclass(frozen=True)
class ReferenceGreedy:
    """Greedy tokens, and for each how far the best logit stood above the second."""

    token_ids: tuple[int, ...]
    gaps: tuple[float, ...]


def reference_greedy(
    model: LlamaForCausalLM,
    prompt: Sequence[int],
    num_tokens: int,
    factors: AdapterFactors | None = None,
) -> ReferenceGreedy:
    """One sequence alone with transformers' own cache, as generate() does, eos ignored."""
    tokens: list[int] = []
    gaps: list[float] = []
    cache = DynamicCache(config=model.config)
    step = torch.tensor([list(prompt)])
    with merged(model, factors), torch.inference_mode():
        _forget_lengths(model)
        for _ in range(num_tokens):
            logits = model(step, past_key_values=cache, use_cache=True).logits[0, -1]
            best = logits.topk(2)
            tokens.append(int(best.indices[0]))
            gaps.append(float(best.values[0] - best.values[1]))
            step = best.indices[:1][None]
    return ReferenceGreedy(tuple(tokens), tuple(gaps))


def assert_same_greedy(
    token_ids: Sequence[int], expected: ReferenceGreedy, tie_gap: float = TIE_GAP
) -> None:
    """Equal up to the first place where the oracle itself is at a tie."""
    assert len(token_ids) == len(expected.token_ids)
    for place, (own, reference, gap) in enumerate(
        zip(token_ids, expected.token_ids, expected.gaps, strict=True)
    ):
        if own != reference:
            assert gap < tie_gap, (
                f"token {place} is {own}, the oracle's is {reference} by a gap of {gap}: "
                f"{list(token_ids)} against {list(expected.token_ids)}"
            )
            return


def assert_close_logits(own: Tensor, expected: Tensor, relative: float) -> None:
    """The largest difference stays below `relative` times the largest logit."""
    difference = (own.float() - expected.float()).abs().max()
    assert own.shape == expected.shape
    assert difference <= relative * expected.float().abs().max(), f"differs by {difference}"


# -- driving an engine -------------------------------------------------------------------------


def greedy(num_tokens: int, **options: Any) -> SamplingParams:
    """Greedy sampling of exactly `num_tokens` tokens."""
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, **options)


def request(
    name: str,
    prompt: Sequence[int],
    sampling: SamplingParams | None = None,
    digest: str | None = None,
) -> GenerationRequest:
    """A request; 8 greedy tokens unless told otherwise."""
    return GenerationRequest(name, tuple(prompt), sampling or greedy(8), digest)


@dataclass
class Result:
    """All outputs of one request, joined."""

    outputs: list[RequestOutput] = field(default_factory=list)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token for output in self.outputs for token in output.token_ids)

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.outputs[-1].finish_reason

    @property
    def error(self) -> str | None:
        return self.outputs[-1].error

    @property
    def logprobs(self) -> list[Any]:
        return [entry for output in self.outputs for entry in output.logprobs]

    @property
    def prompt_logprobs(self) -> Any:
        given = [output.prompt_logprobs for output in self.outputs if output.prompt_logprobs]
        assert len(given) <= 1, "prompt_logprobs are given twice"
        return given[0] if given else None


def collect(results: dict[str, Result], outputs: Sequence[RequestOutput]) -> None:
    """Add a step's outputs; nothing may come after a last one."""
    for output in outputs:
        result = results.setdefault(output.request_id, Result())
        if result.outputs:
            assert result.finish_reason is None, f"{output.request_id} goes on after its end"
        result.outputs.append(output)


def run_all(
    engine: Engine, requests: Sequence[GenerationRequest] = (), max_steps: int = 2000
) -> dict[str, Result]:
    """Add `requests`, step until nothing is left, with the integrity checked at each step."""
    for each in requests:
        engine.add(each)
    results: dict[str, Result] = {}
    for _ in range(max_steps):
        if not engine.has_work:
            break
        collect(results, engine.step())
        engine.check_integrity()
    assert not engine.has_work, f"still at work after {max_steps} steps"
    assert engine.stats().kv_bytes_used == 0, "pages are held after the end"
    return results
