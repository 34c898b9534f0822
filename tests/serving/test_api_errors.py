"""Every error in OpenAI's shape, with the status, the code and the field that it is about."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import httpx
import pytest
from http_client import BASE, client_of

from core.errors import (
    AdapterUnavailableError,
    EngineOverloadedError,
    InvalidRequestError,
    PromptTooLongError,
)
from core.requests import FinishReason
from serving.engine_client import EngineDiedError

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]


def error_of(response: httpx.Response) -> dict[str, Any]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    expected = "server_error" if response.status_code >= 500 else "invalid_request_error"
    special = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    assert error["type"] == special.get(response.status_code, expected)
    return error


@pytest.mark.parametrize(
    ("body", "param", "word"),
    [
        ({"foo": 1}, "foo", "unknown field 'foo'"),
        ({"stream_options": {"bar": 1}, "stream": True}, "stream_options.bar", "unknown field"),
        ({"suffix": "end"}, "suffix", "not supported"),
        ({"best_of": 2}, "best_of", "must equal n"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream is true"),
        ({"temperature": "warm"}, "temperature", "number"),
        ({"temperature": -0.1}, "temperature", "temperature is -0.1"),
        ({"top_p": 0}, "top_p", "top_p is 0"),
        ({"top_k": -2}, "top_k", "-1"),
        ({"min_p": 2}, "min_p", "min_p is 2"),
        ({"n": 0}, "n", "1"),
        ({"n": 129}, "n", "128"),
        ({"prompt": ["a"] * 600, "n": 2}, "n", "1024"),
        ({"max_tokens": -1}, "max_tokens", "0"),
        ({"max_tokens": "5"}, "max_tokens", "integer"),
        ({"max_tokens": True}, "max_tokens", "integer"),
        ({"min_tokens": 17}, "min_tokens", "min_tokens is 17"),
        ({"presence_penalty": 3}, "presence_penalty", "presence_penalty is 3"),
        ({"frequency_penalty": -3}, "frequency_penalty", "frequency_penalty is -3"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"3": 101}}, "logit_bias[3]", "101"),
        ({"logprobs": 21}, "logprobs", "20"),
        ({"stop": ["a"] * 17}, "stop", "16"),
        ({"stop": [""]}, "stop", "1 to"),
        ({"stop": 3}, "stop", "string"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "list of strings"),
        ({"prompt": [[]]}, "prompt", "empty"),
        ({"prompt": [1, "a"]}, "prompt", "list of strings"),
        ({"prompt": [1, True]}, "prompt", "list of strings"),
        ({"prompt": {"a": 1}}, "prompt", "list of strings"),
        ({"prompt": None}, "prompt", "list of strings"),
        ({"prompt": [5, 100000]}, "prompt", "100000 is not in the vocabulary"),
        ({"prompt": [[5], [-1]]}, "prompt", "-1 is not in the vocabulary"),
        ({"model": ""}, "model", "at least 1"),
        ({"model": None}, "model", "string"),
    ],
)
async def test_a_bad_field_of_a_completion_is_named(client, engine, body, param, word):
    response = await client.post(COMPLETIONS, json={"model": BASE, "prompt": "Hello", **body})
    assert response.status_code == 400
    error = error_of(response)
    assert error["param"] == param
    assert word in error["message"]
    assert engine.requests == []


@pytest.mark.parametrize(
    ("body", "param", "word"),
    [
        ({"prompt": "x"}, "prompt", "unknown field"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"tool_choice": "required"}, "tool_choice", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "user"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content",
            "image_url",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
            "messages.0.tool_calls",
            "not supported",
        ),
        ({"messages": [{"role": "user", "content": "forbidden"}]}, "messages", "not this"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs is true"),
        ({"logprobs": 2}, "logprobs", "boolean"),
    ],
)
async def test_a_bad_field_of_a_chat_is_named(client, engine, body, param, word):
    response = await client.post(CHAT, json={"model": BASE, "messages": HELLO, **body})
    assert response.status_code == 400
    error = error_of(response)
    assert error["param"] == param
    assert word in error["message"]
    assert engine.requests == []


async def test_a_missing_field_is_named(client):
    response = await client.post(COMPLETIONS, json={"model": BASE})
    assert response.status_code == 400
    assert error_of(response)["param"] == "prompt"


async def test_a_model_without_a_template_does_not_chat(client, services, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    response = await client.post(CHAT, json={"model": BASE, "messages": HELLO})
    assert response.status_code == 400
    assert "no chat template" in error_of(response)["message"]


async def test_a_chat_that_leaves_no_room_for_an_answer(client):
    messages = [{"role": "user", "content": "Hello there " * 500}]
    response = await client.post(CHAT, json={"model": BASE, "messages": messages})
    assert response.status_code == 400
    error = error_of(response)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


@pytest.mark.parametrize("content", ['{"model": "tiny"', "", "[]", "nonsense", '"x"'])
async def test_what_is_no_json_object(client, content):
    headers = {"content-type": "application/json"}
    response = await client.post(COMPLETIONS, content=content, headers=headers)
    assert response.status_code == 400
    error_of(response)


@pytest.mark.parametrize(
    "content",
    [
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "\\ud800", "prompt": "x"}',
        b'{"model": "tiny", "prompt": "\xff"}',
        b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "x", "temperature": 1e999}',
        b'{"model": "tiny", "prompt": "x", "seed": 1e3}',
        b'{"model": "tiny", "prompt": [' + b"9" * 5000 + b"]}",
        b'{"model": "tiny", "prompt": [1.0]}',
        b'{"model": "tiny", "prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"model": "tiny", "prompt": "x", "logit_bias": {"99999999999999999999": 1}}',
        b'{"model": "tiny", "prompt": "x", "logit_bias": {"' + b"9" * 5000 + b'": 1}}',
        b'{"model": "tiny", "prompt": "x", "stop_token_ids": [99999999999999999999]}',
        b'{"model": "tiny", "prompt": "x", "stop_token_ids": [-1]}',
        b'{"model": "tiny", "prompt": "x", "max_tokens": 99999999999999999999}',
        b'{"model": "tiny", "prompt": "x", "top_k": 99999999999999999999}',
        b'{"model": "tiny", "prompt": "x", "stop": "\\ud800"}',
    ],
)
async def test_odd_values_are_errors_of_the_client(client, engine, content):
    headers = {"content-type": "application/json"}
    response = await client.post(COMPLETIONS, content=content, headers=headers)
    assert response.status_code == 400, response.text
    error_of(response)
    assert engine.requests == []


async def test_another_content_type(client):
    response = await client.post(COMPLETIONS, content="{}", headers={"content-type": "text/plain"})
    assert response.status_code == 415
    assert "application/json" in error_of(response)["message"]


@pytest.mark.parametrize(
    "name", ["unknown", "tiny ", "TINY", "team/two", "../etc", "a" * 300, "\u2603"]
)
@pytest.mark.parametrize("route", [COMPLETIONS, CHAT])
async def test_an_unknown_model_is_never_the_base(client, engine, route, name):
    own = {"prompt": "Hello"} if route == COMPLETIONS else {"messages": HELLO}
    response = await client.post(route, json={"model": name, **own})
    assert response.status_code == 404
    error = error_of(response)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert engine.requests == []


async def test_unknown_paths_and_methods(client):
    response = await client.get("/v2/models")
    assert response.status_code == 404
    error_of(response)
    response = await client.get(COMPLETIONS)
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    error_of(response)


@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_over_the_cap(services, announced):
    body = b'{"model": "tiny", "prompt": "' + b"x" * 5000 + b'"}'

    async def in_pieces():
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    async with client_of(services, max_body_bytes=2000) as client:
        response = await client.post(
            COMPLETIONS,
            content=body if announced else in_pieces(),
            headers={"content-type": "application/json"},
        )
    assert response.status_code == 413
    assert "2000" in error_of(response)["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "code", "param"),
    [
        (InvalidRequestError("bad", param="seed"), 400, "invalid_value", "seed"),
        (PromptTooLongError("long", param="prompt"), 400, "context_length_exceeded", "prompt"),
        (EngineOverloadedError("full", retry_after_seconds=2.2), 429, "engine_overloaded", None),
        (AdapterUnavailableError("lost"), 503, "adapter_unavailable", None),
        (EngineDiedError("gone"), 503, "engine_unavailable", None),
    ],
)
async def test_an_engines_refusal(client, engine, stream, error, status, code, param):
    engine.refuse = error
    body = {"model": BASE, "prompt": ["Hello", "The"], "stream": stream}
    response = await client.post(COMPLETIONS, json=body)
    assert response.status_code == status
    found = error_of(response)
    assert (found["code"], found["param"]) == (code, param)
    assert (str(error) == found["message"]) == (status < 500), "the inside is for the log"
    assert response.headers.get("retry-after") == ("3" if status == 429 else None)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("model", "reason", "status", "code"),
    [
        (BASE, FinishReason.ERROR, 500, "generation_failed"),
        ("team/one", FinishReason.ERROR, 503, "adapter_unavailable"),
        ("team/one", FinishReason.ABORT, 503, "engine_unavailable"),
    ],
)
async def test_an_engine_that_gives_up_before_the_first_token(
    client, engine, caplog, stream, model, reason, status, code
):
    engine.end_with = (0, reason)
    body = {"model": model, "prompt": "Hello", "stream": stream}
    response = await client.post(COMPLETIONS, json=body)
    assert response.status_code == status
    assert error_of(response)["code"] == code
    assert ("no luck" in caplog.text) == (reason is FinishReason.ERROR)
    assert "no luck" not in response.text


async def test_one_failed_choice_ends_the_others(client, engine, tokenizer):
    engine.seconds_per_step = 0.01
    engine.script = lambda request: tokenizer.encode(" fox")
    engine.fail_after = (3, EngineDiedError("gone"))
    body = {"model": BASE, "prompt": ["Hello", "The"], "max_tokens": 1000}
    engine_requests = engine.requests
    response = await client.post(COMPLETIONS, json=body)
    assert response.status_code == 503
    await asyncio.sleep(0.05)
    assert len(engine_requests) == 2
    assert engine.finished == []


async def test_the_unexpected_says_nothing_of_the_inside(client, engine, caplog):
    engine.refuse = RuntimeError("/home/secret/path")
    with caplog.at_level(logging.ERROR):
        response = await client.post(COMPLETIONS, json={"model": BASE, "prompt": "Hello"})
    assert response.status_code == 500
    assert error_of(response)["code"] == "internal_error"
    assert "secret" not in response.text
    assert "/home/secret/path" in caplog.text
