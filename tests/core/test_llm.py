"""The plain Python API on a tiny model with a real tokenizer."""

from pathlib import Path
from typing import Any

import pytest
from memory_factors import MemoryFactorSource, random_factors
from tiny_models import write_tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers_oracle import load_reference, reference_greedy

import core
from core import LLM, EngineConfig, SamplingParams
from core.errors import CoreError, InvalidRequestError
from core.model_config import read_model_config
from core.requests import FinishReason

TEXT = "Pack my box with five dozen liquor jugs. "


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("llm") / "model"
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    write_tiny_llama(root, vocab_size=len(tokenizer), eos_token_id=1, bos_token_id=0)
    tokenizer.save_pretrained(root)
    return root


@pytest.fixture(scope="module")
def source(path: Path) -> MemoryFactorSource:
    config = read_model_config(path)
    return MemoryFactorSource.of(
        random_factors(config, "first"), random_factors(config, "second", rank=2, std=0.3)
    )


@pytest.fixture(scope="module")
def llm(path: Path, source: MemoryFactorSource) -> LLM:
    config = EngineConfig(device="cpu", kv_cache_bytes=1 << 20, max_waiting_per_adapter=4)
    return LLM(path, config, factor_source=source)


@pytest.fixture(autouse=True)
def nothing_left_behind(llm: LLM, source: MemoryFactorSource) -> Any:
    yield
    assert not llm.engine.has_work
    assert llm.engine.stats().kv_bytes_used == 0
    assert source.num_open_leases == 0
    llm.engine.check_integrity()


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)


def test_text_and_tokens_equal_the_reference(llm: LLM, path: Path) -> None:
    prompts = [TEXT, "jugs", "with five", [5, 9, 30, 7]]
    reference = load_reference(path)
    for prompt, done in zip(prompts, llm.generate(prompts, greedy(12)), strict=True):
        ids = llm.tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
        assert tuple(done.token_ids) == reference_greedy(reference, ids, 12).token_ids
        kept = [token for token in done.token_ids if token > 1]
        assert done.text == llm.tokenizer.decode(kept)
        assert done.finish_reason is FinishReason.LENGTH


def test_one_adapter_for_all_or_one_each(llm: LLM, path: Path, source) -> None:
    reference, ids = load_reference(path), llm.tokenizer(TEXT).input_ids
    expected = {
        digest: reference_greedy(reference, ids, 8, source.known.get(digest)).token_ids
        for digest in (None, "first", "second")
    }
    assert len(set(expected.values())) == 3
    each = ["second", None, "first", "second"]
    for digest, done in zip(each, llm.generate([TEXT] * 4, greedy(8), adapters=each), strict=True):
        assert tuple(done.token_ids) == expected[digest]
    for done in llm.generate([TEXT] * 2, greedy(8), adapters="first"):
        assert tuple(done.token_ids) == expected["first"]


@pytest.mark.parametrize("as_list", [True, False])
def test_a_stop_string_cuts_text_and_ends_the_work(as_list: bool, llm: LLM) -> None:
    """Stop strings of several letters: a lone str is one stop string, not its letters."""
    whole = llm.generate([TEXT], greedy(60))[0]
    stop = next(
        whole.text[n : n + 3]
        for n in range(4, len(whole.text))
        if "\ufffd" not in whole.text[n : n + 3] and whole.text.find(whole.text[n : n + 3]) == n
    )
    done = llm.generate([TEXT], greedy(60), stop=[stop, "never said"] if as_list else stop)[0]
    assert done.text == whole.text[: whole.text.index(stop)]
    assert done.finish_reason is FinishReason.STOP
    assert len(done.token_ids) < 60
    assert done.token_ids == whole.token_ids[: len(done.token_ids)]
    assert stop in llm.tokenizer.decode(done.token_ids)


def test_a_stop_string_ends_one_prompt_only(llm: LLM) -> None:
    prompts = [TEXT, "jugs", "with"]
    whole = llm.generate(prompts, greedy(20))
    stop = whole[0].text[3:6]
    done = llm.generate(prompts, greedy(20), stop=[stop])
    for before, after in zip(whole, done, strict=True):
        if stop in before.text:
            assert after.text == before.text[: before.text.index(stop)]
        else:
            assert after == before


def test_more_prompts_than_may_wait(llm: LLM) -> None:
    """The queue's limit (4 here) is no limit on a list of prompts."""
    done = llm.generate([TEXT, "jugs"] * 20, greedy(3))
    assert len(done) == 40
    assert {tuple(each.token_ids) for each in done} == {
        tuple(done[0].token_ids),
        tuple(done[1].token_ids),
    }


def test_no_prompts(llm: LLM) -> None:
    assert llm.generate([]) == []


def test_logprobs_come_along(llm: LLM) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=2)
    done = llm.generate([TEXT], sampling)[0]
    assert [entry.token_id for entry in done.logprobs] == done.token_ids


def test_factors_that_take_time(llm: LLM, source: MemoryFactorSource) -> None:
    source.polls_left["first"] = 5
    done = llm.generate([TEXT], greedy(3), adapters="first")[0]
    assert len(done.token_ids) == 3
    assert source.polls_left["first"] == 0


def test_errors_leave_the_engine_empty(llm: LLM, source: MemoryFactorSource) -> None:
    """The fixture above checks what is left; the next call is as good as the first."""
    before = llm.generate([TEXT], greedy(5))
    source.failures["second"] = "bank is gone"
    with pytest.raises(CoreError, match="bank is gone"):
        llm.generate([TEXT] * 3, greedy(50), adapters=["first", "second", None])
    del source.failures["second"]
    with pytest.raises(CoreError, match="unknown"):
        llm.generate([TEXT], greedy(5), adapters="unknown")
    with pytest.raises(InvalidRequestError, match="vocabulary"):
        llm.generate([TEXT, [10**6]], greedy(5))
    with pytest.raises(InvalidRequestError, match="2 adapters for 1 prompts"):
        llm.generate([TEXT], greedy(5), adapters=["first", None])
    assert llm.generate([TEXT], greedy(5)) == before


def test_exported_names_are_all_there() -> None:
    for name in core.__all__:
        assert getattr(core, name).__name__ == name
    with pytest.raises(AttributeError, match="Nothing"):
        _ = core.Nothing
