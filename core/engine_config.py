"""The engine's settings: frozen, checked once, nothing read from the environment."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

from core.errors import InvalidRequestError

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Quantize = Literal["none", "int8", "int8-weights"]
Vertical = Literal["factored", "expanded"]

_CPU_BATCHED_TOKENS = 512
_CUDA_BATCHED_TOKENS = 2048


@dataclass(frozen=True)
class EngineConfig:
    """Limits and placement of one engine.

    device                   "auto" takes cuda where there is one
    dtype                    "auto" is bfloat16 on cuda, float32 on the CPU
    quantize                 "int8" rounds the base's matrices at load, and what they multiply to 8
                             bits; "int8-weights" leaves that 15; on the CPU in fp32 alone
    vertical                 how a vertical base runs: "factored" over one matrix per chunk, or with
                             each layer "expanded" to its own (see `layer_matrices`)
    kv_cache_bytes           None: 60 % of the free memory on cuda after loading, 1 GiB on the CPU
    page_size                tokens per KV page
    max_model_len            None: the model's own
    max_num_seqs             sequences that run at once
    max_num_batched_tokens   tokens of one step, prompt chunks and decodes together; chunks take
                             a quarter of them at most while any sequence decodes. None: 2,048 on
                             cuda, 512 on the CPU, and no fewer than max_num_seqs
    max_waiting              queued requests in all, then EngineOverloadedError
    max_waiting_per_adapter  queued requests of one adapter (the base counts as one)
    enable_prefix_caching    reuse pages of equal prompts under the same digest
    num_threads              None leaves torch's own number of CPU threads
    compiled_kernels         on the CPU in fp32, use the C kernels where a compiler is installed
    """

    device: Device = "auto"
    dtype: DType = "auto"
    quantize: Quantize = "none"
    vertical: Vertical = "factored"
    kv_cache_bytes: int | None = None
    page_size: int = 16
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    max_waiting: int = 1024
    max_waiting_per_adapter: int = 256
    enable_prefix_caching: bool = True
    num_threads: int | None = None
    compiled_kernels: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (("quantize", get_args(Quantize)), ("vertical", get_args(Vertical))):
            if getattr(self, name) not in allowed:
                raise InvalidRequestError(
                    f"{name} is {getattr(self, name)!r}, must be one of {', '.join(allowed)}",
                    param=name,
                )
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise InvalidRequestError(
                    f"{field.name} is {value}, must be at least 1", param=field.name
                )
        limit = self.max_num_batched_tokens
        if limit is not None and limit < self.max_num_seqs:
            raise InvalidRequestError(
                f"max_num_batched_tokens is {limit}, must be at least "
                f"max_num_seqs ({self.max_num_seqs}): each running sequence takes a token a step",
                param="max_num_batched_tokens",
            )

    def tokens_per_step(self, device_type: str) -> int:
        """`max_num_batched_tokens`, or its default on a device of this type ("cuda" or "cpu")."""
        if self.max_num_batched_tokens is not None:
            return self.max_num_batched_tokens
        default = _CUDA_BATCHED_TOKENS if device_type == "cuda" else _CPU_BATCHED_TOKENS
        return max(default, self.max_num_seqs)
