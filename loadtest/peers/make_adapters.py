"""Make random VB-LoRA adapters of a base with PEFT, and the same weights as plain LoRA.

    OUT/vblora/NNN   PEFT VB-LoRA directory, saved with save_only_topk_weights
    OUT/lora/NNN     PEFT LoRA directory, alpha = rank, expanded by PEFT's own layers

The first adapters are read back through PEFT both ways: logits must agree, or this fails.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, VBLoRAConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BANK_STD, LOGIT_STD = 0.1, 1.0
LARGEST_DIFFERENCE = 1e-3


def main() -> None:
    """Write all adapters and check the first ones."""
    torch.set_num_threads(1)  # many small tensors: more threads only wait for each other
    options = parse_options()
    model = get_peft_model(load(options.base), vblora_config(options)).eval()
    layers = {
        name: module for name, module in model.named_modules() if hasattr(module, "vblora_logits_A")
    }
    for number in range(options.num_adapters):
        randomise(model, layers, torch.Generator().manual_seed(options.seed * 100_003 + number))
        model.save_pretrained(options.out / "vblora" / f"{number:03d}")
        save_as_lora(layers, options, options.out / "lora" / f"{number:03d}")
    for number in range(min(2, options.num_adapters)):
        check(options, number)


def parse_options() -> argparse.Namespace:
    """Sizes have no defaults here: the bench's plan is the one place that says them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    for name in ("num-adapters", "rank", "num-vectors", "vector-length", "topk", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    return parser.parse_args()


def load(base: Path) -> Any:
    """The base in fp32."""
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def vblora_config(options: argparse.Namespace) -> VBLoRAConfig:
    """All seven linear layers of a Llama block."""
    return VBLoRAConfig(
        task_type="CAUSAL_LM",
        r=options.rank,
        num_vectors=options.num_vectors,
        vector_length=options.vector_length,
        topk=options.topk,
        target_modules=TARGETS,
        save_only_topk_weights=True,
        vblora_dropout=0.0,
    )


@torch.no_grad()
def randomise(model: Any, layers: dict[str, Any], generator: torch.Generator) -> None:
    """Draw bank and logits anew."""
    bank = model.base_model.vblora_vector_bank["default"]
    bank.copy_(torch.randn(bank.shape, generator=generator) * BANK_STD)
    for module in layers.values():
        for logits in (module.vblora_logits_A["default"], module.vblora_logits_B["default"]):
            logits.copy_(torch.randn(logits.shape, generator=generator) * LOGIT_STD)


@torch.no_grad()
def save_as_lora(layers: dict[str, Any], options: argparse.Namespace, out: Path) -> None:
    """Write what PEFT's layers compute from bank and logits as a LoRA of scale 1."""
    tensors = {}
    for name, module in layers.items():
        a_RI, b_OR = module._get_lora_matrices("default")
        tensors[f"{name}.lora_A.weight"] = a_RI.contiguous().clone()
        tensors[f"{name}.lora_B.weight"] = b_OR.contiguous().clone()
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.rank,
        lora_alpha=options.rank,
        target_modules=TARGETS,
        inference_mode=True,
        base_model_name_or_path=str(options.base),
    )
    config.save_pretrained(out)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def check(options: argparse.Namespace, number: int) -> None:
    """Fail unless PEFT gives the same logits for both forms, and others than the base's."""
    ids = torch.arange(1, 33)[None]
    plain = load(options.base).eval()(ids).logits
    vblora, lora = (
        PeftModel.from_pretrained(load(options.base), options.out / kind / f"{number:03d}")
        .eval()(ids)
        .logits
        for kind in ("vblora", "lora")
    )
    difference = (vblora - lora).abs().max().item()
    if difference > LARGEST_DIFFERENCE:
        raise SystemExit(f"adapter {number}: VB-LoRA and LoRA differ by {difference}")
    if torch.allclose(lora, plain, atol=0.1):
        raise SystemExit(f"adapter {number} changes the base's logits by less than 0.1")


if __name__ == "__main__":
    main()
