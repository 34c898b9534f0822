"""POST /v1/completions and /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
from fastapi import APIRouter, Depends, Request, Response

from serving.http.answers import Answer, Identity
from serving.http.auth import inference_guard
from serving.http.bodies import read_json
from serving.http.chat import ChatAnswer, plan_chat
from serving.http.completions import CompletionAnswer, plan_completion
from serving.http.generation import ChoiceDelta, generate
from serving.http.models import resolve_model
from serving.http.openapi import json_body
from serving.http.prompts import tokenize, tokenize_chat
from serving.http.schemas import CompletionRequest, SamplingFields
from serving.http.schemas_chat import ChatCompletionRequest
from serving.http.services import Services
from serving.http.streaming import (
    EventStreamResponse,
    event,
    events_to_the_end,
    unless_disconnected,
)


def generation_router(services: Services) -> APIRouter:
    """The routes that generate; each resolves its model's name once, at admission."""
    router = APIRouter(dependencies=[Depends(inference_guard(services.access))])
    tokenizer, max_bytes = services.tokenizer, services.access.max_body_bytes

    @router.post("/v1/completions", openapi_extra=json_body(CompletionRequest))
    async def completions(request: Request) -> Response:
        body = await read_json(request, CompletionRequest, max_bytes)
        model = resolve_model(services, body.model)
        prompts = await tokenize(
            tokenizer,
            body.prompt,
            add_special_tokens=body.add_special_tokens,
            vocab_size=services.base.config.vocab_size,
        )
        identity = Identity.new("cmpl", model.name, model.fingerprint)
        plans = plan_completion(body, prompts, model.adapter_digest, identity.id)
        answer = CompletionAnswer(body, prompts, plans, identity, tokenizer)
        return await _respond(request, services, body, answer)

    @router.post("/v1/chat/completions", openapi_extra=json_body(ChatCompletionRequest))
    async def chat_completions(request: Request) -> Response:
        body = await read_json(request, ChatCompletionRequest, max_bytes)
        model = resolve_model(services, body.model)
        messages = [message.for_template() for message in body.messages]
        prompt = await tokenize_chat(tokenizer, messages)
        identity = Identity.new("chatcmpl", model.name, model.fingerprint)
        plans = plan_chat(body, prompt, model.adapter_digest, identity.id, services.max_model_len)
        answer = ChatAnswer(body, prompt, plans, identity, tokenizer)
        return await _respond(request, services, body, answer)

    return router


async def _respond(
    request: Request, services: Services, body: SamplingFields, answer: Answer
) -> Response:
    deltas = generate(services.engines, answer.plans, services.tokenizer)
    if not body.stream:
        whole = await unless_disconnected(request, _collect(answer, deltas))
        return Response(msgspec.json.encode(whole), media_type="application/json")
    # An error before the first token still has a status of its own.
    first = await unless_disconnected(request, anext(deltas))
    events = events_to_the_end(_events(answer, first, deltas, include_usage=body.include_usage))
    return EventStreamResponse(events, source=deltas)


async def _collect(answer: Answer, deltas: AsyncGenerator[ChoiceDelta, None]) -> msgspec.Struct:
    async with aclosing(deltas):
        async for delta in deltas:
            answer.add(delta)
    return answer.whole()


async def _events(
    answer: Answer,
    first: ChoiceDelta,
    deltas: AsyncGenerator[ChoiceDelta, None],
    *,
    include_usage: bool,
) -> AsyncGenerator[bytes, None]:
    """One piece of bytes per delta that has something to say."""
    encode = msgspec.json.Encoder().encode
    yield b"".join(event(encode(chunk)) for chunk in answer.chunks(first))
    async for delta in deltas:
        if chunks := answer.chunks(delta):
            yield b"".join(event(encode(chunk)) for chunk in chunks)
    if include_usage:
        yield event(encode(answer.usage_chunk()))
