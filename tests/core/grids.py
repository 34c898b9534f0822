"""Matrices as they come out of files in fewer bits than 32."""

import torch
from torch import Tensor

from core.kernels.packed_weights import BLOCK


def on_grid(kind: str, num_out: int, num_in: int, seed: int = 0) -> Tensor:
    """A matrix as it comes out of a GGUF file, or of one in bf16 or fp16."""
    rng = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(num_out, num_in, generator=rng) * 0.1
    if kind in ("bf16", "fp16"):
        return weight_OI.to(torch.bfloat16 if kind == "bf16" else torch.float16).float()
    weight_OGB = weight_OI.unflatten(1, (-1, BLOCK))
    least_OG1, most_OG1 = weight_OGB.amin(2, keepdim=True), weight_OGB.amax(2, keepdim=True)
    size_OG1 = weight_OGB.abs().amax(2, keepdim=True)
    if kind == "q4_1":
        step, base, top = (most_OG1 - least_OG1) / 15, least_OG1, 15
    elif kind == "q4_0":
        furthest = torch.where(size_OG1 > most_OG1, least_OG1, most_OG1)
        step, base, top = furthest / -8, furthest, 15
    else:
        step, base, top = size_OG1 / 127, -128 * (size_OG1 / 127).half().float(), 255
    step, base = step.half().float(), base.half().float()
    if kind == "q4_0":
        base = -8 * step
    number = ((weight_OGB - base) / step).round().clamp(0, top)
    return (base + number * step).flatten(1)
