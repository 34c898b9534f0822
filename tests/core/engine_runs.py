"""Requests to an engine, and what came of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from core.engine import Engine
from core.requests import FinishReason, GenerationRequest, RequestOutput, SamplingParams


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
