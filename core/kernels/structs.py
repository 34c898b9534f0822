"""The records that Python and the kernels exchange, as kernels.h and layers.c declare them."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p
from typing import Any

import numpy as np

from core.factors import PROJECTIONS

PAIR = np.dtype([("a", "i8"), ("b", "i8"), ("rank", "i8"), ("scale", "f8"), ("gain", "i8")])
SEGMENT = np.dtype([("start", "i8"), ("end", "i8"), ("pairs", "i8")])

_Fields = list[tuple[str, Any]]


def _all(kind: Any, names: str) -> _Fields:
    return [(name, kind) for name in names.split()]


class Matrix(ctypes.Structure):
    """matrix_t."""

    _fields_ = [
        *_all(c_void_p, "panels scales"),
        *_all(c_int64, "num_in num_out half terms form shared"),
    ]


class ScreenedMatrix(ctypes.Structure):
    """head_t."""

    _fields_ = [*_all(Matrix, "exact sketch"), *_all(c_void_p, "norms errors")]


class Increments(ctypes.Structure):
    """increments_t."""

    _fields_ = [
        *_all(c_void_p, "pairs outs"),
        *_all(c_int64, "num_projections inner_stride"),
        ("inner", c_void_p),
    ]


class LowRank(ctypes.Structure):
    """low_rank_t."""

    _fields_ = [
        *_all(c_void_p, "segments segment_of outs"),
        *_all(c_int64, "num_segments num_projections first inner_stride"),
        ("inner", c_void_p),
    ]


class Layer(ctypes.Structure):
    """layer_t."""

    _fields_ = [
        *_all(c_void_p, "input_norm post_attention_norm"),
        *_all(Matrix, "qkv o gate_up down"),
        ("increments", c_void_p),
    ]


class Model(ctypes.Structure):
    """model_t."""

    _fields_ = [
        *_all(c_void_p, "layers last_norm keys values"),
        *_all(c_int64, "kv_stride page_size num_layers num_heads num_kv_heads head_dim"),
        ("most_ranks", c_int64),
        ("outs", c_int64 * len(PROJECTIONS)),
        ("eps", c_double),
    ]


class Step(ctypes.Structure):
    """step_t."""

    _fields_ = [
        *_all(c_void_p, "x out workspace cosines sines"),
        *_all(c_void_p, "slots decode_pages decode_lengths prompt_pages spans segments wanted"),
        *_all(c_int64, "rows num_decodes decode_max_pages num_spans prompt_max_pages"),
        *_all(c_int64, "num_segments inner_stride num_wanted"),
    ]
