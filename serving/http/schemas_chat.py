"""POST /v1/chat/completions as clients may send it. Knows nothing of templates or of engines."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from core.requests import MAX_LOGPROBS
from serving.http.schemas import Count, RequestBody, SamplingFields, refuse_unsupported

MAX_MESSAGES = 4096

_MESSAGE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tool_calls": ([],),
    "tool_call_id": (),
    "function_call": (),
    "refusal": (),
    "audio": (),
    "annotations": ([],),
    "reasoning_content": (),
}
_CHAT_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
}


class TextPart(RequestBody):
    """One part of a message's content; only text is served."""

    type: Literal["text"]
    text: str


def _join_parts(value: str | list[TextPart]) -> str:
    return value if isinstance(value, str) else "".join(part.text for part in value)


def _check_parts(value: Any) -> Any:
    """Name a kind of part that is not served, where a union's error would list every form."""
    if isinstance(value, list):
        for part in value:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text":
                raise PydanticCustomError(
                    "content_part",
                    "content parts of type {kind} are not supported by this server, only 'text'",
                    {"kind": repr(kind)},
                )
    elif not isinstance(value, str):
        raise PydanticCustomError("content_form", "must be a string or a list of text parts")
    return value


Content = Annotated[
    str | list[TextPart], BeforeValidator(_check_parts), AfterValidator(_join_parts)
]


class ChatMessage(RequestBody):
    """One message; `content` is a plain string after parsing."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        return refuse_unsupported(body, _MESSAGE_NEUTRAL)

    def for_template(self) -> dict[str, str]:
        """As chat templates know it; "developer" is today's name of their "system"."""
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": str(self.content)}
        return message if self.name is None else {**message, "name": self.name}


class ChatCompletionRequest(SamplingFields):
    """POST /v1/chat/completions. Without a limit of tokens the answer may fill the context."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        return refuse_unsupported(body, _CHAT_NEUTRAL)

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatCompletionRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError(
                "top_logprobs",
                "top_logprobs is only allowed when logprobs is true",
                {"field": "top_logprobs"},
            )
        return self

    @property
    def token_limit(self) -> int | None:
        """`max_completion_tokens`, or its older name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report per token; None for no logprobs at all."""
        return (self.top_logprobs or 0) if self.logprobs else None
