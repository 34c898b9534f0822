"""Write a Llama base and its LoRA adapters as GGUF in fp32, for llama.cpp.

    OUT/base-f32.gguf   tokens included; bases with a byte-level BPE tokenizer only
    OUT/lora/NNN.gguf   one per folder of ADAPTERS/lora

llama.cpp turns neighbouring elements of a head where transformers turns element i and i + half, so
the rows of q and k (of a LoRA: of its B) are put into that order.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open

Array = npt.NDArray[np.float32]

ARCHITECTURE = "llama"
MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LORA_PREFIX = "base_model.model.model.layers."


def main() -> None:
    """Write base and adapters to OUT."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("adapters", type=Path, help="folder with lora/NNN")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    config = json.loads((options.base / "config.json").read_text())
    write_base(options.base, config, options.out / "base-f32.gguf")
    (options.out / "lora").mkdir(exist_ok=True)
    for folder in sorted((options.adapters / "lora").iterdir()):
        write_lora(folder, config, options.out / "lora" / f"{folder.name}.gguf")


def write_base(base: Path, config: Mapping[str, Any], path: Path) -> None:
    """Geometry, tokens and weights of a Hugging Face folder."""
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    add_geometry(writer, config)
    add_tokens(writer, json.loads((base / "tokenizer.json").read_text()), config)
    for file in sorted(base.glob("*.safetensors")):
        for name, weight in tensors_of(file).items():
            if name == "lm_head.weight" and config["tie_word_embeddings"]:
                continue
            writer.add_tensor(base_name(name), rotated(name, weight, config))
    finish(writer)


def add_geometry(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """What llama.cpp must know of the shapes. Refuses scaled rotations, which it has not met."""
    rope = config.get("rope_parameters") or config
    if rope.get("rope_type", "default") != "default" or config.get("rope_scaling"):
        raise SystemExit(f"only plain rotary positions can be written as GGUF, this has {rope}")
    num_heads = config["num_attention_heads"]
    writer.add_name(ARCHITECTURE)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // num_heads)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)


def add_tokens(
    writer: gguf.GGUFWriter, tokenizer: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    """The vocabulary: requests bring token ids, so only answers' texts depend on it."""
    model = tokenizer["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise SystemExit("only byte-level BPE tokenizers can be written as GGUF")
    pieces: dict[int, str] = {number: piece for piece, number in model["vocab"].items()}
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    pieces |= special
    numbers = range(config["vocab_size"])
    normal, control = int(gguf.TokenType.NORMAL), int(gguf.TokenType.CONTROL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([pieces.get(number, f"[unused {number}]") for number in numbers])
    writer.add_token_types([control if number in special else normal for number in numbers])
    pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    writer.add_token_merges(list(pairs))
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def write_lora(folder: Path, config: Mapping[str, Any], path: Path) -> None:
    """One PEFT LoRA folder."""
    alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    for name, weight in tensors_of(folder / "adapter_model.safetensors").items():
        is_b = name.endswith("lora_B.weight")
        writer.add_tensor(lora_name(name), rotated(name, weight, config) if is_b else weight)
    finish(writer)


def base_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` → `blk.3.ffn_up.weight`."""
    if name in OUTER:
        return OUTER[name]
    layer, _, module = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
    return f"blk.{layer}.{(MODULES | NORMS)[module]}.weight"


def lora_name(name: str) -> str:
    """`LORA_PREFIX`, then `3.mlp.up_proj.lora_A.weight` → `blk.3.ffn_up.weight.lora_a`."""
    module, _, factor = name.removeprefix(LORA_PREFIX).removesuffix(".weight").rpartition(".")
    layer, _, module = module.partition(".")
    return f"blk.{layer}.{MODULES[module]}.weight.{factor.lower()}"


def rotated(name: str, weight: Array, config: Mapping[str, Any]) -> Array:
    """`weight` in llama.cpp's order of rows where it makes q or k, else as it is."""
    if ".q_proj." in name:
        return interleaved(weight, config["num_attention_heads"])
    if ".k_proj." in name:
        return interleaved(weight, config["num_key_value_heads"])
    return weight


def interleaved(weight_OI: Array, num_heads: int) -> Array:
    """Rows (half, i) of each head become rows (i, half)."""
    num_rows, num_columns = weight_OI.shape
    halves = weight_OI.reshape(num_heads, 2, num_rows // num_heads // 2, num_columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(num_rows, num_columns))


def tensors_of(path: Path) -> dict[str, Array]:
    """All tensors of a safetensors file in fp32 (torch reads it: numpy knows no bfloat16)."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).to(torch.float32).numpy() for name in file.keys()}  # noqa: SIM118 - not a dict


def finish(writer: gguf.GGUFWriter) -> None:
    """Everything was only noted so far."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
