"""What the answers of both generation routes have in common: names, counts, logprobs' values."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from serving.http.generation import ChoiceDelta, ChoicePlan
from serving.http.prompts import Prompt
from serving.http.schemas_responses import PromptTokensDetails, Usage

_LOWEST_LOGPROB = -9999.0  # JSON has no minus infinity


@dataclass(frozen=True)
class Identity:
    """What every chunk of one answer says of itself.

    `fingerprint` is of the content that answers, whatever its name is now.
    """

    id: str
    model: str
    fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))

    @staticmethod
    def new(prefix: str, model: str, fingerprint: str) -> Identity:
        """An answer of `model` under a new id."""
        return Identity(f"{prefix}-{uuid.uuid4().hex}", model, fingerprint)

    def fields(self) -> dict[str, Any]:
        """The fields of this kind that every response has."""
        return {
            "id": self.id,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


class Tally:
    """Counts the tokens of one answer."""

    def __init__(self, prompts: Sequence[Prompt], num_choices: int) -> None:
        self._num_prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        self._num_choices = num_choices
        self._num_completion_tokens = 0
        self._num_cached: dict[int, int] = {}

    def add(self, delta: ChoiceDelta) -> None:
        """Count what is new; of a prompt's choices, the first tells what was cached before."""
        self._num_completion_tokens += len(delta.token_ids)
        if delta.index % self._num_choices == 0:
            number = delta.index // self._num_choices
            self._num_cached[number] = max(self._num_cached.get(number, 0), delta.num_cached_tokens)

    def usage(self) -> Usage:
        """So far."""
        return Usage(
            self._num_prompt_tokens,
            self._num_completion_tokens,
            self._num_prompt_tokens + self._num_completion_tokens,
            PromptTokensDetails(sum(self._num_cached.values())),
        )


class Answer(Protocol):
    """One answer in the making, in either of two forms."""

    plans: Sequence[ChoicePlan]

    def chunks(self, delta: ChoiceDelta) -> list[msgspec.Struct]:
        """What a stream says of this delta; nothing where it brings no text yet."""
        ...

    def usage_chunk(self) -> msgspec.Struct:
        """The chunk after the last, where the client wants the usage."""
        ...

    def add(self, delta: ChoiceDelta) -> None:
        """Keep a delta for `whole`."""
        ...

    def whole(self) -> msgspec.Struct:
        """The answer of all deltas that were added."""
        ...


def finite(logprob: float) -> float:
    """A logprob as JSON can say it."""
    return max(logprob, _LOWEST_LOGPROB)
