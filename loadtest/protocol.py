"""The part of OpenAI's completions protocol that a load test needs, and nothing more of it.

Typed structs skip every other field while decoding, which is most of the saving over `json`.
"""

from __future__ import annotations

import msgspec


class Usage(msgspec.Struct):
    """Token counts of a response."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


class Choice(msgspec.Struct):
    """One choice of a completion, whole or a chunk of it."""

    text: str = ""
    token_ids: list[int] | None = None


class Completion(msgspec.Struct):
    """A response, a streamed chunk, or an error in either's place."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: object = None


class Model(msgspec.Struct):
    """One entry of GET /v1/models; adapters have the base as their parent."""

    id: str
    parent: str | None = None


class ModelList(msgspec.Struct):
    """GET /v1/models."""

    data: list[Model]


def body_of(
    model: str,
    prompt: str | tuple[int, ...],
    max_tokens: int,
    *,
    stream: bool,
    ignore_eos: bool,
    token_ids: bool,
) -> bytes:
    """The JSON body of a greedy POST /v1/completions.

    `ignore_eos` and `token_ids` (return_token_ids) are extensions that vbserve and vLLM share;
    they are left out where False, for servers that refuse what they do not know.
    """
    body: dict[str, object] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": stream,
    }
    if stream:
        body["stream_options"] = {"include_usage": True}
    if ignore_eos:
        body["ignore_eos"] = True
    if token_ids:
        body["return_token_ids"] = True
    return msgspec.json.encode(body)
