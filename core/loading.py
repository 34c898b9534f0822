"""From a model directory and settings to an engine: placement, weights, layers.

Knows nothing of how an engine runs.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from ctypes import CDLL
from functools import partial
from pathlib import Path

import torch

from core.engine import Engine
from core.engine_config import EngineConfig
from core.errors import InvalidRequestError
from core.factors import FactorSource
from core.head import LogitsHead
from core.huge_pages import Arena
from core.int8 import TorchInt8Linear
from core.kernels.build import load_library
from core.kernels.cpu_layers import CpuLayers
from core.kernels.int8_linear import Int8Linear
from core.kernels.panel_linear import PanelLinear
from core.kernels.screened_head import make_head
from core.model import LlamaModel
from core.model_config import ModelConfig, read_model_config
from core.torch_layers import TorchLayers
from core.weights import LinearMakers, ModelWeights, load_weights


def load_engine(
    path: Path | str, config: EngineConfig | None = None, factor_source: FactorSource | None = None
) -> Engine:
    """Read a Hugging Face model directory and build an engine for it.

    Raises UnsupportedModelError for what is not served exactly, InvalidRequestError for a
    quantisation that does not run where `config` places the model.
    """
    config = config or EngineConfig()
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    device, dtype = resolve_placement(config)
    _check_quantize(config, device, dtype)
    model_config = read_model_config(Path(path))
    library = _kernels(device, dtype) if config.compiled_kernels else None
    makers = _makers(config, library)
    factored = config.vertical == "factored"
    weights = _load_weights(Path(path), model_config, device, dtype, makers, factored)
    layers = (
        CpuLayers(model_config, weights, library) if library else TorchLayers(model_config, weights)
    )
    return Engine(LlamaModel(model_config, weights, layers), config, factor_source)


def _load_weights(
    path: Path,
    model_config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    makers: LinearMakers,
    factored: bool,
) -> ModelWeights:
    """On the CPU in a thread that ends with it, since packing computes with several threads.

    OpenMP keeps a pool for each thread that has done so; with more pooled threads than cores
    (GNU's) they sleep between any two parallel loops of a step instead of spinning.
    """
    load = partial(load_weights, path, model_config, device, dtype, makers, factored=factored)
    if device.type != "cpu":
        return load()
    with ThreadPoolExecutor(1, "load-weights") as passing:
        return passing.submit(load).result()


def _kernels(device: torch.device, dtype: torch.dtype) -> CDLL | None:
    """Compiled kernels for fp32 on the CPU where they can be had."""
    return load_library() if device.type == "cpu" and dtype == torch.float32 else None


def _makers(config: EngineConfig, library: CDLL | None) -> LinearMakers:
    arena = Arena()
    if config.quantize != "none":
        int8 = TorchInt8Linear if library is None else partial(Int8Linear, library, arena)
        precise = partial(int8, num_terms=2)  # inputs in 15 bits, which a head needs
        usual = int8 if config.quantize == "int8" else precise
        return LinearMakers(usual, usual, lambda weight_VH: LogitsHead(precise(weight_VH)))
    if library is None:
        return LinearMakers()
    panels = partial(PanelLinear, library, arena)
    head = partial(make_head, library, panels)
    return LinearMakers(panels, partial(panels, in_halves=True), head)


def _check_quantize(config: EngineConfig, device: torch.device, dtype: torch.dtype) -> None:
    if config.quantize != "none" and (device.type != "cpu" or dtype != torch.float32):
        raise InvalidRequestError(
            f"quantize is {config.quantize!r}, which runs on the CPU in float32; the model's place "
            f"is {device.type} in {str(dtype).removeprefix('torch.')}",
            param="quantize",
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
