"""`core.layers.Layers` on compiled kernels: fp32 on the CPU. `TorchLayers` is its slow twin.

One call computes all layers, so that a step neither takes Python's lock nor returns to it between.

Shape legend: T rows of the step, R rows that want logits, H hidden size.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_int, c_int64

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from core.batch import Batch
from core.factors import PROJECTIONS
from core.kernels.adapter_tables import AdapterTables, Segments, inner_width, pair_records
from core.kernels.compiled_linear import CompiledLinear
from core.kernels.structs import Layer, Matrix, Model, Step
from core.kv_storage import KVStorage
from core.linear import Linear
from core.model_config import ModelConfig
from core.weights import LayerWeights, ModelWeights


class CpuLayers:
    """The layers of `weights` on `library`, see `build.load_library`."""

    def __init__(self, config: ModelConfig, weights: ModelWeights, library: ctypes.CDLL) -> None:
        library.run_layers.argtypes = [POINTER(Model), POINTER(Step), c_int]
        library.workspace_floats.argtypes = [POINTER(Model), POINTER(Step)]
        library.workspace_floats.restype = c_int64
        self._library, self._weights = library, weights
        self._tables = AdapterTables(config)
        self._increments = [pair_records(layer.increments) for layer in weights.layers]
        self._layers = (Layer * config.num_layers)(
            *map(_layer, weights.layers, self._increments, [*weights.layers[1:], None])
        )
        self._model = Model(
            layers=ctypes.addressof(self._layers),
            last_norm=weights.norm_H.data_ptr(),
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            most_ranks=max(map(inner_width, self._increments)),
            outs=tuple(config.projection_shape(name)[0] for name in PROJECTIONS),
            eps=config.rms_norm_eps,
        )
        self._workspace = torch.empty(0)

    def forward(
        self, x_TH: Tensor, cos_sin: tuple[Tensor, Tensor], batch: Batch, kv: KVStorage
    ) -> Tensor:
        """See `Layers.forward`. Raises MemoryError; keys and values are then undefined."""
        segments = self._tables.segments(batch.adapter_rows)
        out_RH = x_TH.new_empty(len(batch.head_row_R), x_TH.shape[1])
        model, step = self._model, _step(x_TH, out_RH, cos_sin, batch, segments)
        model.keys, model.values = kv.keys[0].data_ptr(), kv.values[0].data_ptr()
        model.kv_stride, model.page_size = kv.layer_stride, kv.page_size
        needed = self._library.workspace_floats(byref(model), byref(step))
        if needed > len(self._workspace):
            self._workspace = torch.empty(needed)
        step.workspace = self._workspace.data_ptr()
        if self._library.run_layers(byref(model), byref(step), torch.get_num_threads()):
            raise MemoryError("no memory for a step's attention scores or quantised rows")
        return out_RH

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the tables of addresses."""
        return self._tables.num_bytes

    def check_integrity(self) -> None:
        """See `AdapterTables.check_integrity`."""
        self._tables.check_integrity()


def _layer(
    weights: LayerWeights, increments: npt.NDArray[np.void], following: LayerWeights | None
) -> Layer:
    norms = weights.input_norm_H.data_ptr(), weights.post_attention_norm_H.data_ptr()
    nexts = [None] * 4 if following is None else _linears(following)
    matrices = map(_matrix, _linears(weights), nexts)
    return Layer(*norms, *matrices, increments.ctypes.data if weights.increments else None)


def _linears(weights: LayerWeights) -> list[Linear]:
    return [weights.qkv, weights.o, weights.gate_up, weights.down]


def _matrix(linear: Linear, following: Linear | None) -> Matrix:
    if not isinstance(linear, CompiledLinear):
        raise TypeError(f"compiled layers need matrices that kernels read, not {type(linear)}")
    matrix = Matrix.from_buffer_copy(linear.matrix)
    matrix.shared = linear is following
    return matrix


def _step(
    x_TH: Tensor,
    out_RH: Tensor,
    cos_sin: tuple[Tensor, Tensor],
    batch: Batch,
    segments: Segments | None,
) -> Step:
    """Addresses of what the arguments hold; `workspace` is left to the caller."""
    cos_TD, sin_TD = cos_sin
    step = Step(
        x=x_TH.data_ptr(),
        out=out_RH.data_ptr(),
        cosines=cos_TD.data_ptr(),
        sines=sin_TD.data_ptr(),
        slots=batch.kv_slot_T.data_ptr(),
        wanted=batch.head_row_R.data_ptr(),
        rows=len(x_TH),
        num_wanted=len(batch.head_row_R),
    )
    if batch.decode is not None:
        page_SP = batch.decode.page_SP
        step.decode_pages, step.decode_lengths = (
            page_SP.data_ptr(),
            batch.decode.length_S.data_ptr(),
        )
        step.num_decodes, step.decode_max_pages = page_SP.shape
    if batch.prompts is not None:
        page_QP = batch.prompts.page_QP
        step.prompt_pages, step.spans = page_QP.data_ptr(), batch.prompts.span_Q3.data_ptr()
        step.num_spans, step.prompt_max_pages = page_QP.shape
    if segments is not None:
        step.segments = segments.records.ctypes.data
        step.num_segments, step.inner_stride = len(segments.records), segments.inner_stride
    return step
