"""A small real HTTP server that speaks the completions protocol, well and badly by model name."""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

ADAPTERS = [f"adapter-{number}" for number in range(6)]
STEP_SECONDS = 0.004


@dataclass
class CompletionsServer:
    """Serves on `url`; keeps what it was asked. Models other than these fail, each in its way."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        self.keys.append(dict(scope["headers"]).get(b"authorization", b"").decode())
        if scope["path"] == "/v1/models":
            rows = [{"id": "base", "object": "model", "parent": None}]
            rows += [{"id": name, "object": "model", "parent": "base"} for name in ADAPTERS]
            await respond(send, 200, json.dumps({"object": "list", "data": rows}).encode())
            return
        body = json.loads(await read(receive))
        self.bodies.append(body)
        reply = getattr(self, f"_{body['model'].replace('-', '_')}", self._normal)
        await reply(body, send)

    async def _normal(self, body: dict[str, Any], send: Any, tokens_per_chunk: int = 1) -> None:
        if body["model"] != "base" and body["model"] not in [*ADAPTERS, "chunky"]:
            await respond(send, 404, b'{"error": {"message": "no such model"}}')
            return
        num_tokens = body["max_tokens"]
        if not body["stream"]:
            choice = {"text": "x" * num_tokens, "token_ids": list(range(num_tokens))}
            whole = {"choices": [choice], "usage": _usage(body, num_tokens)}
            await respond(send, 200, json.dumps(whole).encode())
            return
        await start(send)
        for first in range(0, num_tokens, tokens_per_chunk):
            ids = list(range(first, min(first + tokens_per_chunk, num_tokens)))
            await event(send, {"choices": [{"text": "x" * len(ids), "token_ids": ids}]})
            await asyncio.sleep(STEP_SECONDS)
        await event(send, {"choices": [], "usage": _usage(body, num_tokens)})
        await end(send)

    async def _chunky(self, body: dict[str, Any], send: Any) -> None:
        await self._normal(body, send, tokens_per_chunk=4)

    async def _texts_only(self, body: dict[str, Any], send: Any) -> None:
        await start(send)
        for text in ("ab", "cdefgh", "ij"):
            await event(send, {"choices": [{"text": text}]})
            await asyncio.sleep(STEP_SECONDS * 3)
        await event(send, {"choices": [], "usage": _usage(body, 5)})
        await end(send)

    async def _error_event(self, body: dict[str, Any], send: Any) -> None:
        await start(send)
        await event(send, {"choices": [{"text": "x", "token_ids": [1]}]})
        data = json.dumps({"error": {"message": "engine died"}})
        await part(send, f"event: error\ndata: {data}\n\n".encode())
        await end(send)

    async def _cut(self, body: dict[str, Any], send: Any) -> None:
        await start(send)
        await event(send, {"choices": [{"text": "x", "token_ids": [1]}]})
        # returning without an end makes the server drop the connection

    async def _no_done(self, body: dict[str, Any], send: Any) -> None:
        await start(send)
        await event(send, {"choices": [{"text": "x", "token_ids": [1]}]})
        await part(send, b"", more=False)

    async def _busy(self, body: dict[str, Any], send: Any) -> None:
        await respond(send, 429, b'{"error": {"message": "full"}}', (b"retry-after", b"0.2"))

    async def _slow(self, body: dict[str, Any], send: Any) -> None:
        await start(send)
        await asyncio.sleep(1.5)
        await end(send)

    async def _silent(self, body: dict[str, Any], send: Any) -> None:
        await start(send)
        await end(send)

    async def _garbage(self, body: dict[str, Any], send: Any) -> None:
        await start(send)
        await part(send, b"data: {not json\n\n")
        await end(send)


def _usage(body: dict[str, Any], completion_tokens: int) -> dict[str, int]:
    prompt = body["prompt"]
    prompt_tokens = len(prompt) if isinstance(prompt, list) else -(-len(prompt) // 5)
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}


async def read(receive: Any) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body


async def respond(send: Any, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})
    await part(send, body, more=False)


async def start(send: Any) -> None:
    kind = (b"content-type", b"text/event-stream")
    await send({"type": "http.response.start", "status": 200, "headers": [kind]})


async def part(send: Any, body: bytes, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def event(send: Any, payload: dict[str, Any]) -> None:
    await part(send, b"data: " + json.dumps(payload).encode() + b"\n\n")


async def end(send: Any) -> None:
    await part(send, b"data: [DONE]\n\n", more=False)
