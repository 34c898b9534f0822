"""The engine: a Llama forward whose batches mix base rows and rows of any number of adapters.

Knows nothing of vector banks, adapter names, HTTP or Ray. The names below are imported on first
use, since torch and transformers take seconds that `core.errors` and the like do not need.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core.engine import Engine, EngineStats
    from core.engine_config import EngineConfig
    from core.engine_thread import EngineThread
    from core.llm import LLM, Completion
    from core.loading import load_engine
    from core.model_config import BaseInfo, read_base_info
    from core.requests import FinishReason, GenerationRequest, RequestOutput, SamplingParams

_MODULE_OF = {
    "LLM": "llm",
    "BaseInfo": "model_config",
    "Completion": "llm",
    "Engine": "engine",
    "EngineConfig": "engine_config",
    "EngineStats": "engine",
    "EngineThread": "engine_thread",
    "FinishReason": "requests",
    "GenerationRequest": "requests",
    "RequestOutput": "requests",
    "SamplingParams": "requests",
    "load_engine": "loading",
    "read_base_info": "model_config",
}

__all__ = [
    "LLM",
    "BaseInfo",
    "Completion",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "EngineThread",
    "FinishReason",
    "GenerationRequest",
    "RequestOutput",
    "SamplingParams",
    "load_engine",
    "read_base_info",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'core' has no attribute {name!r}")
    return getattr(import_module(f"core.{_MODULE_OF[name]}"), name)
