"""One run: a variant trained on a demo task and judged on its held-out messages."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters import AdapterStore, CompactVBLoRA, FactorCache, read_peft_adapter
from adapters.compact import compact_bytes
from adapters.training.distillation import Distillation
from adapters.training.from_lora import fit_lora
from adapters.training.loop import TrainingLoop, mean_loss
from adapters.training.trainer import AdapterTrainer, save_adapter
from core import LLM, EngineConfig, SamplingParams, read_base_info
from deploy.ablations.variants import LENDER, USUAL, LoRA, MovedLoRA, Variant, VBLoRA
from deploy.demo.evaluate import HELDOUT_COUNT, HELDOUT_SEED, MAX_TOKENS
from deploy.demo.tasks import Example, Task, distinct_examples
from deploy.demo.train import ADAPTERS, batches, chat_prompt, tokenised
from serving.default_base import BASE_NAME

_POINTS = 12  # of a curve


def run(task: Task, variant: Variant, base: Path, num_steps: int, seed: int) -> dict[str, Any]:
    """Train and judge. Losses are in nats a token; accuracy is in [0, 1].

    `bytes` is what the adapter takes in the store, in fp32, and `own_bytes` that without a bank
    that it shares.
    """
    begun = time.monotonic()
    if isinstance(variant, VBLoRA):
        num_steps, seed = num_steps * variant.times, seed + variant.reseeded
    model, losses = _trained(task, variant, base, num_steps, seed)
    trained = time.monotonic() - begun
    judged = distinct_examples(task, "heldout", HELDOUT_COUNT, HELDOUT_SEED)
    in_tokens = tokenised(judged, AutoTokenizer.from_pretrained(base))
    held_out = mean_loss(model, in_tokens, USUAL.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "adapter"
        save_adapter(model, directory, BASE_NAME)
        del model
        compact = read_peft_adapter(directory, read_base_info(base))
        lent = isinstance(compact, CompactVBLoRA) and isinstance(variant, VBLoRA) and variant.lends
        return {
            "accuracy": _accuracy(task, judged, directory, base),
            "held_out_loss": held_out,
            "curve": _means(losses),
            "bytes": compact_bytes(compact),
            "own_bytes": compact.num_bytes if lent else compact_bytes(compact),
            "stored_parameters": compact.num_stored_parameters,
            "num_steps": num_steps,
            "seed": seed,
            "seconds": round(trained),
        }


def _trained(
    task: Task, variant: Variant, base: Path, num_steps: int, seed: int
) -> tuple[Any, list[float]]:
    """PEFT's model, and the losses of the steps, of a moved LoRA those after the fit."""
    if isinstance(variant, MovedLoRA):
        loop: TrainingLoop = _moved(task, variant, base, num_steps, seed)
        num_steps = variant.num_steps
    else:
        loop = _loop(task, variant, base, num_steps, seed)
    losses = [loop.step() for _ in range(num_steps)]
    return loop.model, losses


def _moved(task: Task, variant: MovedLoRA, base: Path, num_steps: int, seed: int) -> Distillation:
    teacher, _ = _trained(task, variant.lora, base, num_steps, seed)
    recipe = replace(variant.recipe, num_steps=max(1, variant.num_steps), seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        lora, fit = Path(folder) / "lora", Path(folder) / "fit"
        save_adapter(teacher, lora, BASE_NAME)
        del teacher
        fitted = fit_lora(lora, fit, read_base_info(base), recipe)
        batch_of = batches(task, recipe, base)
        return Distillation(base, fit, fitted.pairs, fitted.recipe, batch_of)


def _loop(
    task: Task, variant: VBLoRA | LoRA, base: Path, num_steps: int, seed: int
) -> TrainingLoop:
    usual = variant.recipe if isinstance(variant, VBLoRA) else USUAL
    recipe = replace(usual, num_steps=num_steps, seed=seed)
    batch_of = batches(task, recipe, base)
    if isinstance(variant, LoRA):
        model = _lora(base, variant, seed)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        return TrainingLoop(
            model,
            [{"params": trained, "lr": variant.learning_rate}],
            num_steps=num_steps,
            batch_size=recipe.batch_size,
            batch_of=batch_of,
        )
    bank = _bank_of(LENDER[task.name]) if variant.lends else None
    trainer = AdapterTrainer(base, recipe, batch_of, bank=bank)
    if variant.noise:
        _make_noisy(trainer.model, variant.noise, seed)
    return trainer


def _lora(base: Path, variant: LoRA, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=variant.rank,
            lora_alpha=2 * variant.rank,
            target_modules=list(variant.target_modules),
        )
        return get_peft_model(model, config)


def _bank_of(task_name: str) -> Tensor:
    file = ADAPTERS / task_name / "adapter_model.safetensors"
    with safe_open(file, framework="pt") as tensors:
        bank: Tensor = tensors.get_tensor("base_model.vblora_vector_bank")
    return bank.float()


def _make_noisy(model: Any, std: float, seed: int) -> None:
    """Let each layer choose and weigh its vectors by logits with noise, while it trains."""
    rng = torch.Generator().manual_seed(seed)

    def noisy(plain: Any, layer: Any, logits: Tensor, *rest: Any) -> Tensor:
        if torch.is_grad_enabled():
            logits = logits + std * torch.randn(logits.shape, generator=rng)
        matrix: Tensor = plain(logits, *rest)
        return matrix

    for layer in model.modules():
        if hasattr(layer, "_get_low_rank_matrix"):
            plain = layer._get_low_rank_matrix
            layer._get_low_rank_matrix = MethodType(partial(noisy, plain), layer)


def _accuracy(task: Task, judged: Sequence[Example], directory: Path, base: Path) -> float:
    """Share of right answers, decoded greedily by the engine."""
    with tempfile.TemporaryDirectory() as folder:
        store = AdapterStore.open(folder, read_base_info(base))
        digest = store.add(task.name, directory).record.digest
        with closing(FactorCache(store.load, budget_bytes=2**30)) as cache:
            threads = torch.get_num_threads()
            config = EngineConfig(kv_cache_bytes=2**28, num_threads=threads, max_num_seqs=32)
            llm = LLM(base, config, factor_source=cache)
            prompts = [chat_prompt(llm.tokenizer, example.message) for example in judged]
            sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
            done = llm.generate(prompts, sampling, adapters=digest)
    pairs = zip(judged, done, strict=True)
    return sum(task.same(e.answer, found.text.strip()) for e, found in pairs) / len(judged)


def _means(losses: Sequence[float]) -> list[list[float]]:
    """[step, mean loss of the steps up to it] at a dozen places."""
    size = max(1, len(losses) // _POINTS)
    starts = range(0, len(losses), size)
    parts = [(start, losses[start : start + size]) for start in starts]
    return [[start + len(part), round(sum(part) / len(part), 5)] for start, part in parts]
