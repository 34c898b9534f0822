"""How probable a base finds a text: the tokens' own log-probabilities, window by window.

Knows nothing of where the text comes from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from core.llm import LLM
from core.requests import GenerationRequest, SamplingParams, TokenLogprobs


def spread_windows(tokens: Sequence[int], count: int, length: int) -> list[list[int]]:
    """`count` windows of `length` tokens, evenly over a text that is longer than one."""
    stride = (len(tokens) - length) // count
    return [list(tokens[number * stride :][:length]) for number in range(count)]


def read_tokens(llm: LLM, windows: Sequence[Sequence[int]]) -> list[TokenLogprobs]:
    """The base's probability of each token but the windows' first, and its most probable one."""
    sampling = SamplingParams(max_tokens=0, prompt_logprobs=1)
    read: list[TokenLogprobs] = []
    for number, window in enumerate(windows):
        llm.engine.add(GenerationRequest(f"window-{number}", tuple(window), sampling))
        while llm.engine.has_work:
            for output in llm.engine.step():
                read += [place for place in output.prompt_logprobs or () if place is not None]
    return read


def perplexity(logprobs: Sequence[float]) -> float:
    """exp of the mean negative log-probability."""
    return math.exp(-sum(logprobs) / len(logprobs))
