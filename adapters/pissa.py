"""PiSSA (arXiv 2404.02948; peft 0.21) → a LoRA directory of twice the rank over the plain base.

PiSSA trains B A from the base's first singular vectors and takes these out of the base meanwhile,
so its file is an increment of W - U S V. Over W itself that is s B A - U S V, a pair of rank 2 R.
The decomposition is PEFT's own, of the whole matrix, and its time grows with the cube of the size,
so it is a command's work and not a registration's. `pissa_niter_N` begins with random vectors,
which cannot be found again.

Shape legend: R rank, I input features, O output features.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from adapters.errors import UnsupportedAdapterError
from adapters.lora import read_lora
from adapters.peft_files import CONFIG_NAME, WEIGHTS_NAME, read_peft_files
from adapters.peft_tensors import tensor_name
from adapters.rebuild import rebuild_factors
from core.factors import LowRankPair, ModuleKey
from core.layer_matrices import matrices_in_fp32
from core.model_config import BaseInfo

_MAX_BYTES = 2**34


def convert_pissa(
    source: Path,
    target: Path,
    base: BaseInfo,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write to the new directory `target` what `source` is over the unchanged `base`.

    `progress` gets how many modules are done, and of how many. Raises UnsupportedAdapterError,
    MalformedAdapterError and OSError.
    """
    files = read_peft_files(source, max_config_bytes=_MAX_BYTES, max_weights_bytes=_MAX_BYTES)
    config = {**files.config, "init_lora_weights": True}
    init = files.config.get("init_lora_weights")
    if files.config.get("peft_type") != "LORA" or init != "pissa":
        raise UnsupportedAdapterError(
            f"init_lora_weights is {str(init)[:80]!r} and peft_type "
            f"{str(files.config.get('peft_type'))[:80]!r}: only 'pissa' of 'LORA' can be undone",
            feature="init_lora_weights",
        )
    trained = rebuild_factors(read_lora(config, files.tensors, base)).pairs
    pairs = {}
    with matrices_in_fp32(base) as matrices:
        for key in sorted(trained):
            weight_OI = matrices.weight(key.layer, (key.projection,))
            pairs[key] = _with_principal(trained[key], weight_OI)
            progress(len(pairs), len(trained))
    _write_lora(target, pairs, str(files.config.get("base_model_name_or_path") or base.path.name))


def _with_principal(pair: LowRankPair, weight_OI: Tensor) -> LowRankPair:
    """The pair without the part of the base that its rank once took out; of scale 1."""
    u_OK, s_K, v_KI = torch.linalg.svd(weight_OI, full_matrices=False)
    rank = len(pair.a_RI)
    root_R1 = s_K[:rank, None].sqrt()
    a_RI = torch.cat([pair.a_RI, root_R1 * v_KI[:rank]])
    b_RO = torch.cat([pair.scale * pair.b_RO, -root_R1 * u_OK[:, :rank].T])
    return LowRankPair(a_RI, b_RO, 1.0)


def _write_lora(directory: Path, pairs: Mapping[ModuleKey, LowRankPair], base_name: str) -> None:
    """As PEFT's `save_pretrained` does; `pairs` are of scale 1."""
    tensors, ranks = {}, {}
    for key, pair in pairs.items():
        tensors[tensor_name(key.path, "lora_A.weight")] = pair.a_RI.contiguous()
        tensors[tensor_name(key.path, "lora_B.weight")] = pair.b_RO.T.contiguous()
        ranks[key.path] = len(pair.a_RI)
    most = max(ranks.values())
    others = {path: rank for path, rank in ranks.items() if rank != most}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "init_lora_weights": True,
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    directory.mkdir(parents=True)
    save_file(tensors, directory / WEIGHTS_NAME, {"format": "pt"})
    (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
