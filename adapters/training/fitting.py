"""A LoRA adapter as VB-LoRA: a bank, and for each sub-vector the nearest mixture of its vectors.

Factors are first turned so that A and B of a module share its size (a singular value decomposition
of B A, cut to the rank that is asked for). Then mixtures and bank are improved in turns: each
sub-vector takes the best pair of vectors, and greedily more up to k, with weights that are positive
and sum to 1 as VB-LoRA's are; the bank takes the least squares of all mixtures. Knows nothing of
files.

Shape legend: N sub-vectors, H bank vectors of length B, K vectors of a mixture, C candidates, R
rank, I input features, O output features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from core.factors import AdapterFactors, LowRankPair, ModuleKey

_CANDIDATES = 64  # of the bank's vectors, the nearest, from which a pair is taken
_CHUNK = 2048  # sub-vectors at a time
_RIDGE = 1e-6


@dataclass(frozen=True)
class Fit:
    """indices_NK, int64, and weights_NK, descending, over bank_HB; sub-vectors in their order."""

    bank_HB: Tensor
    indices_NK: Tensor
    weights_NK: Tensor

    @property
    def mixtures(self) -> Tensor:
        """What stands for the sub-vectors, [N, B]."""
        return (self.weights_NK[..., None] * self.bank_HB[self.indices_NK]).sum(1)


def balanced(pair: LowRankPair, rank: int) -> LowRankPair:
    """The best pair of `rank` for the same increment, of scale 1, A and B of one size.

    Where the increment's rank is smaller, the rest is zero.
    """
    q_IR, r_a = torch.linalg.qr(pair.a_RI.double().T)
    q_OR, r_b = torch.linalg.qr(pair.b_RO.double().T)
    u, s, v = torch.linalg.svd(pair.scale * r_b @ r_a.T)
    root = s[:rank].sqrt()
    a_RI = (root[:, None] * v[:rank]) @ q_IR.T
    b_RO = (q_OR @ (u[:, :rank] * root)).T
    lacking = (0, 0, 0, rank - len(root))
    return LowRankPair(F.pad(a_RI, lacking).float(), F.pad(b_RO, lacking).float(), 1.0)


def sub_vectors(pairs: Mapping[ModuleKey, LowRankPair], length: int) -> Tensor:
    """[N, B] of all modules in their order, A before B, rank by rank."""
    factors = (part for pair in pairs.values() for part in (pair.a_RI, pair.b_RO))
    return torch.cat([part.reshape(-1, length) for part in factors])


def fit_bank(
    targets_NB: Tensor,
    *,
    num_vectors: int,
    topk: int,
    rounds: int = 20,
    seed: int = 0,
    progress: Callable[[float], None] = lambda error: None,
) -> Fit:
    """Fit a bank and mixtures; `progress` gets the relative error of the sub-vectors each round."""
    rng = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(targets_NB), generator=rng)[:num_vectors]
    bank_HB = 2 * targets_NB[drawn]  # mixtures lie between vectors
    if len(bank_HB) < num_vectors:
        more = num_vectors - len(bank_HB)
        spread = targets_NB.std() * torch.randn(more, targets_NB.shape[1], generator=rng)
        bank_HB = torch.cat([bank_HB, spread])
    norm = targets_NB.norm()
    fit = best = Fit(bank_HB, *_mixtures(targets_NB, bank_HB, topk))
    least = math.inf
    for _ in range(rounds):
        bank_HB = _least_squares(fit, targets_NB)
        fit = Fit(bank_HB, *_mixtures(targets_NB, bank_HB, topk))
        error = float((fit.mixtures - targets_NB).norm() / norm)
        progress(error)
        if error < least:
            least, best = error, fit
    return best


def _mixtures(targets_NB: Tensor, bank_HB: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    found = [_mix(part, bank_HB, topk) for part in targets_NB.split(_CHUNK)]
    indices_NK, weights_NK = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = weights_NK.argsort(stable=True, dim=1, descending=True)
    return indices_NK.gather(1, order), weights_NK.gather(1, order)


def _mix(targets_NB: Tensor, bank_HB: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    distance_NH = torch.cdist(targets_NB, bank_HB)
    if topk == 1:
        nearest_N1 = distance_NH.argmin(1, keepdim=True)
        return nearest_N1, torch.ones_like(nearest_N1, dtype=bank_HB.dtype)
    indices_NK, weights_NK = _best_pairs(targets_NB, bank_HB, distance_NH)
    for _ in range(topk - 2):
        indices_NK, weights_NK = _one_more(targets_NB, bank_HB, indices_NK, weights_NK)
    return indices_NK, weights_NK


def _best_pairs(targets_NB: Tensor, bank_HB: Tensor, distance_NH: Tensor) -> tuple[Tensor, Tensor]:
    """Of the nearest vectors, the two between which a target's nearest point lies nearest to it."""
    count = min(_CANDIDATES, len(bank_HB))
    chosen_NC = distance_NH.topk(count, largest=False).indices
    vectors_NCB = bank_HB[chosen_NC] - targets_NB[:, None]  # from the target's own place
    dots_NCC = vectors_NCB @ vectors_NCB.transpose(1, 2)
    square_NC = dots_NCC.diagonal(dim1=1, dim2=2)
    first, second = square_NC[:, :, None], square_NC[:, None]
    apart = (first + second - 2 * dots_NCC).clamp_min(1e-20)
    share = ((second - dots_NCC) / apart).clamp(0, 1)  # of the first vector
    error = share**2 * first + (1 - share) ** 2 * second + 2 * share * (1 - share) * dots_NCC
    error.diagonal(dim1=1, dim2=2).fill_(torch.inf)  # two different vectors
    pair_N = error.flatten(1).argmin(1)
    rows = torch.arange(len(targets_NB))
    i_N, j_N = pair_N // count, pair_N % count
    share_N = share[rows, i_N, j_N]
    indices = torch.stack([chosen_NC[rows, i_N], chosen_NC[rows, j_N]], 1)
    return indices, torch.stack([share_N, 1 - share_N], 1)


def _one_more(
    targets_NB: Tensor, bank_HB: Tensor, indices_NK: Tensor, weights_NK: Tensor
) -> tuple[Tensor, Tensor]:
    """Move each mixture towards the vector that brings it nearest to its target."""
    mixed_NB = (weights_NK[..., None] * bank_HB[indices_NK]).sum(1)
    missing_NB = targets_NB - mixed_NB
    along_NH = missing_NB @ bank_HB.T - (missing_NB * mixed_NB).sum(1, keepdim=True)
    apart_NH = torch.cdist(mixed_NB, bank_HB).square().clamp_min(1e-20)
    step_NH = (along_NH / apart_NH).clamp(0, 1)
    gain_NH = 2 * step_NH * along_NH - step_NH**2 * apart_NH
    gain_NH.scatter_(1, indices_NK, -torch.inf)  # a vector stands once in a mixture
    new_N1 = gain_NH.argmax(1, keepdim=True)
    step_N1 = step_NH.gather(1, new_N1)
    return (
        torch.cat([indices_NK, new_N1], 1),
        torch.cat([weights_NK * (1 - step_N1), step_N1], 1),
    )


def _least_squares(fit: Fit, targets_NB: Tensor) -> Tensor:
    """The bank that is best for these mixtures; vectors that none uses go where most is missing."""
    num_vectors = len(fit.bank_HB)
    gram_HH = torch.zeros(num_vectors, num_vectors, dtype=torch.float64)
    sums_HB = torch.zeros(fit.bank_HB.shape, dtype=torch.float64)
    for rows in torch.arange(len(targets_NB)).split(_CHUNK):
        weights_NH = torch.zeros(len(rows), num_vectors, dtype=torch.float64)
        weights_NH.scatter_add_(1, fit.indices_NK[rows], fit.weights_NK[rows].double())
        gram_HH += weights_NH.T @ weights_NH
        sums_HB += weights_NH.T @ targets_NB[rows].double()
    used_H = gram_HH.diagonal() > 0
    ridge = _RIDGE * gram_HH.diagonal().mean()
    solved_HB: Tensor = torch.linalg.solve(
        gram_HH + ridge * torch.eye(num_vectors), sums_HB
    ).float()
    worst_N = (fit.mixtures - targets_NB).norm(dim=1).argsort(descending=True)
    num_unused = int((~used_H).sum())
    places = worst_N[torch.arange(num_unused) % len(worst_N)]
    solved_HB[~used_H] = 2 * targets_NB[places]
    return solved_HB


def relative_errors(
    wanted: Mapping[ModuleKey, LowRankPair], factors: AdapterFactors
) -> Iterator[tuple[ModuleKey, float]]:
    """By module: the Frobenius norm of what is wrong with B A, by its own."""
    for key, pair in wanted.items():
        own = factors.pairs[key]
        a = torch.cat([pair.a_RI, own.a_RI]).double()
        b = torch.cat([pair.scale * pair.b_RO, -own.scale * own.b_RO]).double()
        size = _norm_of_product(pair.a_RI.double(), pair.scale * pair.b_RO.double())
        yield key, _norm_of_product(a, b) / max(size, 1e-30)


def _norm_of_product(a_RI: Tensor, b_RO: Tensor) -> float:
    squared = ((a_RI @ a_RI.T) * (b_RO @ b_RO.T)).sum().clamp_min(0)
    return float(squared.sqrt())
