"""Train a small Llama, full and vertical: `python -m deploy.vertical.train` (README.md beside it).

The same data in the same order, the same number of steps and the same learning rates; what differs
is which matrices are the layers' own. Writes results.json and curves.png, and with `--save` the
model of one rank as a checkpoint that vbserve serves.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from core.vertical import VerticalConfig
from deploy.vertical.corpus import VOCAB_SIZE, all_windows, batches, save_tokenizer, token_ids
from deploy.vertical.modules import make_vertical, num_parameters, save_vertical

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """Sizes of the model and of its training; the same for all ranks.

    alpha              increments count alpha / rank times; None: once, as in the paper
    num_train_bytes    so many of the training text, from its beginning; None: all of it
    """

    hidden_size: int = 128
    intermediate_size: int = 384
    num_heads: int = 4
    chunk_sizes: tuple[int, ...] = (4, 4, 4)
    window: int = 256
    batch_size: int = 8
    num_steps: int = 1000
    warmup_steps: int = 50
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    eval_every: int = 50
    seed: int = 0
    alpha: float | None = None
    num_train_bytes: int | None = None

    @property
    def num_layers(self) -> int:
        """Of all chunks."""
        return sum(self.chunk_sizes)


def vertical_config(recipe: Recipe, rank: int) -> VerticalConfig:
    """The paper's: recursive increments of all projections."""
    alpha = float(rank) if recipe.alpha is None else recipe.alpha
    return VerticalConfig(recipe.chunk_sizes, rank, alpha, "recursive")


def name_of(rank: int | None, recipe: Recipe) -> str:
    """What results call a model."""
    seeded = f", seed {recipe.seed}" if recipe.seed else ""
    if rank is None:
        return f"full{seeded}"
    scaled = "" if recipe.alpha is None else f", alpha {recipe.alpha:g}"
    return f"vertical, rank {rank}{scaled}{seeded}"


def new_model(recipe: Recipe, rank: int | None) -> LlamaForCausalLM:
    """A random Llama, vertical unless `rank` is None."""
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.num_layers,
            num_attention_heads=recipe.num_heads,
            num_key_value_heads=recipe.num_heads,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    if rank is not None:
        make_vertical(model, vertical_config(recipe, rank))
    return model


def train(model: LlamaForCausalLM, recipe: Recipe, name: str) -> list[dict[str, float]]:
    """Train in place; returns training and held-out loss (nats a byte) every `eval_every` steps."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe))
    held_out = all_windows(token_ids(held_out=True), recipe.window)
    text = token_ids(held_out=False)[: recipe.num_train_bytes]
    seen = batches(text, recipe.batch_size, recipe.window, recipe.seed)
    curve: list[dict[str, float]] = []
    losses: list[float] = []
    begun = time.monotonic()
    for step, batch in enumerate(islice(seen, recipe.num_steps), start=1):
        loss = _loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % recipe.eval_every == 0:
            curve.append(
                {
                    "step": step,
                    "train": sum(losses) / len(losses),
                    "held_out": evaluate(model, held_out),
                    "seconds": round(time.monotonic() - begun, 1),
                }
            )
            losses = []
            print(f"{name} {curve[-1]}", flush=True)
    return curve


def evaluate(model: LlamaForCausalLM, windows: Tensor) -> float:
    """Mean loss over `windows` [B, T + 1], in nats a token."""
    with torch.no_grad():
        losses = [_loss(model, part).item() * len(part) for part in windows.split(32)]
    return sum(losses) / len(windows)


def _loss(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def _rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine to a tenth."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.num_steps - recipe.warmup_steps)
    return 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2


def draw(results: dict[str, Any], path: Path) -> None:
    """Held-out and training loss of all models over the steps."""
    figure = Figure(figsize=(10.4, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, title in zip(
        panels, ("train", "held_out"), ("training", "held out"), strict=True
    ):
        for name, model in results["models"].items():
            curve = model["curve"]
            axes.plot([p["step"] for p in curve], [p[key] for p in curve], label=name)
        axes.set_title(f"loss, {title}", loc="left", fontsize=10)
        axes.set_xlabel("steps")
        axes.grid(axis="y", color="#e3e7eb")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("nats a byte")
    panels[1].legend()
    figure.savefig(path, dpi=100)


def main(arguments: Sequence[str] | None = None, recipe: Recipe = Recipe()) -> None:
    """Train the full model and the vertical ones, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--no-full", action="store_true", help="leave the full model out")
    parser.add_argument("--steps", type=int, default=recipe.num_steps)
    parser.add_argument("--alpha", type=float, help="increments count alpha / rank times")
    parser.add_argument("--seed", type=int, default=recipe.seed)
    parser.add_argument("--bytes", type=int, help="train on so many of the text, all by default")
    parser.add_argument(
        "--add", type=Path, nargs="*", default=[], help="results.json of other runs, drawn beside"
    )
    parser.add_argument("--out", type=Path, default=HERE, help="for results.json and curves.png")
    parser.add_argument("--save", type=int, metavar="RANK", help="write this rank's checkpoint too")
    options = parser.parse_args(arguments)
    eval_every = min(recipe.eval_every, options.steps)
    recipe = replace(
        recipe,
        num_steps=options.steps,
        eval_every=eval_every,
        alpha=options.alpha,
        num_train_bytes=options.bytes,
        seed=options.seed,
    )
    results: dict[str, Any] = {
        "recipe": asdict(recipe),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "models": {},
    }
    for path in options.add:
        results["models"] |= json.loads(path.read_text())["models"]
    for rank in [*([] if options.no_full else [None]), *options.ranks]:
        name = name_of(rank, recipe)
        model = new_model(recipe, rank)
        curve = train(model, recipe, name)
        results["models"][name] = {"parameters": num_parameters(model), "curve": curve}
        if rank is not None and rank == options.save:
            folder = options.out / "model"
            save_vertical(model, vertical_config(recipe, rank), folder, torch.float16)
            save_tokenizer(folder)
        _write(results, options.out)
    _write(results, options.out)
    draw(results, options.out / "curves.png")


def _write(results: dict[str, Any], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
