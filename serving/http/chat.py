"""/v1/chat/completions: from the parsed body to what the engines get, from deltas to the answer.

Knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import msgspec
from msgspec import UNSET

from core.requests import GenerationRequest, TokenLogprobs
from core.text import TokenStrings
from serving.http.answers import Identity, Tally, finite
from serving.http.generation import ChoiceDelta, ChoicePlan
from serving.http.prompts import Prompt, room_for_output
from serving.http.schemas_chat import ChatCompletionRequest
from serving.http.schemas_responses import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatTokenLogprob,
    MessageDelta,
    TopLogprob,
)


def plan_chat(
    body: ChatCompletionRequest,
    prompt: Prompt,
    digest: str | None,
    request_id: str,
    max_model_len: int,
) -> list[ChoicePlan]:
    """One plan per choice; without a limit of its own an answer may fill the context."""
    room = room_for_output(prompt, max_model_len)
    limit = room if body.token_limit is None else body.token_limit
    return [
        ChoicePlan(
            choice,
            GenerationRequest(
                f"{request_id}-{choice}",
                prompt.token_ids,
                body.sampling_params(
                    choice=choice,
                    max_tokens=limit,
                    logprobs=body.num_logprobs,
                    prompt_logprobs=None,
                ),
                digest,
                body.model,
            ),
            body.stop,
            body.include_stop_str_in_output,
            body.skip_special_tokens,
        )
        for choice in range(body.num_choices)
    ]


class ChatAnswer:
    """Makes the chunks, or the whole, of one answer."""

    def __init__(
        self,
        body: ChatCompletionRequest,
        prompt: Prompt,
        plans: Sequence[ChoicePlan],
        identity: Identity,
        tokenizer: Any,
    ) -> None:
        self.plans = plans
        self._body, self._prompt, self._identity = body, prompt, identity
        self._tokenizer = tokenizer
        self._tally = Tally([prompt], body.num_choices)
        self._begun: set[int] = set()
        self._choices: dict[int, ChatChoice] = {}

    @cached_property
    def _strings(self) -> TokenStrings:
        return TokenStrings(self._tokenizer)

    def chunks(self, delta: ChoiceDelta) -> list[msgspec.Struct]:
        """The role at the beginning of a choice; then its text, unless nobody would miss it."""
        self._tally.add(delta)
        chunks: list[msgspec.Struct] = []
        if delta.index not in self._begun:
            chunks.append(self._role_chunk(delta.index, is_first=not self._begun))
            self._begun.add(delta.index)
        wanted = delta.text or delta.finish_reason or self._body.logprobs
        if wanted or self._body.return_token_ids:
            piece = ChatChunkChoice(
                delta.index,
                MessageDelta(content=delta.text),
                self._logprobs(delta),
                delta.finish_reason,
                list(delta.token_ids) if self._body.return_token_ids else UNSET,
            )
            chunks.append(self._chunk(piece))
        return chunks

    def usage_chunk(self) -> ChatChunk:
        """OpenAI's last chunk: no choices, all tokens."""
        return ChatChunk(**self._identity.fields(), choices=[], usage=self._tally.usage())

    def add(self, delta: ChoiceDelta) -> None:
        """Join this delta to its choice."""
        self._tally.add(delta)
        token_ids = list(delta.token_ids) if self._body.return_token_ids else UNSET
        choice = self._choices.get(delta.index)
        logprobs = self._logprobs(delta)
        if choice is None:
            self._choices[delta.index] = ChatChoice(
                delta.index, AnswerMessage(delta.text), logprobs, delta.finish_reason, token_ids
            )
            return
        choice.message.content += delta.text
        choice.finish_reason = delta.finish_reason
        if choice.logprobs is not None and logprobs is not None:
            choice.logprobs.content += logprobs.content
        if isinstance(choice.token_ids, list):
            choice.token_ids += delta.token_ids

    def whole(self) -> ChatCompletion:
        """All choices, by index."""
        return ChatCompletion(
            **self._identity.fields(),
            choices=[self._choices[index] for index in sorted(self._choices)],
            usage=self._tally.usage(),
            prompt_token_ids=self._prompt_token_ids(),
        )

    def _role_chunk(self, index: int, *, is_first: bool) -> ChatChunk:
        delta = MessageDelta(role="assistant", content="")
        chunk = self._chunk(ChatChunkChoice(index, delta, None, None))
        if is_first:
            chunk.prompt_token_ids = self._prompt_token_ids()
        return chunk

    def _chunk(self, piece: ChatChunkChoice) -> ChatChunk:
        usage = None if self._body.include_usage else UNSET
        return ChatChunk(**self._identity.fields(), choices=[piece], usage=usage)

    def _prompt_token_ids(self) -> list[int] | msgspec.UnsetType:
        return list(self._prompt.token_ids) if self._body.return_token_ids else UNSET

    def _logprobs(self, delta: ChoiceDelta) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        return ChatLogprobs([self._token_logprob(entry) for entry in delta.logprobs])

    def _token_logprob(self, entry: TokenLogprobs) -> ChatTokenLogprob:
        return ChatTokenLogprob(
            *self._describe(entry.token_id, entry.logprob),
            [TopLogprob(*self._describe(*item)) for item in entry.top.items()],
        )

    def _describe(self, token_id: int, logprob: float) -> tuple[str, float, list[int]]:
        """Token, logprob, bytes. Part of a character is shown as its bytes."""
        raw = self._strings.bytes_of(token_id)
        return self._strings.text_of(token_id), finite(logprob), list(raw)
