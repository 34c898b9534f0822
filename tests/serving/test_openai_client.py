"""The official client against a really started server, over a fake engine."""

from __future__ import annotations

import asyncio

import openai
import pytest
from http_client import BASE, REPLY
from openai import AsyncOpenAI, OpenAI

from core.errors import EngineOverloadedError
from serving.engine_client import EngineDiedError

MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def url(start_server):
    return start_server() + "/v1"


@pytest.fixture
def sync(url):
    with OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def asynchronous(url):
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def test_completion(sync, tokenizer):
    answer = sync.completions.create(model=BASE, prompt=["Hello", "The"], n=2, logprobs=1)
    assert [choice.text for choice in answer.choices] == [REPLY] * 4
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs.tokens[0] == " fox"
    assert answer.usage.completion_tokens == 4 * (len(tokenizer.encode(REPLY)) + 1)


def test_streamed_completion(sync):
    options = {"include_usage": True}
    chunks = list(
        sync.completions.create(model=BASE, prompt="Hello", stream=True, stream_options=options)
    )
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == REPLY
    assert chunks[-1].usage.total_tokens > 0


def test_chat(sync):
    answer = sync.chat.completions.create(
        model="team/one", messages=MESSAGES, logprobs=True, top_logprobs=1, seed=1, temperature=0
    )
    assert answer.choices[0].message.content == REPLY
    assert answer.choices[0].logprobs.content[0].top_logprobs[0].bytes == list(b" fox")
    replayed = [*MESSAGES, answer.choices[0].message, *MESSAGES]
    assert sync.chat.completions.create(model=BASE, messages=replayed).choices


def test_streamed_chat_with_the_clients_own_accumulator(sync):
    with sync.chat.completions.stream(model=BASE, messages=MESSAGES) as stream:
        for _ in stream:
            pass
        completion = stream.get_final_completion()
    assert completion.choices[0].message.content == REPLY
    assert completion.choices[0].finish_reason == "stop"


def test_models(sync):
    assert [model.id for model in sync.models.list()] == [BASE, "team/one"]
    assert sync.models.retrieve("team/one").parent == BASE


def test_fields_beyond_openais_go_through_extra_body(sync, tokenizer):
    extra = {"return_token_ids": True, "top_k": 5, "min_p": 0.1}
    answer = sync.completions.create(model=BASE, prompt="Hello", extra_body=extra)
    assert answer.choices[0].token_ids == [*tokenizer.encode(REPLY), tokenizer.eos_token_id]


def test_errors_are_the_clients_own(sync, engine):
    with pytest.raises(openai.NotFoundError) as not_found:
        sync.completions.create(model="nobody", prompt="Hello")
    assert not_found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        sync.completions.create(model=BASE, prompt="Hello", extra_body={"foo": 1})
    assert bad.value.param == "foo"
    engine.refuse = EngineOverloadedError("full")
    with pytest.raises(openai.RateLimitError):
        sync.completions.create(model=BASE, prompt="Hello")


def test_an_error_within_a_stream_reaches_the_client(sync, engine):
    engine.fail_after = (2, EngineDiedError("gone"))
    seen = []
    stream = sync.completions.create(model=BASE, prompt="Hello", stream=True)
    with pytest.raises(openai.APIError, match="lost; try again"):
        seen.extend(chunk.choices[0].text for chunk in stream)
    assert "".join(seen) == " fox jumps"


async def test_many_streams_at_once(asynchronous, engine):
    engine.seconds_per_step = 0.005

    async def one(number: int) -> str:
        stream = await asynchronous.chat.completions.create(
            model=BASE if number % 2 else "team/one", messages=MESSAGES, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert await asyncio.gather(*map(one, range(16))) == [REPLY] * 16
    digests = {request.adapter_digest for request in engine.requests}
    assert len(digests) == 2
    assert engine.aborted == []
