"""Detokenising and stop strings: whatever the cuts, the whole is what one decode would give."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from core.text import IncrementalDetokenizer, StopStrings, TokenStrings, special_token_ids

CORPUS = [
    "The quick brown fox jumps over the lazy dog, twice a day. ",
    "SELECT name, price FROM items WHERE price > 10 ORDER BY name;",
    "naïve café — “quoted” 東京都 🙂🙃 straße",
    "    four spaces, then\n\na blank line\tand a tab",
]
SPECIAL = ["<s>", "</s>", "<|im_end|>"]


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """As SmolLM2 and Llama 3: bytes under everything."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2: spaces are part of pieces, bytes only where a character has no piece."""
    letters = sorted({char for text in CORPUS[:2] for char in text if char != " "})
    pieces = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *letters]
    merges = [("\u2581", "t"), ("\u2581", "q"), ("q", "u"), ("\u2581", "\u2581"), ("o", "x")]
    pieces += ["".join(pair) for pair in merges]
    backend = Tokenizer(
        models.BPE(
            vocab={piece: number for number, piece in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    backend.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


BYTE_LEVEL = byte_level_tokenizer()
SENTENCEPIECE = sentencepiece_tokenizer()
BOTH = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["bytes", "pieces"])
texts = st.text(st.sampled_from(sorted(set("".join(CORPUS)))), max_size=40)


def decode(tokenizer: PreTrainedTokenizerFast, token_ids: list[int], skip: bool = True) -> str:
    return tokenizer.backend_tokenizer.decode(token_ids, skip_special_tokens=skip)


def stream(tokenizer, prompt: list[int], output: list[int], skip: bool = True) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip)
    pieces = [detokenizer.push(token_id) for token_id in output] + [detokenizer.flush()]
    assert detokenizer.num_chars == len("".join(pieces))
    return pieces


@BOTH
@settings(max_examples=300, deadline=None)
@given(prompt=texts, output=texts, specials=st.booleans(), skip=st.booleans(), data=st.data())
def test_pieces_of_real_text_join_to_the_whole_decode(
    tokenizer, prompt, output, specials, skip, data
):
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    output_ids = tokenizer.encode(output, add_special_tokens=False)
    for _ in range(3 if specials else 0):
        place = data.draw(st.integers(0, len(output_ids)))
        output_ids.insert(place, tokenizer.convert_tokens_to_ids("<|im_end|>"))
    whole = decode(tokenizer, prompt_ids + output_ids, skip)
    if "\ufffd" in whole:
        return  # a special token within a character: no text to agree on
    assert "".join(stream(tokenizer, prompt_ids, output_ids, skip)) == whole.removeprefix(
        decode(tokenizer, prompt_ids, skip)
    )


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, len(BYTE_LEVEL) - 1), max_size=24))
def test_any_bytes_at_all_join_to_the_whole_decode(output_ids):
    pieces = stream(BYTE_LEVEL, [], output_ids)
    assert "".join(pieces) == decode(BYTE_LEVEL, output_ids)


@BOTH
def test_no_piece_ends_within_a_character(tokenizer):
    emoji = tokenizer.encode("🙂🙃", add_special_tokens=False)
    assert len(emoji) > 2, "the test needs characters of several tokens"
    pieces = stream(tokenizer, tokenizer.encode("a"), emoji)
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces).strip() == "🙂🙃"


def test_a_character_begun_in_the_prompt_is_finished_by_the_output():
    token_ids = SENTENCEPIECE.encode("🙂🙃🙂", add_special_tokens=False)
    for cut in range(2, len(token_ids)):
        whole = decode(SENTENCEPIECE, token_ids)
        complete = decode(SENTENCEPIECE, token_ids[:cut]).rstrip("\ufffd")
        assert "".join(stream(SENTENCEPIECE, token_ids[:cut], token_ids[cut:])) == (
            whole.removeprefix(complete)
        )


@BOTH
def test_an_unfinished_character_comes_out_at_the_end(tokenizer):
    token_ids = tokenizer.encode("a🙂", add_special_tokens=False)[:-1]
    pieces = stream(tokenizer, [], token_ids)
    assert "".join(pieces) == decode(tokenizer, token_ids)
    assert pieces[-1].startswith("\ufffd")


def test_endless_rubbish_is_not_held_forever():
    first_byte_of_four = BYTE_LEVEL.convert_tokens_to_ids("ð")
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, [])
    pieces = [detokenizer.push(first_byte_of_four) for _ in range(1000)]
    assert sum(map(len, pieces)) > 900
    assert len(detokenizer._window) < 100


def test_sentencepiece_keeps_the_space_between_prompt_and_output_only():
    the, quick = SENTENCEPIECE.encode("t"), SENTENCEPIECE.encode("q")
    start = [SENTENCEPIECE.convert_tokens_to_ids("<s>")]
    assert "".join(stream(SENTENCEPIECE, start + the, quick)) == " q"
    assert "".join(stream(SENTENCEPIECE, start, quick)) == "q"


@BOTH
def test_special_tokens_are_text_only_where_asked(tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in special_token_ids(tokenizer)
    output = [*tokenizer.encode("fox"), end]
    assert "".join(stream(tokenizer, [], output)) == "fox"
    assert "".join(stream(tokenizer, [], output, skip=False)) == "fox<|im_end|>"


@BOTH
def test_token_bytes_join_to_the_text(tokenizer):
    strings = TokenStrings(tokenizer)
    text = "naïve 東京 🙂 fox"
    joined = b"".join(map(strings.bytes_of, tokenizer.encode(text, add_special_tokens=False)))
    assert joined.decode().removeprefix(" ") == text


@BOTH
def test_token_strings_show_parts_of_characters_as_bytes(tokenizer):
    strings = TokenStrings(tokenizer)
    shown = [strings.text_of(i) for i in tokenizer.encode("🙂", add_special_tokens=False)]
    assert any(text.startswith("bytes:\\x") for text in shown)
    assert strings.text_of(tokenizer.convert_tokens_to_ids("</s>")) == "</s>"
    assert strings.bytes_of(10**6) == b""


def cut(text: str, places: list[int]) -> list[str]:
    borders = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in pairwise(borders)]


def expected(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The slow twin: grow the text by one character until it ends with a stop string."""
    for end in range(len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            stop = max(matches, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("ab\n", max_size=30),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4),
    places=st.lists(st.integers(0, 30), max_size=8),
    include=st.booleans(),
)
def test_stop_strings_do_not_depend_on_the_cuts(text, stops, places, include):
    stop_strings = StopStrings(stops, include)
    handed_out = ""
    whole, found = expected(text, stops, include)
    for piece in cut(text, places):
        handed_out += stop_strings.push(piece)
        assert whole.startswith(handed_out), "handed out what a stop string takes back"
    handed_out += stop_strings.flush()
    assert (handed_out, stop_strings.found) == (whole, found)


def test_only_the_beginning_of_a_stop_string_is_held_back():
    stop_strings = StopStrings(["\nUser:"])
    assert stop_strings.push("fine") == "fine"
    assert stop_strings.push(" so far\nUs") == " so far"
    assert stop_strings.push("ually") == "\nUsually"
    assert stop_strings.push("\nUser: next") == ""
    assert stop_strings.found == "\nUser:"
    assert stop_strings.push("more") == stop_strings.flush() == ""


def test_a_real_tokenizer_streams_what_it_decodes(default_base):
    """SmolLM2's own vocabulary, special tokens and all."""
    tokenizer = AutoTokenizer.from_pretrained(default_base)
    text = "<|im_start|>user\n" + " ".join(CORPUS * 2) + "<|im_end|>\n"
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    for skip in (True, False):
        pieces = stream(tokenizer, [], token_ids, skip)
        assert "".join(pieces) == decode(tokenizer, token_ids, skip)
        assert not any("\ufffd" in piece for piece in pieces)
    assert decode(tokenizer, token_ids, skip=False) == text
