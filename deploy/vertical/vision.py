"""Train the paper's kind of model, a vision transformer, full and vertical.

`python -m deploy.vertical.vision` (needs scikit-learn for its digits: 1,797 images of 8 x 8). As in
the authors' code qkv, proj, fc1 and fc2 of later layers have increments, biases and norms are each
layer's own; as in the paper increments add up along a chunk. Everything else is equal: data, order,
steps, learning rates. Writes vision.json and vision.png.

Shape legend: B images, P patches and the class token, D width, N heads.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

from deploy.vertical.counting import ViTGeometry, parameter_ratio
from deploy.vertical.modules import Increment, VerticalLinear, num_parameters

HERE = Path(__file__).parent
FACTORISED = ("qkv", "proj", "fc1", "fc2")


@dataclass(frozen=True)
class Recipe:
    """Sizes of the model and of its training; the same for all ranks."""

    hidden_size: int = 64
    num_heads: int = 4
    num_chunks: int = 3
    chunk_size: int = 4
    image_size: int = 8
    patch_size: int = 2
    num_classes: int = 10
    batch_size: int = 64
    num_epochs: int = 30
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    seed: int = 0

    @property
    def geometry(self) -> ViTGeometry:
        """For counting."""
        return ViTGeometry(
            self.hidden_size,
            self.num_chunks * self.chunk_size,
            self.image_size,
            self.patch_size,
            1,
            self.num_classes,
        )


class Block(nn.Module):
    """One layer: norm, attention, norm, MLP of four times the width."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv: nn.Module = nn.Linear(width, 3 * width, bias=False)
        self.proj: nn.Module = nn.Linear(width, width)
        self.fc1: nn.Module = nn.Linear(width, 4 * width)
        self.fc2: nn.Module = nn.Linear(4 * width, width)

    def forward(self, x_BPD: Tensor) -> Tensor:
        """[B, P, D] -> [B, P, D]."""
        qkv = self.qkv(self.norm1(x_BPD)).unflatten(2, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        x_BPD = x_BPD + self.proj(mixed.transpose(1, 2).flatten(2))
        added: Tensor = self.fc2(functional.gelu(self.fc1(self.norm2(x_BPD))))
        return x_BPD + added


class VisionTransformer(nn.Module):
    """Patches, a class token, positions, blocks, a norm and a linear head."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        width, patch = recipe.hidden_size, recipe.patch_size
        self.embed = nn.Conv2d(1, width, patch, stride=patch)
        num_patches = (recipe.image_size // patch) ** 2
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.randn(1, num_patches + 1, width) * 0.02)
        num_layers = recipe.num_chunks * recipe.chunk_size
        self.blocks = nn.ModuleList(Block(width, recipe.num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, recipe.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 1, size, size] -> logits [B, classes]."""
        patches = self.embed(images).flatten(2).transpose(1, 2)
        x_BPD = torch.cat([self.token.expand(len(images), -1, -1), patches], 1) + self.places
        for block in self.blocks:
            x_BPD = block(x_BPD)
        logits: Tensor = self.head(self.norm(x_BPD[:, 0]))
        return logits


def new_model(recipe: Recipe, rank: int | None) -> VisionTransformer:
    """A random one, vertical unless `rank` is None."""
    torch.manual_seed(recipe.seed)
    model = VisionTransformer(recipe)
    if rank is not None:
        for first in range(0, len(model.blocks), recipe.chunk_size):
            _share(model.blocks[first : first + recipe.chunk_size], rank)
    return model


def _share(blocks: nn.ModuleList, rank: int) -> None:
    for name in FACTORISED:
        base = getattr(blocks[0], name)
        increments: list[Increment] = []
        for block in blocks[1:]:
            increments.append(Increment(base.in_features, base.out_features, rank))
            setattr(block, name, VerticalLinear(base, increments, 1.0))


@dataclass(frozen=True)
class Split:
    """Images [B, 1, size, size] and labels [B]."""

    images: Tensor
    labels: Tensor


def digits() -> tuple[Split, Split]:
    """Scikit-learn's digits: four fifths to train on, the rest held out, by a fixed shuffle."""
    from sklearn.datasets import load_digits  # type: ignore[import-not-found, unused-ignore]

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16 - 0.5
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held, seen = order[: len(order) // 5], order[len(order) // 5 :]
    return Split(images[seen], labels[seen]), Split(images[held], labels[held])


def train(
    model: VisionTransformer, recipe: Recipe, seen: Split, held_out: Split, name: str
) -> list[dict[str, float]]:
    """Train in place; returns losses (nats an image) and held-out accuracy after each epoch."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    steps = recipe.num_epochs * -(-len(seen.labels) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, steps)
    rng = torch.Generator().manual_seed(recipe.seed)
    curve = []
    begun = time.monotonic()
    for epoch in range(1, recipe.num_epochs + 1):
        for rows in torch.randperm(len(seen.labels), generator=rng).split(recipe.batch_size):
            loss = functional.cross_entropy(model(seen.images[rows]), seen.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        train_loss, _ = evaluate(model, seen)
        held_loss, accuracy = evaluate(model, held_out)
        point = {"epoch": epoch, "train": train_loss, "held_out": held_loss, "accuracy": accuracy}
        curve.append(point)
        if epoch % 10 == 0 or epoch == recipe.num_epochs:
            print(f"{name} {point} {time.monotonic() - begun:.0f} s", flush=True)
    return curve


def evaluate(model: VisionTransformer, split: Split) -> tuple[float, float]:
    """Mean loss, and the share of images whose most probable class is theirs."""
    with torch.no_grad():
        logits = model(split.images)
    loss = functional.cross_entropy(logits, split.labels).item()
    return loss, (logits.argmax(1) == split.labels).float().mean().item()


def draw(results: dict[str, Any], path: Path) -> None:
    """Training and held-out loss, held-out accuracy, over the epochs."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    titles = ("loss, training", "loss, held out", "accuracy, held out")
    for axes, key, title in zip(
        figure.subplots(1, 3), ("train", "held_out", "accuracy"), titles, strict=True
    ):
        for name, model in results["models"].items():
            curve = model["curve"]
            axes.plot([p["epoch"] for p in curve], [p[key] for p in curve], label=name)
        if key != "accuracy":
            axes.set_yscale("log")
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("epochs")
        axes.grid(axis="y", color="#e3e7eb")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend()
    figure.savefig(path, dpi=100)


def main(
    arguments: Sequence[str] | None = None,
    recipe: Recipe = Recipe(),
    data: tuple[Split, Split] | None = None,
) -> None:
    """Train the full model and the vertical ones, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--epochs", type=int, default=recipe.num_epochs)
    parser.add_argument("--out", type=Path, default=HERE, help="for vision.json and vision.png")
    options = parser.parse_args(arguments)
    recipe = replace(recipe, num_epochs=options.epochs)
    seen, held_out = data or digits()
    results: dict[str, Any] = {
        "recipe": asdict(recipe),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "models": {},
    }
    for rank in [None, *options.ranks]:
        name = "full" if rank is None else f"vertical, rank {rank}"
        model = new_model(recipe, rank)
        curve = train(model, recipe, seen, held_out, name)
        share = 1.0 if rank is None else parameter_ratio(recipe.geometry, recipe.num_chunks, rank)
        results["models"][name] = {
            "parameters": num_parameters(model),
            "share": share,
            "curve": curve,
        }
    (options.out / "vision.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, options.out / "vision.png")


if __name__ == "__main__":
    main()
