"""From a model directory and settings to an engine: placement, weights, operations.

Knows nothing of how an engine runs.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from core.engine import Engine
from core.engine_config import EngineConfig
from core.factors import FactorSource
from core.kernels.build import load_library
from core.kernels.cpu_linear import PanelLinear, panel_width
from core.kernels.cpu_ops import CpuOps
from core.linear import FrozenLinear, MakeLinear
from core.model import LlamaModel
from core.model_config import ModelConfig, read_model_config
from core.ops import Ops, TorchOps
from core.weights import ModelWeights, load_weights


def load_engine(
    path: Path | str, config: EngineConfig | None = None, factor_source: FactorSource | None = None
) -> Engine:
    """Read a Hugging Face model directory and build an engine for it.

    Raises UnsupportedModelError for what is not served exactly.
    """
    config = config or EngineConfig()
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    device, dtype = resolve_placement(config)
    model_config = read_model_config(Path(path))
    ops, make_linear = _means(model_config, device, dtype, compiled=config.compiled_kernels)
    weights = _load_weights(Path(path), model_config, device, dtype, make_linear)
    return Engine(LlamaModel(model_config, weights, ops), config, factor_source)


def _load_weights(
    path: Path,
    model_config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    make_linear: MakeLinear,
) -> ModelWeights:
    """On the CPU in a thread that ends with it, since packing computes with several threads.

    OpenMP keeps a pool for each thread that has done so; with more pooled threads than cores
    (GNU's) they sleep between any two parallel loops of a step instead of spinning.
    """
    arguments = path, model_config, device, dtype, make_linear
    if device.type != "cpu":
        return load_weights(*arguments)
    with ThreadPoolExecutor(1, "load-weights") as passing:
        return passing.submit(load_weights, *arguments).result()


def _means(
    model_config: ModelConfig, device: torch.device, dtype: torch.dtype, *, compiled: bool
) -> tuple[Ops, MakeLinear]:
    """Compiled kernels for fp32 on the CPU where they can be had, else torch's operations."""
    library = None
    if compiled and device.type == "cpu" and dtype == torch.float32:
        library = load_library()
    if library is None:
        return TorchOps(model_config, device, dtype), FrozenLinear
    has_panels = panel_width(library) > 0
    return CpuOps(model_config, library), (
        partial(PanelLinear, library) if has_panels else FrozenLinear
    )


def resolve_placement(config: EngineConfig) -> tuple[torch.device, torch.dtype]:
    """The device and dtype that "auto" stands for on this machine."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if name == "cuda" else "float32"
    return torch.device(name), getattr(torch, dtype)
