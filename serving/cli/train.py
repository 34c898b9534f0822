"""`vbserve train`: a VB-LoRA adapter from a file of examples."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from serving.cli.adapters import add as add_adapter
from serving.cli.errors import offline_errors, told_plainly
from serving.settings import CLIENT_KEY_VARIABLE, CLIENT_URL_VARIABLE

if TYPE_CHECKING:
    from adapters.training.examples import Example
    from adapters.training.recipe import Recipe
    from adapters.training.trainer import AdapterTrainer

_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
_FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)
_COUNT = click.IntRange(min=1)
_STATE = "training/state.pt"
_CURVE = "training/curve.json"
_PICTURE = "training/loss.png"


@click.command()
@click.argument("data", type=_FILE)
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--model", type=_FOLDER, help="The base. Default: SmolLM2-135M.")
@click.option("--held-out", type=_FILE, help="Examples to judge by. Default: each tenth of DATA.")
@click.option("--steps", "num_steps", type=_COUNT, default=300, show_default=True)
@click.option("--batch-size", type=_COUNT, default=4, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--rank", type=_COUNT, default=4, show_default=True)
@click.option("--topk", type=_COUNT, default=2, show_default=True, help="Vectors of a sub-vector.")
@click.option("--num-vectors", type=_COUNT, default=256, show_default=True, help="Of the bank.")
@click.option("--vector-length", type=_COUNT, help="Default: the longest that fits, at most 256.")
@click.option("--bank-learning-rate", type=float, default=1e-3, show_default=True)
@click.option("--logits-learning-rate", type=float, default=1e-2, show_default=True)
@click.option(
    "--bank",
    type=_FOLDER,
    help="A VB-LoRA adapter whose bank is used, whatever its size, and kept as it is: the new one "
    "then costs indices and weights alone.",
)
@click.option("--max-tokens", type=_COUNT, default=512, show_default=True, help="Of an example.")
@click.option("--save-every", type=_COUNT, default=50, show_default=True, help="Steps.")
@click.option("--resume", is_flag=True, help="Go on with a training in OUT that was interrupted.")
@click.option("--register", metavar="ID", help="Register the result with a running server.")
@click.option("--replace", is_flag=True, help="With --register: replace other content there.")
@click.option(
    "--url", envvar=CLIENT_URL_VARIABLE, show_envvar=True, default="http://127.0.0.1:8000"
)
@click.option("--api-key", envvar=CLIENT_KEY_VARIABLE, show_envvar=True, help="Management key.")
def train(
    data: Path,
    out: Path,
    model: Path | None,
    held_out: Path | None,
    bank: Path | None,
    max_tokens: int,
    save_every: int,
    resume: bool,
    register: str | None,
    replace: bool,
    url: str,
    api_key: str | None,
    **settings: Any,
) -> None:
    """Train a VB-LoRA adapter on DATA, a file of JSON lines, into the directory OUT.

    A line is {"prompt": "...", "completion": "..."} or {"messages": [...]}, as OpenAI's. OUT is
    what PEFT would write, and under OUT/training the curve of losses.
    """
    need_peft()
    from adapters.training.recipe import Recipe
    from serving.default_base import ensure_default_base

    state = out / _STATE
    if out.exists() and any(out.iterdir()) and not resume:
        raise click.ClickException(f"{out} is not empty; --resume goes on with what is there")
    if resume and not state.is_file():
        raise click.ClickException(f"{out} has no training to go on with")
    with told_plainly(*offline_errors(), OSError):
        recipe = Recipe(**settings)
        base = model or ensure_default_base(progress=click.echo)
        seen, judged = split_examples(data, held_out, base, max_tokens)
        trainer = _trainer(base, recipe, seen, bank)
        curve = trainer.read_state(state)["curve"] if resume else []
        _run(trainer, judged, curve, state, save_every)
        trainer.save(out, base.name)
        _write_curve(out, curve, base.name)
        right = _share_right(base, out, judged)
    click.echo(
        f"{out}: held-out loss {curve[-1]['held_out']:.4f} nats a token, {right} of "
        f"{len(judged)} held-out answers exactly right; losses in {out / _PICTURE}"
    )
    state.unlink()
    if register is not None:
        click.get_current_context().invoke(
            add_adapter,
            adapter_id=register,
            directory=out,
            replace=replace,
            model=None,
            store=None,
            api_key=api_key,
            url=url,
        )


def need_peft() -> None:
    """ClickException where PEFT is not installed."""
    from importlib.util import find_spec

    if find_spec("peft") is None:
        raise click.ClickException("training needs peft: pip install 'vbserve[train]'")


def split_examples(
    data: Path, held_out: Path | None, base: Path, max_tokens: int
) -> tuple[list[Example], list[Example]]:
    """What is trained on, and what is judged by."""
    from adapters.training.errors import TrainingError
    from adapters.training.examples import read_examples
    from core.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(base)
    examples = read_examples(data, tokenizer, max_tokens)
    if held_out is not None:
        return examples, read_examples(held_out, tokenizer, max_tokens)
    if len(examples) < 10:
        raise TrainingError(
            f"{data} has {len(examples)} examples: at least 10, or name others with --held-out"
        )
    return [e for n, e in enumerate(examples) if n % 10 != 9], examples[9::10]


def _trainer(
    base: Path, recipe: Recipe, examples: Sequence[Example], bank: Path | None
) -> AdapterTrainer:
    from adapters.compact import CompactVBLoRA
    from adapters.peft_adapter import read_peft_adapter
    from adapters.training.errors import TrainingError
    from adapters.training.trainer import AdapterTrainer, shuffled
    from core.model_config import read_base_info

    vectors = None
    if bank is not None:
        adapter = read_peft_adapter(bank, read_base_info(base))
        if not isinstance(adapter, CompactVBLoRA):
            raise TrainingError(f"{bank} is a {adapter.kind} adapter, which has no bank")
        vectors = adapter.bank.vectors_HB.float()
    return AdapterTrainer(base, recipe, shuffled(examples, recipe), bank=vectors)


def _run(
    trainer: AdapterTrainer,
    judged: Sequence[Example],
    curve: list[dict[str, float]],
    state: Path,
    save_every: int,
) -> None:
    """All steps that are left; `curve` and `state` are brought up to date every `save_every`."""
    losses: list[float] = []
    left = trainer.recipe.num_steps - trainer.num_done
    with click.progressbar(length=left, label="training", show_pos=True) as bar:
        while not trainer.is_done:
            losses.append(trainer.step())
            bar.update(1)
            if trainer.num_done % save_every == 0 or trainer.is_done:
                mean = sum(losses) / len(losses)
                losses = []
                loss = trainer.loss_over(judged)
                curve.append({"step": trainer.num_done, "train": mean, "held_out": loss})
                bar.label = f"training, loss {mean:.3f}, held out {loss:.3f}"
                trainer.write_state(state, {"curve": curve})


def _write_curve(out: Path, curve: Sequence[dict[str, float]], base_name: str) -> None:
    from matplotlib.figure import Figure

    (out / _CURVE).write_text(json.dumps({"base": base_name, "curve": list(curve)}, indent=1))
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for key, label in (("train", "training"), ("held_out", "held out")):
        axes.plot([p["step"] for p in curve], [p[key] for p in curve], marker=".", label=label)
    axes.set_xlabel("steps")
    axes.set_ylabel("nats a token")
    axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend()
    figure.savefig(out / _PICTURE, dpi=100)


def _share_right(base: Path, adapter: Path, judged: Sequence[Example]) -> int:
    """How many held-out prompts the served adapter answers exactly, greedily."""
    from adapters import AdapterStore, FactorCache
    from core import LLM, EngineConfig, SamplingParams, read_base_info

    most = max(len(example.answer) for example in judged) + 8
    with tempfile.TemporaryDirectory() as folder:
        store = AdapterStore.open(folder, read_base_info(base))
        digest = store.add("trained", adapter).record.digest
        with closing(FactorCache(store.load, budget_bytes=2**30)) as cache:
            llm = LLM(base, EngineConfig(kv_cache_bytes=2**28), factor_source=cache)
            done = llm.generate(
                [example.prompt for example in judged],
                SamplingParams(temperature=0, max_tokens=most),
                adapters=digest,
            )
    pairs = zip(judged, done, strict=True)
    return sum(example.text.strip() == found.text.strip() for example, found in pairs)
