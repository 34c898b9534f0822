"""/v1/completions: from the parsed body to what the engines get, and from deltas to the answer.

Knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import msgspec
from msgspec import UNSET

from core.errors import InvalidRequestError
from core.requests import GenerationRequest, TokenLogprobs
from core.text import IncrementalDetokenizer, TokenStrings
from serving.http.answers import Identity, Tally, finite
from serving.http.generation import ChoiceDelta, ChoicePlan
from serving.http.prompts import Prompt
from serving.http.schemas import CompletionRequest
from serving.http.schemas_responses import Completion, CompletionChoice, CompletionLogprobs

DEFAULT_MAX_TOKENS = 16
MAX_SEQUENCES = 1024


def plan_completion(
    body: CompletionRequest, prompts: Sequence[Prompt], digest: str | None, request_id: str
) -> list[ChoicePlan]:
    """One plan per choice: choice j of prompt i has the index i * n + j and the seed + j."""
    if len(prompts) * body.num_choices > MAX_SEQUENCES:
        raise InvalidRequestError(
            f"{len(prompts)} prompts with n {body.num_choices} are more than {MAX_SEQUENCES} "
            "sequences in one request",
            param="n",
        )
    samplings = [
        body.sampling_params(
            choice=choice,
            max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
        )
        for choice in range(body.num_choices)
    ]
    pairs = [(prompt, sampling) for prompt in prompts for sampling in samplings]
    return [
        ChoicePlan(
            index,
            GenerationRequest(
                f"{request_id}-{index}", prompt.token_ids, sampling, digest, body.model
            ),
            body.stop,
            body.include_stop_str_in_output,
            body.skip_special_tokens,
        )
        for index, (prompt, sampling) in enumerate(pairs)
    ]


class CompletionAnswer:
    """Makes the chunks, or the whole, of one answer."""

    def __init__(
        self,
        body: CompletionRequest,
        prompts: Sequence[Prompt],
        plans: Sequence[ChoicePlan],
        identity: Identity,
        tokenizer: Any,
    ) -> None:
        self.plans = plans
        self._body, self._prompts, self._identity = body, prompts, identity
        self._tokenizer = tokenizer
        self._tally = Tally(prompts, body.num_choices)
        self._begun: dict[int, int] = {}  # choice -> characters of its echoed prompt
        self._choices: dict[int, CompletionChoice] = {}

    @cached_property
    def _strings(self) -> TokenStrings:
        return TokenStrings(self._tokenizer)

    def chunks(self, delta: ChoiceDelta) -> list[msgspec.Struct]:
        """A chunk with this delta's text, unless nobody would miss it."""
        self._tally.add(delta)
        piece = self._piece(delta)
        wanted = piece.text or piece.finish_reason or piece.logprobs or piece.token_ids
        usage = None if self._body.include_usage else UNSET
        return [Completion(**self._identity.fields(), choices=[piece], usage=usage)] * bool(wanted)

    def usage_chunk(self) -> Completion:
        """OpenAI's last chunk: no choices, all tokens."""
        return Completion(**self._identity.fields(), choices=[], usage=self._tally.usage())

    def add(self, delta: ChoiceDelta) -> None:
        """Join this delta to its choice."""
        self._tally.add(delta)
        piece = self._piece(delta)
        whole = self._choices.setdefault(delta.index, piece)
        if whole is not piece:
            _extend(whole, piece)

    def whole(self) -> Completion:
        """All choices, by index."""
        choices = [self._choices[index] for index in sorted(self._choices)]
        return Completion(**self._identity.fields(), choices=choices, usage=self._tally.usage())

    def _piece(self, delta: ChoiceDelta) -> CompletionChoice:
        prompt = self._prompts[delta.index // self._body.num_choices]
        is_first = delta.index not in self._begun
        echo = self._echo(prompt) if is_first and self._body.echo else ("", [])
        offset = self._begun.setdefault(delta.index, len(echo[0]))
        piece = CompletionChoice(delta.index, echo[0] + delta.text, None, delta.finish_reason)
        if self._body.logprobs is not None:
            piece.logprobs = self._logprobs(delta, prompt, echo[1], offset)
        if self._body.return_token_ids:
            piece.token_ids = list(delta.token_ids)
            piece.prompt_token_ids = list(prompt.token_ids) if is_first else UNSET
        return piece

    def _echo(self, prompt: Prompt) -> tuple[str, list[int]]:
        """The prompt's text and the place of each of its tokens in it."""
        detokenizer = IncrementalDetokenizer(self._tokenizer, [], self._body.skip_special_tokens)
        pieces: list[str] = []
        offsets: list[int] = []
        for token_id in prompt.token_ids:
            offsets.append(detokenizer.num_chars)
            pieces.append(detokenizer.push(token_id))
        text = "".join([*pieces, detokenizer.flush()])
        return text if prompt.text is None else prompt.text, offsets

    def _logprobs(
        self, delta: ChoiceDelta, prompt: Prompt, prompt_offsets: list[int], offset: int
    ) -> CompletionLogprobs:
        logprobs = CompletionLogprobs([], [], [], [])
        if prompt_offsets and delta.prompt_logprobs is not None:
            entries = zip(prompt_offsets, prompt.token_ids, delta.prompt_logprobs, strict=True)
            self._append(logprobs, entries)
        shifted = (offset + place for place in delta.text_offsets)
        self._append(logprobs, zip(shifted, delta.token_ids, delta.logprobs, strict=True))
        return logprobs

    def _append(
        self, logprobs: CompletionLogprobs, entries: Iterable[tuple[int, int, TokenLogprobs | None]]
    ) -> None:
        for offset, token_id, entry in entries:
            logprobs.text_offset.append(offset)
            logprobs.tokens.append(self._strings.text_of(token_id))
            logprobs.token_logprobs.append(None if entry is None else finite(entry.logprob))
            logprobs.top_logprobs.append(None if entry is None else self._top(entry))

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """OpenAI adds the chosen token where it is not among the most probable."""
        top = {**entry.top, entry.token_id: entry.logprob}
        return {self._strings.text_of(token_id): finite(value) for token_id, value in top.items()}


def _extend(whole: CompletionChoice, piece: CompletionChoice) -> None:
    whole.text += piece.text
    whole.finish_reason = piece.finish_reason
    if whole.logprobs is not None and piece.logprobs is not None:
        whole.logprobs.text_offset += piece.logprobs.text_offset
        whole.logprobs.token_logprobs += piece.logprobs.token_logprobs
        whole.logprobs.tokens += piece.logprobs.tokens
        whole.logprobs.top_logprobs += piece.logprobs.top_logprobs
    if isinstance(whole.token_ids, list) and isinstance(piece.token_ids, list):
        whole.token_ids += piece.token_ids
