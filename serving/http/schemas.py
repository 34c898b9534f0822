"""What clients may send: OpenAI's request bodies and the sampling fields that engines add to them.

Every field is checked and an unknown one refused by name. Knows nothing of tokens' texts, of
engines or of HTTP.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from core.requests import MAX_LOGPROBS, SamplingParams

MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_PROMPTS = 1024
_INT64 = 2**63

TextOrTokens: TypeAlias = str | tuple[int, ...]
Count: TypeAlias = Annotated[int, Field(ge=0, lt=2**31)]
TokenId: TypeAlias = Annotated[int, Field(ge=0, lt=2**31)]


class RequestBody(BaseModel):
    """Strict: a number is no string, a field that is not declared is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _parse_prompts(value: Any) -> list[TextOrTokens]:
    """OpenAI's four forms of a prompt, as a list of texts or token ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return [tuple(value)]
        if all(isinstance(item, str) or _is_token_ids(item) for item in value):
            return [item if isinstance(item, str) else tuple(item) for item in value]
    raise PydanticCustomError(
        "prompt_form", "must be a string, a list of strings, token ids or lists of token ids"
    )


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _parse_stops(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    stops = [] if stops is None else stops
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise PydanticCustomError("stop_form", "must be a string or a list of strings")
    if not all(0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise PydanticCustomError(
            "stop_length", f"stop strings must have 1 to {MAX_STOP_CHARS} characters"
        )
    return stops


def _token_bias(value: dict[str, float]) -> dict[int, float]:
    if not all(key.isascii() and key.isdigit() and len(key) < 10 for key in value):
        raise PydanticCustomError("token_id", "keys must be token ids")
    return {int(key): bias for key, bias in value.items()}


class StreamOptions(RequestBody):
    """`include_usage`: a last chunk without choices carries the usage."""

    include_usage: bool = False


class SamplingFields(RequestBody):
    """Fields that completions and chat completions share; None means the default."""

    model: Annotated[str, Field(min_length=1, max_length=1024)]
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: float | None = None
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = None
    max_tokens: Count | None = None
    min_tokens: Count | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], AfterValidator(_token_bias)] | None = None
    stop: Annotated[
        list[str], BeforeValidator(_parse_stops), Field(max_length=MAX_STOP_STRINGS)
    ] = []
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "stream_options",
                "stream_options is only allowed when stream is true",
                {"field": "stream_options"},
            )
        return self

    @property
    def num_choices(self) -> int:
        """Choices per prompt."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling_params(
        self, *, choice: int, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None
    ) -> SamplingParams:
        """The engine's parameters for one choice; its seed is the request's plus `choice`.

        Raises InvalidRequestError naming a value out of range.
        """
        given = {name: value for name in _PASSED_ON if (value := getattr(self, name)) is not None}
        return SamplingParams(
            **given,
            top_k=max(self.top_k or 0, 0),
            seed=None if self.seed is None else self.seed + choice,
            max_tokens=max_tokens,
            stop_token_ids=frozenset(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )


_PASSED_ON = (
    "temperature",
    "top_p",
    "min_p",
    "min_tokens",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
)


def refuse_unsupported(body: Any, neutral: dict[str, tuple[Any, ...]]) -> Any:
    """Drop OpenAI fields that ask for nothing; refuse by name those that ask for what is not here.

    `neutral` maps a field to the values that mean "not used"; None is always one.
    """
    if not isinstance(body, dict):
        return body
    for name in neutral.keys() & body.keys():
        if body[name] is not None and body[name] not in neutral[name]:
            raise PydanticCustomError(
                "unsupported", "{field} is not supported by this server", {"field": name}
            )
    return {name: value for name, value in body.items() if name not in neutral}


class CompletionRequest(SamplingFields):
    """POST /v1/completions."""

    prompt: Annotated[
        list[TextOrTokens], BeforeValidator(_parse_prompts), Field(max_length=MAX_PROMPTS)
    ]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    add_special_tokens: bool = True

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        return refuse_unsupported(body, {"suffix": ("",)})

    @model_validator(mode="after")
    def _check_best_of(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.num_choices:
            raise PydanticCustomError(
                "best_of",
                "best_of must equal n: choices are not ranked by this server",
                {"field": "best_of"},
            )
        return self


class AdapterSource(RequestBody):
    """POST /v1/adapters as JSON: a PEFT directory on the server, under the allowed root."""

    id: str
    source: Annotated[str, Field(min_length=1)]
    replace: bool = False
