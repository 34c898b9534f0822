"""Prompt texts without a download and without a tokenizer: CPython's own help topics.

Lengths are asked for in tokens and cut in characters; `chars_per_token` comes from the server's
own usage figures (`calibrated`), so real lengths scatter by about a tenth around those asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pydoc_data import topics
from random import Random

DEFAULT_CHARS_PER_TOKEN = 3.5


@cache
def help_topics() -> str:
    """All help topics in the order of their names, about 465,000 characters."""
    return "\n\n".join(text for _, text in sorted(topics.topics.items()))


@dataclass(frozen=True)
class TextPrompts:
    """Cuts prompts out of one long text, which is read as a ring."""

    text: str
    chars_per_token: float = DEFAULT_CHARS_PER_TOKEN

    def cut(self, num_tokens: int, rng: Random) -> str:
        """About `num_tokens` tokens of text from a random place, beginning with a word."""
        start = rng.randrange(len(self.text))
        start = self.text.find(" ", start) + 1  # 0 when no blank follows: the text's beginning
        num_chars = max(1, round(num_tokens * self.chars_per_token))
        num_rings = 1 + (start + num_chars) // len(self.text)
        return (
            (self.text * num_rings)[start : start + num_chars]
            if num_rings > 1
            else (self.text[start : start + num_chars])
        )

    def calibrated(self, observed: Sequence[tuple[int, int]]) -> TextPrompts:
        """The same text cut by the ratio that `observed` (characters, tokens) pairs show."""
        chars, tokens = (
            (sum(column) for column in zip(*observed, strict=True)) if observed else (0, 0)
        )
        return replace(self, chars_per_token=chars / tokens) if chars and tokens else self
