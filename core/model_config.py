"""What the engine needs to know of a Llama-family model before any weight is read.

Reads config.json through transformers, so older files get today's names; refuses what the forward
does not compute exactly. Knows nothing of tensors' values beyond the fingerprint of their files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig
from transformers import LlamaConfig as HFLlamaConfig

from core.errors import UnsupportedModelError
from core.vertical import VERTICAL_MODEL_TYPE, VerticalConfig, read_vertical_config

_SAMPLES_PER_FILE = 64
_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class ModelConfig:
    """Geometry and constants of one Llama-family model. `hf` is transformers' own config.

    `vertical` says how the layers of a vertical base are made of chunks.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_model_len: int
    tie_word_embeddings: bool
    eos_token_ids: frozenset[int]
    bos_token_id: int | None
    hf: HFLlamaConfig = field(repr=False, compare=False)
    vertical: VerticalConfig | None = field(default=None, repr=False)

    def projection_shape(self, projection: str) -> tuple[int, int]:
        """(out_features, in_features) of one of `factors.PROJECTIONS`."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes = {
            "q_proj": (q, self.hidden_size),
            "k_proj": (kv, self.hidden_size),
            "v_proj": (kv, self.hidden_size),
            "o_proj": (self.hidden_size, q),
            "gate_proj": (self.intermediate_size, self.hidden_size),
            "up_proj": (self.intermediate_size, self.hidden_size),
            "down_proj": (self.hidden_size, self.intermediate_size),
        }
        return shapes[projection]


@dataclass(frozen=True)
class BaseInfo:
    """A base as others need to see it, read without loading weights.

    `fingerprint` (hex sha256) covers geometry and rope and, of every weight file, size, header and
    64 evenly spaced samples: an edited or re-trained base gets another one in milliseconds.
    """

    path: Path
    config: ModelConfig
    fingerprint: str


def read_base_info(path: Path | str) -> BaseInfo:
    """Read config and fingerprint of a Hugging Face model directory.

    Raises UnsupportedModelError for a directory that is no Llama-family model with safetensors.
    """
    root = Path(path)
    config = read_model_config(root)
    return BaseInfo(root, config, _fingerprint(root, config))


def read_model_config(path: Path) -> ModelConfig:
    """Read `path`/config.json; UnsupportedModelError names what is not served."""
    if not (path / "config.json").is_file():
        raise UnsupportedModelError(
            f"{path} has no config.json: not a Hugging Face model directory"
        )
    file = path / "config.json"
    content = _content(file)
    model_type = content.get("model_type")
    if model_type not in ("llama", VERTICAL_MODEL_TYPE):
        raise UnsupportedModelError(
            f"{path} is a {model_type!r} model; only model_type 'llama' and "
            f"{VERTICAL_MODEL_TYPE!r} are served"
        )
    vertical = None
    if model_type == VERTICAL_MODEL_TYPE:
        # transformers, which does not know the type, would load it with random layers otherwise
        plain = {key: value for key, value in content.items() if key != "vertical"}
        hf = HFLlamaConfig.from_dict(plain | {"model_type": "llama"})
        vertical = read_vertical_config(file, content.get("vertical"), hf.num_hidden_layers)
    else:
        hf = AutoConfig.from_pretrained(path)
    _refuse_unsupported(path, hf)
    return ModelConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=hf.head_dim,
        rms_norm_eps=hf.rms_norm_eps,
        max_model_len=hf.max_position_embeddings,
        tie_word_embeddings=bool(hf.tie_word_embeddings),
        eos_token_ids=_eos_token_ids(path, hf),
        bos_token_id=hf.bos_token_id,
        hf=hf,
        vertical=vertical,
    )


def _content(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise UnsupportedModelError(f"{file} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise UnsupportedModelError(f"{file} is {content!r}, must be a JSON object")
    return content


def _refuse_unsupported(path: Path, hf: Any) -> None:
    for name in ("attention_bias", "mlp_bias"):
        if getattr(hf, name, False):
            raise UnsupportedModelError(f"{path}: {name}=true is not served")
    if hf.hidden_act != "silu":
        raise UnsupportedModelError(
            f"{path}: hidden_act {hf.hidden_act!r} is not served, only 'silu'"
        )
    rotated = hf.rope_parameters.get("partial_rotary_factor", 1.0)
    if rotated != 1:
        raise UnsupportedModelError(
            f"{path}: partial_rotary_factor {rotated} is not served, only 1"
        )
    if getattr(hf, "quantization_config", None):
        raise UnsupportedModelError(
            f"{path}: quantised weights are not served; store it as fp32, bf16 or fp16"
        )


def _eos_token_ids(path: Path, hf: Any) -> frozenset[int]:
    ids: list[int] = []
    sources: list[Any] = [hf]
    if (path / "generation_config.json").is_file():
        sources.append(GenerationConfig.from_pretrained(path))
    for source in sources:
        eos = source.eos_token_id
        ids += [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    return frozenset(ids)


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model directory, sharded or not, sorted by name."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [path / name for name in names]
    else:
        files = [path / "model.safetensors"]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UnsupportedModelError(
            f"{path} lacks {', '.join(missing)}: weights must be safetensors"
        )
    return files


def _fingerprint(path: Path, config: ModelConfig) -> str:
    rope = json.dumps(config.hf.rope_parameters, sort_keys=True)
    digest = hashlib.sha256(f"{config!r} {rope}".encode())
    if config.vertical is not None:
        digest.update(repr(config.vertical).encode())
    for file in weight_files(path):
        for part in _samples(file):
            digest.update(part)
    return digest.hexdigest()


def _samples(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    yield str(size).encode()
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        yield stream.read(min(header_bytes, size))
        for number in range(_SAMPLES_PER_FILE):
            stream.seek(size * number // _SAMPLES_PER_FILE)
            yield stream.read(_SAMPLE_BYTES)
