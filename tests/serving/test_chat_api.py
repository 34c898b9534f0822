"""/v1/chat/completions over a fake engine."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from http_client import BASE, REPLY
from tiny_model import MAX_MODEL_LEN

HELLO = [{"role": "user", "content": "Hello"}]
PROMPT = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


async def chat(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    body = {"model": BASE, "messages": HELLO, **body}
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def stream(client: httpx.AsyncClient, **body: Any) -> list[dict[str, Any]]:
    body = {"model": BASE, "messages": HELLO, "stream": True, **body}
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


async def test_the_prompt_is_what_the_template_writes(client, engine, tokenizer):
    answer = await chat(client, return_token_ids=True)
    prompt_ids = tokenizer.encode(PROMPT, add_special_tokens=False)
    assert list(engine.requests[0].prompt_token_ids) == prompt_ids
    assert answer["object"] == "chat.completion"
    assert answer["prompt_token_ids"] == prompt_ids
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"content": REPLY, "role": "assistant", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "token_ids": [*tokenizer.encode(REPLY), tokenizer.eos_token_id],
        }
    ]
    assert answer["usage"]["prompt_tokens"] == len(prompt_ids)


async def test_text_parts_roles_and_replayed_answers(client, engine, tokenizer):
    answer = await chat(client)
    messages = [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}],
        },
        {**answer["choices"][0]["message"], "tool_calls": None, "audio": None},
        {"role": "user", "content": "More", "name": "ann"},
    ]
    await chat(client, messages=messages)
    assert tokenizer.decode(engine.requests[-1].prompt_token_ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n"
        f"<|im_start|>assistant\n{REPLY}<|im_end|>\n"
        "<|im_start|>user\nMore<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, None),
        ({"max_tokens": 7}, 7),
        ({"max_completion_tokens": 8}, 8),
        ({"max_completion_tokens": 8, "max_tokens": 7}, 8),
    ],
)
async def test_an_answer_may_fill_the_context_unless_limited(client, engine, limits, expected):
    await chat(client, **limits)
    (request,) = engine.requests
    room = MAX_MODEL_LEN - len(request.prompt_token_ids)
    assert request.sampling.max_tokens == (room if expected is None else expected)


async def test_logprobs_say_token_bytes_and_alternatives(client, tokenizer):
    answer = await chat(client, logprobs=True, top_logprobs=2, max_tokens=1)
    (entry,) = answer["choices"][0]["logprobs"]["content"]
    assert (entry["token"], entry["logprob"], entry["bytes"]) == (" fox", -0.5, list(b" fox"))
    assert [top["logprob"] for top in entry["top_logprobs"]] == [-0.5, -1.5]
    assert entry["top_logprobs"][0]["token"] == " fox"
    answer = await chat(client, logprobs=True, max_tokens=1)
    assert answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


async def test_a_stream_begins_with_the_role_and_joins_to_the_answer(client, engine):
    whole = await chat(client, n=2, logprobs=True)
    engine.requests.clear()
    chunks = await stream(client, n=2, logprobs=True, stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    for index, choice in enumerate(whole["choices"]):
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert parts[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(part["delta"]["content"] for part in parts) == choice["message"]["content"]
        logprobs = [entry for part in parts[1:] for entry in part["logprobs"]["content"]]
        assert logprobs == choice["logprobs"]["content"]
        reasons = [part["finish_reason"] for part in parts]
        assert reasons == [None] * (len(parts) - 1) + ["stop"]


async def test_a_streams_token_ids(client, tokenizer):
    chunks = await stream(client, return_token_ids=True)
    assert chunks[0]["prompt_token_ids"] == tokenizer.encode(PROMPT, add_special_tokens=False)
    assert all("prompt_token_ids" not in chunk for chunk in chunks[1:])
    ids = [i for chunk in chunks[1:] for i in chunk["choices"][0]["token_ids"]]
    assert ids == [*tokenizer.encode(REPLY), tokenizer.eos_token_id]


async def test_a_stop_string_ends_the_message(client, engine):
    answer = await chat(client, stop=["over"])
    assert answer["choices"][0]["message"]["content"] == " fox jumps "
    assert engine.aborted


@pytest.mark.parametrize(
    "neutral",
    [
        {"tools": []},
        {"tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"functions": None, "store": False, "service_tier": "auto", "modalities": ["text"]},
    ],
)
async def test_what_openai_sends_without_meaning_it_is_accepted(client, neutral):
    await chat(client, **neutral)
