"""A picture of an adapter's bank: which layers use which vectors, and how evenly they mix them."""

from __future__ import annotations

from pathlib import Path

from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from adapters.bank_use import BankUse
from core.factors import PROJECTIONS

_LEAST_SHOWN = 0.01  # of the largest use; below it all is one colour


def draw_bank_use(use: BankUse, title: str, path: Path) -> None:
    """Write a PNG. Raises OSError where `path` cannot be written."""
    figure = Figure(figsize=(12.5, 4.6), layout="constrained")
    figure.suptitle(title, fontsize=11)
    used, mixed = figure.subplots(1, 2, width_ratios=(2, 1))
    most = max(float(use.weight_LH.max()), 1e-6)
    image = used.imshow(
        use.weight_LH.clamp_min(most * _LEAST_SHOWN).numpy(),
        aspect="auto",
        cmap="viridis",
        norm=LogNorm(most * _LEAST_SHOWN, most),
        interpolation="nearest",
    )
    figure.colorbar(image, ax=used, label="sum of weights")
    num_vectors = use.weight_LH.shape[1]
    used.set_title(
        f"use of {num_vectors} bank vectors, {use.num_unused} unused", loc="left", fontsize=10
    )
    used.set_xlabel("bank vector")
    used.set_ylabel("layer")
    used.set_yticks(range(len(use.layers)), [str(layer) for layer in use.layers], fontsize=7)
    names = [name for name in PROJECTIONS if name in use.entropy_bits]
    mixed.boxplot(
        [use.entropy_bits[name].numpy() for name in names], tick_labels=names, showfliers=False
    )
    mixed.set_ylim(-0.05 * use.most_entropy_bits, 1.05 * max(use.most_entropy_bits, 0.1))
    mixed.set_title(
        f"entropy of the {use.topk} weights, mean {use.mean_entropy_bits:.2f} of "
        f"{use.most_entropy_bits:.2f} bits",
        loc="left",
        fontsize=10,
    )
    mixed.set_ylabel("bits")
    mixed.tick_params(axis="x", labelrotation=45)
    mixed.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100, facecolor="white")
