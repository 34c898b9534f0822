"""A model directory's tokenizer, through transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from core.model_config import read_model_config


def load_tokenizer(path: Path | str) -> Any:
    """The Hugging Face tokenizer of a model that is served.

    Raises UnsupportedModelError, and what transformers raises where there is no tokenizer.
    """
    config = read_model_config(Path(path))
    if config.vertical is None:
        return AutoTokenizer.from_pretrained(path)
    # transformers, which does not know the model's type, would warn of it
    return AutoTokenizer.from_pretrained(path, config=config.hf)
