"""What the HTTP application is built from; every route gets it by argument."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.store import AdapterStore
from core.model_config import BaseInfo
from serving.engine_client import EngineClient
from serving.metrics import HttpMetrics

MIB = 1 << 20


@dataclass(frozen=True)
class Access:
    """Who may do what, and how much at once.

    api_keys             keys for inference; none: everyone may
    admin_keys           keys for adding and deleting adapters (they may infer, too); without any,
                         everyone may if there are no api_keys either, else nobody
    protect_metrics      /metrics wants a key, too (where keys are set at all)
    max_body_bytes       of a JSON body
    max_upload_bytes     of all files of one adapter together
    allowed_source_root  adapters may be registered from directories under it; None: from none
    spool_directory      where uploads are collected; None: the system's temporary directory
    """

    api_keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    protect_metrics: bool = False
    max_body_bytes: int = 8 * MIB
    max_upload_bytes: int = 1024 * MIB
    allowed_source_root: Path | None = None
    spool_directory: Path | None = None


@dataclass(frozen=True)
class Services:
    """The application's parts.

    base_name      the model name that means the base itself
    tokenizer      a Hugging Face fast tokenizer, with the model's chat template if it has one
    max_model_len  tokens that one sequence may have in the engines, prompt and output together:
                   the engine's own `max_model_len`, which a small KV cache makes smaller
    metrics        this process's own page joins those of the engines, as replica `replica_name`
    quantize       how the engines have rounded the base, which answers' fingerprints tell
    """

    base_name: str
    base: BaseInfo
    tokenizer: Any
    store: AdapterStore
    engines: EngineClient
    max_model_len: int
    access: Access = field(default_factory=Access)
    metrics: HttpMetrics = field(default_factory=HttpMetrics)
    replica_name: str = "ingress"
    quantize: str = "none"
