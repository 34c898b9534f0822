"""llama-server's /completion as recorded from version 11434: what a stream says and leaves out."""

import json
from dataclasses import dataclass, field
from typing import Any

from completions_server import event, part, read, respond, start

NUM_ADAPTERS = 3
CHARACTER = (
    2,
    3,
)  # places of two tokens that are one character: the first one's id is not streamed


@dataclass
class LlamaServerApp:
    """Answers token n of a prompt that begins with p with id 100 p + n; keeps what it was asked."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        assert scope["path"] == "/completion"
        body = json.loads(await read(receive))
        self.bodies.append(body)
        if body["lora"][0]["id"] >= NUM_ADAPTERS:
            error = {"code": 400, "message": "invalid lora id", "type": "invalid_request_error"}
            await respond(send, 400, json.dumps({"error": error}).encode())
            return
        ids = [100 * body["prompt"][0] + place for place in range(body["n_predict"])]
        if not body["stream"]:
            whole = {"content": "x" * len(ids), "tokens": ids} | _totals(body, len(ids))
            await respond(send, 200, json.dumps(whole | {"stop": True, "id_slot": 15}).encode())
            return
        await start(send)
        for place, token_id in enumerate(ids):
            if place != CHARACTER[0]:
                piece = {"index": 0, "content": " x", "tokens": [token_id], "stop": False}
                await event(send, piece | {"id_slot": -1} | _totals(body, place + 1))
        last = {"index": 0, "content": "", "tokens": [], "id_slot": 15, "stop": True}
        await event(send, last | {"model": "base-f32.gguf"} | _totals(body, len(ids)))
        await part(send, b"", more=False)


def _totals(body: dict[str, Any], num_tokens: int) -> dict[str, int]:
    return {"tokens_predicted": num_tokens, "tokens_evaluated": len(body["prompt"])}
