"""Did everyone answer as PEFT does? Outputs → shares, judged by PEFT in fp32 in the same run.

An output's verdict depends on nothing but its content, so verdicts are kept on disk by hash.
A first difference where PEFT's own two best logits lie closer than `TIE_LEAD` is set aside as a
tie: rounding decides there, and neither token is wrong.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loadtest.bench.plan import BenchRequest
from loadtest.bench.processes import ScriptPeer

TIE_LEAD = 1e-3
Verdict = Literal["equal", "tie", "differs"]


@dataclass(frozen=True)
class Output:
    """The tokens that somebody gave for a request."""

    request: BenchRequest
    token_ids: tuple[int, ...]


class Judge:
    """Asks the PEFT peer for what the cache does not know. `context` names base and adapters."""

    def __init__(self, peer: ScriptPeer, cache: Path, context: str) -> None:
        self._peer, self._cache, self._context = peer, cache, context
        self._known: dict[str, Verdict] = json.loads(cache.read_text()) if cache.exists() else {}

    def judge(self, outputs: Sequence[Output]) -> list[Verdict]:
        """One verdict per output; equal outputs are judged once."""
        keys = [self._key(output) for output in outputs]
        unknown = {
            key: output for key, output in zip(keys, outputs, strict=True) if key not in self._known
        }
        if unknown:
            items = [
                {
                    "prompt": output.request.prompt,
                    "adapter": output.request.adapter,
                    "output": output.token_ids,
                }
                for output in unknown.values()
            ]
            answers = self._peer.ask(do="judge", items=items)["verdicts"]
            for key, answer in zip(unknown, answers, strict=True):
                self._known[key] = verdict_of(answer["first_difference"], answer["lead"])
            self._cache.write_text(json.dumps(self._known))
        return [self._known[key] for key in keys]

    def _key(self, output: Output) -> str:
        content = (self._context, output.request.adapter, output.request.prompt, output.token_ids)
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def verdict_of(first_difference: int | None, lead: float | None) -> Verdict:
    """Equal without a difference; a tie where PEFT's best token led by less than `TIE_LEAD`."""
    if first_difference is None or lead is None:
        return "equal"
    return "tie" if lead < TIE_LEAD else "differs"
