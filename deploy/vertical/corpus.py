"""Bytes to learn from: Python's own language reference, which every Python ships.

A byte is a token; two more begin and end a text. Held-out topics are never seen in training.

Shape legend: B windows of a batch, T bytes of a window.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

BEGIN, END = "<s>", "</s>"
VOCAB_SIZE = 258
_EACH, _HELD_OUT = 10, 6  # of so many topics this one is held out


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token b + 2 is the byte b, in GPT-2's printable stand-ins."""
    vocabulary = {BEGIN: 0, END: 1}
    vocabulary |= {char: byte + 2 for byte, char in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        clean_up_tokenization_spaces=False,
    )


def token_ids(held_out: bool) -> Tensor:
    """All topics of one split, one after the other, as token ids [N]."""
    names = [
        name
        for number, name in enumerate(sorted(topics))
        if (number % _EACH == _HELD_OUT) == held_out
    ]
    ids: list[int] = []
    for name in names:
        ids += [0, *(byte + 2 for byte in topics[name].encode()), 1]
    return torch.tensor(ids)


def batches(ids_N: Tensor, windows: int, length: int, seed: int) -> Iterator[Tensor]:
    """Windows [B, T + 1] at random places, for ever; the last column is a target only."""
    rng = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(ids_N) - length - 1, (windows,), generator=rng)
        yield torch.stack([ids_N[start : start + length + 1] for start in starts.tolist()])


def all_windows(ids_N: Tensor, length: int) -> Tensor:
    """Windows [B, T + 1] that cover the text once, but for its last bytes."""
    return ids_N.unfold(0, length + 1, length)


def save_tokenizer(path: Path) -> None:
    """Write the tokenizer's files into a model directory."""
    byte_tokenizer().save_pretrained(path)
