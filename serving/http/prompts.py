"""Prompts to token ids, off the event loop when they are long. Knows nothing of HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from core.errors import InvalidRequestError, PromptTooLongError
from serving.http.schemas import TextOrTokens

_INLINE_CHARS = 2000  # about as long as handing over to a thread takes


@dataclass(frozen=True)
class Prompt:
    """One prompt; `text` is None where the client sent token ids."""

    text: str | None
    token_ids: tuple[int, ...]


async def tokenize(
    tokenizer: Any, prompts: Sequence[TextOrTokens], *, add_special_tokens: bool, vocab_size: int
) -> tuple[Prompt, ...]:
    """Token ids of every prompt, in order. Raises InvalidRequestError for one without tokens."""
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    encoded = iter(await _encode(tokenizer, texts, add_special_tokens))
    result = tuple(
        Prompt(prompt, tuple(next(encoded))) if isinstance(prompt, str) else Prompt(None, prompt)
        for prompt in prompts
    )
    for prompt in result:
        _check(prompt, vocab_size)
    return result


async def _encode(tokenizer: Any, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
    def encode() -> list[list[int]]:
        encoded = tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    if not texts:
        return []
    if sum(map(len, texts)) <= _INLINE_CHARS:
        return encode()
    return await asyncio.to_thread(encode)


def _check(prompt: Prompt, vocab_size: int) -> None:
    if not prompt.token_ids:
        raise InvalidRequestError(
            "the prompt is empty, it must have at least one token", param="prompt"
        )
    if prompt.text is None and not 0 <= min(prompt.token_ids) <= max(prompt.token_ids) < vocab_size:
        bad = next(token for token in prompt.token_ids if not 0 <= token < vocab_size)
        raise InvalidRequestError(
            f"token id {bad} is not in the vocabulary, must be in [0, {vocab_size})", param="prompt"
        )


async def tokenize_chat(tokenizer: Any, messages: list[dict[str, str]]) -> Prompt:
    """The chat as the model's template writes it, ready for the assistant's answer.

    Raises InvalidRequestError where the model has no template or the template refuses the chat.
    """
    if not tokenizer.chat_template:
        raise InvalidRequestError(
            "this model has no chat template; use /v1/completions", param="messages"
        )
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
    except jinja2.TemplateError as error:
        raise InvalidRequestError(
            f"the model's chat template refuses these messages: {error}", param="messages"
        ) from error
    (token_ids,) = await _encode(tokenizer, [text], add_special_tokens=False)
    return Prompt(text, tuple(token_ids))


def room_for_output(prompt: Prompt, max_model_len: int) -> int:
    """Tokens that may follow. Raises PromptTooLongError where there are none."""
    room = max_model_len - len(prompt.token_ids)
    if room < 1:
        raise PromptTooLongError(
            f"the prompt has {len(prompt.token_ids)} tokens, the longest sequence served has "
            f"{max_model_len}, prompt and answer together",
            param="messages",
        )
    return room
