"""/v1/completions over a fake engine: what engines are asked for, and the shape of the answers."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine
from http_client import BASE, REPLY, client_of

from core.requests import SamplingParams


async def complete(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post("/v1/completions", json={"model": BASE, "prompt": "Hello", **body})
    assert response.status_code == 200, response.text
    return response.json()


async def stream(client: httpx.AsyncClient, **body: Any) -> list[dict[str, Any]]:
    """The chunks of a streamed answer, which must end with [DONE]."""
    body = {"model": BASE, "prompt": "Hello", "stream": True, **body}
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def texts(chunks: list[dict[str, Any]]) -> dict[int, str]:
    joined: dict[int, str] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        joined[choice["index"]] = joined.get(choice["index"], "") + choice["text"]
    return joined


async def test_the_answer_has_openais_shape(client, engine, tokenizer):
    answer = await complete(client, max_tokens=100)
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == BASE
    assert answer["choices"] == [
        {"index": 0, "text": REPLY, "logprobs": None, "finish_reason": "stop"}
    ]
    num_prompt, num_reply = len(tokenizer.encode("Hello")), len(tokenizer.encode(REPLY)) + 1
    assert answer["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_reply,
        "total_tokens": num_prompt + num_reply,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


async def test_defaults_are_openais(client, engine):
    await complete(client)
    assert engine.requests[0].sampling == SamplingParams(max_tokens=16)
    assert engine.requests[0].adapter_digest is None


async def test_every_sampling_field_reaches_the_engine(client, engine):
    await complete(
        client,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        seed=11,
        max_tokens=9,
        min_tokens=3,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        logit_bias={"5": -100, "6": 1},
        logprobs=4,
        stop_token_ids=[8, 9],
        ignore_eos=True,
        user="somebody",
    )
    assert engine.requests[0].sampling == SamplingParams(
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        seed=11,
        max_tokens=9,
        min_tokens=3,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        logit_bias={5: -100.0, 6: 1.0},
        logprobs=4,
        stop_token_ids=frozenset({8, 9}),
        ignore_eos=True,
    )


@pytest.mark.parametrize("top_k", [-1, 0, None])
async def test_top_k_of_nothing_keeps_the_vocabulary(client, engine, top_k):
    await complete(client, top_k=top_k)
    assert engine.requests[0].sampling.top_k == 0


async def test_an_adapters_digest_is_pinned_at_admission(client, engine, store):
    answer = await complete(client, model="team/one")
    digest = store.resolve("team/one").digest
    assert engine.requests[0].adapter_digest == digest
    assert answer["model"] == "team/one"
    assert answer["system_fingerprint"] == digest[:16]


async def test_a_rounded_base_has_a_fingerprint_of_its_own(services, tiny_base, store):
    async with client_of(replace(services, quantize="int8")) as client:
        base, adapter = await complete(client), await complete(client, model="team/one")
    assert base["system_fingerprint"] == f"{tiny_base.fingerprint[:16]}-int8"
    assert adapter["system_fingerprint"] == f"{store.resolve('team/one').digest[:16]}-int8"


@pytest.mark.parametrize("num_choices", [1, 2])
async def test_prompts_in_all_four_forms(client, engine, tokenizer, num_choices):
    a, b = tokenizer.encode("Hello"), tokenizer.encode("The fox")
    for prompt, expected in [
        ("Hello", [a]),
        (["Hello", "The fox"], [a, b]),
        (a, [a]),
        ([a, b], [a, b]),
        (["Hello", b], [a, b]),
    ]:
        engine.requests.clear()
        answer = await complete(client, prompt=prompt, n=num_choices)
        asked = [list(request.prompt_token_ids) for request in engine.requests]
        assert asked == [ids for ids in expected for _ in range(num_choices)]
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(asked)))
        assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))


async def test_cached_tokens_are_those_before_the_request(client):
    """What the second choice of a prompt finds was computed for the first."""
    usage = (await complete(client, prompt=["Hello", "The"], n=3))["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2 + 2}


async def test_choices_of_one_prompt_differ_in_their_seed(client, engine, tokenizer):
    engine.script = lambda request: tokenizer.encode(f" {request.sampling.seed}")
    answer = await complete(client, prompt=["Hello", "The"], n=2, seed=5, max_tokens=2)
    assert [request.sampling.seed for request in engine.requests] == [5, 6, 5, 6]
    assert [choice["text"] for choice in answer["choices"]] == [" 5", " 6", " 5", " 6"]


async def test_a_long_prompt_is_tokenised_too(client, engine, tokenizer):
    text = "Hello there " * 1000
    await complete(client, prompt=text)
    assert list(engine.requests[0].prompt_token_ids) == tokenizer.encode(text)


async def test_a_stream_joins_to_the_whole_answer(client, engine):
    body = {"prompt": ["Hello", "The"], "n": 2, "max_tokens": 100}
    whole = await complete(client, **body)
    chunks = await stream(client, **body)
    assert texts(chunks) == {choice["index"]: choice["text"] for choice in whole["choices"]}
    assert all("usage" not in chunk for chunk in chunks)
    last = {c["index"]: c["finish_reason"] for chunk in chunks for c in chunk["choices"]}
    assert last == dict.fromkeys(range(4), "stop")


async def test_a_stream_ends_with_its_usage_where_asked(client, engine):
    whole = await complete(client)
    engine.requests.clear()
    chunks = await stream(client, stream_options={"include_usage": True})
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]


async def test_tokens_that_come_together_are_one_chunk(client, engine, tokenizer):
    engine.tokens_per_step = 4
    chunks = await stream(client, max_tokens=8, return_token_ids=True, ignore_eos=True)
    choices = [chunk["choices"][0] for chunk in chunks]
    reply = [*tokenizer.encode(REPLY), tokenizer.eos_token_id] * 8
    assert [choice["token_ids"] for choice in choices] == [reply[:4], reply[4:8]]
    assert choices[0]["prompt_token_ids"] == tokenizer.encode("Hello")
    assert "prompt_token_ids" not in choices[1]


async def test_token_ids_come_back_where_asked(client, tokenizer):
    (choice,) = (await complete(client, return_token_ids=True))["choices"]
    assert choice["token_ids"] == [*tokenizer.encode(REPLY), tokenizer.eos_token_id]
    assert choice["prompt_token_ids"] == tokenizer.encode("Hello")


@pytest.mark.parametrize("tokens_per_step", [1, 3, 100])
async def test_a_stop_string_ends_text_and_request(client, engine, tokenizer, tokens_per_step):
    engine.tokens_per_step = tokens_per_step
    answer = await complete(
        client, stop=["nothing", "s over"], max_tokens=200, ignore_eos=True, return_token_ids=True
    )
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (" fox jump", "stop")
    num_tokens = len(choice["token_ids"])
    assert tokenizer.decode(choice["token_ids"]).startswith(" fox jumps over")
    assert tokenizer.decode(choice["token_ids"][:-1]) in " fox jumps over"
    assert answer["usage"]["completion_tokens"] == num_tokens
    assert engine.aborted == [request.request_id for request in engine.requests]


async def test_a_stop_string_may_be_kept(client):
    answer = await complete(client, stop="jumps", include_stop_str_in_output=True)
    assert answer["choices"][0]["text"] == " fox jumps"


async def test_stop_strings_wait_for_min_tokens(client, engine, tokenizer):
    num_reply = len(tokenizer.encode(REPLY)) + 1
    answer = await complete(
        client, stop="jumps", min_tokens=num_reply, max_tokens=50, ignore_eos=True
    )
    assert answer["choices"][0]["text"] == REPLY + " fox "


async def test_a_streamed_stop_string_never_shows(client):
    assert texts(await stream(client, stop="over the")) == {0: " fox jumps "}


async def test_the_stop_tokens_text_is_left_out_unless_asked_for(client, engine, tokenizer):
    (stop_token,) = tokenizer.encode(" jumps")
    body = {"stop_token_ids": [stop_token], "return_token_ids": True}
    (choice,) = (await complete(client, **body))["choices"]
    assert (choice["text"], choice["token_ids"][-1]) == (" fox", stop_token)
    (choice,) = (await complete(client, **body, include_stop_str_in_output=True))["choices"]
    assert choice["text"] == " fox jumps"


async def test_special_tokens_are_text_where_asked(client, engine, tokenizer):
    body = {"ignore_eos": True, "max_tokens": len(tokenizer.encode(REPLY)) + 1}
    (choice,) = (await complete(client, **body))["choices"]
    assert (choice["text"], choice["finish_reason"]) == (REPLY, "length")
    (choice,) = (await complete(client, **body, skip_special_tokens=False))["choices"]
    assert choice["text"] == REPLY + "<|im_end|>"


async def test_logprobs_say_token_text_place_and_alternatives(client, tokenizer):
    (choice,) = (await complete(client, logprobs=2, max_tokens=3))["choices"]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == [" fox", " jumps", " over"]
    assert logprobs["token_logprobs"] == [-0.5] * 3
    assert logprobs["text_offset"] == [0, 4, 10]
    for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True):
        assert len(top) == 2
        assert next(iter(top.items())) == (token, -0.5)


async def test_no_probability_is_a_number_in_json(client):
    (choice,) = (await complete(client, logprobs=3, max_tokens=1))["choices"]
    assert min(choice["logprobs"]["top_logprobs"][0].values()) == -9999.0


async def test_the_chosen_token_is_always_among_the_alternatives(client):
    (choice,) = (await complete(client, logprobs=0, max_tokens=1))["choices"]
    assert choice["logprobs"]["top_logprobs"] == [{" fox": -0.5}]


async def test_offsets_count_from_the_character_that_a_token_is_part_of(client, engine, tokenizer):
    engine.script = lambda request: tokenizer.encode("é🙂🙃x")
    num_tokens = len(tokenizer.encode("é🙂🙃x"))
    (choice,) = (await complete(client, logprobs=1, max_tokens=num_tokens))["choices"]
    logprobs = choice["logprobs"]
    assert choice["text"] == "é🙂🙃x"
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    assert set(logprobs["text_offset"]) == {0, 1, 2, 3}
    parts = [token for token in logprobs["tokens"] if token.startswith("bytes:")]
    assert parts, "no token of this text is part of a character"


@pytest.mark.parametrize("streamed", [False, True])
async def test_echo_scores_a_prompt_without_generating(client, tokenizer, streamed):
    prompt = "The lazy dog"
    body = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 0}
    if streamed:
        (chunk,) = await stream(client, **body)
        (choice,) = chunk["choices"]
    else:
        (choice,) = (await complete(client, **body))["choices"]
    tokens = [tokenizer.decode([token]) for token in tokenizer.encode(prompt)]
    assert (choice["text"], choice["finish_reason"]) == (prompt, "length")
    assert choice["logprobs"]["tokens"] == tokens
    assert choice["logprobs"]["token_logprobs"] == [None, *[-0.5] * (len(tokens) - 1)]
    assert choice["logprobs"]["top_logprobs"][0] is None
    offsets = choice["logprobs"]["text_offset"]
    assert [prompt[offset:].startswith(t) for offset, t in zip(offsets, tokens, strict=True)] == (
        [True] * len(tokens)
    )


@pytest.mark.parametrize("as_tokens", [False, True])
async def test_echo_comes_before_the_answer(client, tokenizer, as_tokens):
    prompt = tokenizer.encode("The dog") if as_tokens else "The dog"
    body = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 2, "n": 2}
    whole = await complete(client, **body)
    for choice in whole["choices"]:
        assert choice["text"] == "The dog fox jumps"
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == len(tokenizer.encode("The dog")) + 2
        assert logprobs["text_offset"][-2:] == [7, 11]
    chunks = await stream(client, **body)
    assert texts(chunks) == {0: "The dog fox jumps", 1: "The dog fox jumps"}


async def test_add_special_tokens_is_the_tokenizers(client, engine, tokenizer):
    await complete(client, prompt="<|im_start|>Hello", add_special_tokens=False)
    assert engine.requests[0].prompt_token_ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


async def test_what_openai_sends_without_meaning_it_is_accepted(client: httpx.AsyncClient):
    await complete(client, best_of=1, suffix=None, logprobs=None, stop=None, stream=False, n=None)


async def test_an_error_after_the_first_token_is_the_streams_last_event(
    client: httpx.AsyncClient, engine: FakeEngine
):
    engine.fail_after = (2, RuntimeError("a secret of the inside"))
    body = {"model": BASE, "prompt": "Hello", "stream": True}
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200
    *chunks, last = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert texts([json.loads(chunk) for chunk in chunks]) == {0: " fox jumps"}
    assert json.loads(last)["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    assert "[DONE]" not in response.text
