"""The judge of VB-LoRA adapters by PEFT's own layers: one at a time on one base.

PEFT gives all VB-LoRA adapters of a model the bank of the last one, so each is put on and taken
off again. For many requests of few adapters `peft_peer.py` is faster.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from loadtest.peers.peft_peer import verdict
from loadtest.peers.wire import Answer, serve, versions


class VbloraJudge:
    """The base in fp32, and the folder of PEFT directories named by number."""

    def __init__(self, base: Path, vblora: Path) -> None:
        self.bare: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        self.vblora = vblora

    def judge(self, command: Answer) -> Answer:
        """As `PeftPeer.judge` does."""
        groups: dict[int | None, list[tuple[int, Answer]]] = {}
        for place, item in enumerate(command["items"]):
            groups.setdefault(item["adapter"], []).append((place, item))
        verdicts: dict[int, Answer] = {}
        for number, items in groups.items():
            with self.wearing(number) as model:
                verdicts.update((place, verdict(model, item)) for place, item in items)
        return {"verdicts": [verdicts[place] for place in range(len(verdicts))]}

    @contextmanager
    def wearing(self, number: int | None) -> Iterator[Any]:
        """The model with one adapter on; None is the base."""
        if number is None:
            yield self.bare
            return
        model = PeftModel.from_pretrained(self.bare, self.vblora / f"{number:03d}").eval()
        yield model
        self.bare = model.unload()


def main() -> None:
    """Load, then serve commands on standard input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("vblora", type=Path, help="folder with NNN")
    options = parser.parse_args()
    judge = VbloraJudge(options.base, options.vblora)
    serve({"versions": versions("peft", "transformers", "torch")}, {"judge": judge.judge})


if __name__ == "__main__":
    main()
