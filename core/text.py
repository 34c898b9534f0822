"""Token ids to text, piece by piece: detokenising, stop strings, the bytes of single tokens.

What has been handed out never changes later: half characters and text that may begin a stop
string are held back. Needs a Hugging Face fast tokenizer; knows nothing of engines or HTTP.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

_REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = 6  # prompt tokens that decide whether the first new token keeps its space
_MAX_HELD_TOKENS = 32  # a character has at most 4 bytes: what is not one by now is no character


class IncrementalDetokenizer:
    """Turns one sequence's new tokens into text, in time linear in their number.

    The pieces joined, `flush()` included, are what decoding prompt and output at once would give
    after the prompt's own text. A window of tokens is decoded twice, with and without the newest
    (prefix and read offset): the difference is new text, unless it ends within a character.
    """

    def __init__(
        self, tokenizer: Any, prompt_token_ids: Sequence[int], skip_special_tokens: bool = True
    ) -> None:
        self._decode = tokenizer.backend_tokenizer.decode
        self._skipped = special_token_ids(tokenizer) if skip_special_tokens else frozenset[int]()
        self._window = self._context(prompt_token_ids)
        text = self._text(self._window)
        self._prefix_chars = len(text.rstrip(_REPLACEMENT))
        self._read = len(self._window) if self._prefix_chars == len(text) else 0
        self._num_held = 0
        self.num_chars = 0  # handed out so far: where the next token's text begins

    def push(self, token_id: int) -> str:
        """The text that this token completes; often its own, sometimes none yet."""
        if token_id in self._skipped:
            return ""
        self._window.append(token_id)
        self._num_held += 1
        text = self._text(self._window)
        unfinished = text.endswith(_REPLACEMENT) or len(text) <= self._prefix_chars
        return "" if unfinished and self._num_held < _MAX_HELD_TOKENS else self._hand_out(text)

    def flush(self) -> str:
        """What is still held, as the tokenizer decodes it (a half character as U+FFFD)."""
        return self._hand_out(self._text(self._window)) if self._num_held else ""

    def _context(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """The prompt's last tokens, as many as it takes to begin where a character does."""
        context: list[int] = []
        for token_id in reversed(prompt_token_ids):
            if token_id in self._skipped:
                continue
            context.insert(0, token_id)
            enough = len(context) >= _CONTEXT_TOKENS
            if enough and not self._text(context).startswith(_REPLACEMENT):
                break
            if len(context) == _MAX_HELD_TOKENS:
                break
        return context

    def _text(self, token_ids: Sequence[int]) -> str:
        text: str = self._decode(token_ids, skip_special_tokens=False)
        return text

    def _hand_out(self, text: str) -> str:
        new_text = text[self._prefix_chars :]
        self._window = self._window[self._read :]
        self._read = len(self._window)
        self._num_held = 0
        self._prefix_chars = len(self._text(self._window))
        self.num_chars += len(new_text)
        return new_text


def special_token_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that `skip_special_tokens` leaves out."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return frozenset(token_id for token_id, token in added.items() if token.special)


class StopStrings:
    """Lets text through up to the stop string that is complete first.

    Text is held back only while it is the beginning of a stop string. How the text is cut into
    pieces makes no difference. `found` is the stop string, or None while there is none.
    """

    def __init__(self, stops: Iterable[str], include_stop: bool = False) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._include_stop = include_stop
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """The text that may be handed out now; nothing more once a stop was found."""
        if self.found is not None:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        end, start, stop = min(self._matches(text), default=(-1, -1, None))
        if stop is None:
            kept = len(text) - self._num_pending(text)
            self._held = text[kept:]
            return text[:kept]
        self.found, self._held = stop, ""
        return text[: end if self._include_stop else start]

    def flush(self) -> str:
        """What is held: no more text comes, so it begins no stop string."""
        text, self._held = self._held, ""
        return text

    def _matches(self, text: str) -> Iterable[tuple[int, int, str]]:
        """(end, start, stop) of each stop string's first place; the smallest is complete first."""
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0:
                yield start + len(stop), start, stop

    def _num_pending(self, text: str) -> int:
        """Length of the longest end of `text` that is the beginning of a stop string."""
        return max((_overlap(text, stop) for stop in self._stops), default=0)


def _overlap(text: str, stop: str) -> int:
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0


class TokenStrings:
    """Single tokens as strings and bytes, for logprobs; one per tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._byte_of_char = _byte_level_alphabet()
        self._is_byte_level = "ByteLevel" in repr(self._tokenizer.decoder)
        self._added = frozenset(self._tokenizer.get_added_tokens_decoder())

    def bytes_of(self, token_id: int) -> bytes:
        """The token's bytes, which may be part of a character only; b"" for an unknown id."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._added:
            return str(token).encode()
        if self._is_byte_level and all(char in self._byte_of_char for char in token):
            return bytes(self._byte_of_char[char] for char in token)
        if len(token) == 6 and token.startswith("<0x"):
            return bytes.fromhex(token[3:5])
        return str(token).replace("\u2581", " ").encode()

    def text_of(self, token_id: int) -> str:
        """Its text as OpenAI writes it: part of a character becomes "bytes:\\xe2\\x82"."""
        raw = self.bytes_of(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, the other way round."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_ins = {chr(byte): byte for byte in printable}
    return stand_ins | {chr(256 + number): byte for number, byte in enumerate(others)}
