"""What all contestants share: base, adapters and prompts, made once by scripts and kept by content.

Everything lies under one cache directory; what is named by a hash of its ingredients is made new
when an ingredient changes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from loadtest.bench.plan import BenchSizes, TokenIds
from loadtest.bench.processes import PEERS, run_python, run_script

_HASH_CHARS = 12


@dataclass(frozen=True)
class Inputs:
    """`adapters` holds vblora/NNN and lora/NNN; `context` is a hash of base and adapters."""

    base: Path
    adapters: Path
    prompts: tuple[TokenIds, ...]
    context: str


def default_base() -> Path:
    """The project's default base, fetched if need be."""
    return Path(run_python(["-m", "serving.default_base"]).strip())


def tiny_base(cache: Path) -> Path:
    """A base for the short mode."""
    script = (PEERS / "make_tiny_base.py").read_bytes()
    target = cache / f"tiny-base-{_hash(script, *_library_versions())}"
    make_once(target, lambda partial: run_script("make_tiny_base.py", partial))
    return target


def prepare(base: Path, sizes: BenchSizes, cache: Path) -> Inputs:
    """Make (or find) adapters and prompts for `base`. Raises BenchError."""
    cache.mkdir(parents=True, exist_ok=True)
    weights = [path.name.encode() + _file_hash(path) for path in sorted(base.glob("*.safetensors"))]
    config, tokenizer = ((base / name).read_bytes() for name in ("config.json", "tokenizer.json"))
    shape = {
        "--num-adapters": sizes.num_adapters,
        "--rank": sizes.rank,
        "--num-vectors": sizes.num_vectors,
        "--vector-length": sizes.vector_length,
        "--topk": sizes.topk,
        "--seed": sizes.seed,
    }
    script = (PEERS / "make_adapters.py").read_bytes()
    context = _hash(config, *weights, script, json.dumps(shape), *_library_versions())
    adapters = cache / f"adapters-{context}"
    flags = [part for pair in shape.items() for part in pair]
    make_once(adapters, lambda partial: run_script("make_adapters.py", base, partial, *flags))
    prompts = _prompts(base, sizes, cache, _hash(tokenizer))
    return Inputs(base, adapters, prompts, context)


def _prompts(base: Path, sizes: BenchSizes, cache: Path, key: str) -> tuple[TokenIds, ...]:
    path = cache / f"prompts-{key}-{sizes.prompt_tokens}-{sizes.seed}.json"
    if not path.exists():
        partial = path.with_suffix(".partial")
        flags = ("--num-tokens", sizes.prompt_tokens, "--seed", sizes.seed)
        run_script("make_prompts.py", base, partial, *flags)
        partial.rename(path)
    return tuple(tuple(ids) for ids in json.loads(path.read_text()))


def make_once(target: Path, make: Callable[[Path], object]) -> None:
    """Make a directory beside its place and rename it, so that half of one is never used."""
    if target.is_dir():
        return
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    make(partial)
    partial.rename(target)


def _file_hash(path: Path) -> bytes:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def _hash(*parts: bytes | str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    return digest.hexdigest()[:_HASH_CHARS]


def _library_versions() -> list[str]:
    return [version(name) for name in ("torch", "transformers", "peft")]
