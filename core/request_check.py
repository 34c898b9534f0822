"""Whether a request can be served at all, by the model's vocabulary and the longest sequence.

Ranges that depend on no model are checked by `requests.SamplingParams` itself.
"""

from __future__ import annotations

from collections.abc import Iterable

from core.errors import InvalidRequestError, PromptTooLongError
from core.model_config import ModelConfig
from core.requests import GenerationRequest, SamplingParams


def check_request(request: GenerationRequest, config: ModelConfig, max_model_len: int) -> None:
    """Raise InvalidRequestError or PromptTooLongError for what is impossible."""
    tokens, vocab_size = request.prompt_token_ids, config.vocab_size
    if not tokens:
        raise InvalidRequestError(
            "the prompt is empty, it must have at least one token", param="prompt"
        )
    _check_token_ids("prompt", tokens, vocab_size)
    _check_token_ids("logit_bias", request.sampling.logit_bias, vocab_size)
    _check_stops(request.sampling, config)
    wanted = len(tokens) + request.sampling.max_tokens
    if wanted > max_model_len:
        raise PromptTooLongError(
            f"{len(tokens)} prompt tokens and max_tokens {request.sampling.max_tokens} are "
            f"{wanted} tokens, the longest sequence served has {max_model_len}",
            param="max_tokens" if len(tokens) < max_model_len else "prompt",
        )


def _check_stops(params: SamplingParams, config: ModelConfig) -> None:
    _check_token_ids("stop_token_ids", params.stop_token_ids, config.vocab_size)
    stops = params.stop_token_ids | config.eos_token_ids
    if params.min_tokens and len(stops) >= config.vocab_size:
        raise InvalidRequestError(
            f"stop_token_ids leaves none for min_tokens {params.min_tokens}, must leave one",
            param="stop_token_ids",
        )


def _check_token_ids(param: str, token_ids: Iterable[int], vocab_size: int) -> None:
    bad = next((token for token in token_ids if not 0 <= token < vocab_size), None)
    if bad is not None:
        raise InvalidRequestError(
            f"token id {bad} is not in the vocabulary, must be in [0, {vocab_size})",
            param=param,
        )
