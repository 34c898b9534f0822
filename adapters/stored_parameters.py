"""How many parameters a VB-LoRA adapter stores (arXiv 2405.15179, section 3.4), counted not read.

Of each sub-vector k indices into the bank and k - 1 weights are stored: the last weight is what the
others leave to 1. With a bank of h vectors of length b and N sub-vectors that makes

    S = h b + N (k i + k - 1)

where an index counts as i parameters. PEFT, and the paper's smaller tables, count its bytes (a
quarter of fp32 below 256 vectors, half below 32,768); others of its tables count it whole. What the
tables really say is in tests/adapters/test_stored_parameters.py.
"""

from __future__ import annotations

from collections.abc import Iterable

WHOLE = 1.0
"""An index as a parameter of its own, as in the paper's tables of Mistral and Gemma."""


def index_parameters(num_vectors: int) -> float:
    """An index of the smallest dtype that PEFT stores it in, in parameters of 4 bytes."""
    return 0.25 if num_vectors < 2**8 else 0.5 if num_vectors < 2**15 else 1.0


def num_sub_vectors(
    shapes: Iterable[tuple[int, int]], num_layers: int, rank: int, vector_length: int
) -> int:
    """N: of A and B of modules with these (out_features, in_features) in each layer."""
    features = sum(sum(shape) for shape in shapes)
    return num_layers * rank * features // vector_length


def stored_parameters(
    num_vectors: int, vector_length: int, num_sub_vectors: int, topk: int, an_index: float
) -> int:
    """S, in parameters of 4 bytes; an index counts as `an_index`."""
    per_sub_vector = topk * an_index + topk - 1
    return int(num_vectors * vector_length + num_sub_vectors * per_sub_vector)
