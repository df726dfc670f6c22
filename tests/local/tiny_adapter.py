"""Writes a LoRA adapter with random weights for the tiny model to the folder given second; run by vLLM's Python."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK = 8


def main() -> None:
    model, folder = map(Path, sys.argv[1:])
    shape = json.loads((model / "config.json").read_text())
    queries = shape["num_attention_heads"] * shape["head_dim"]
    torch.manual_seed(0)
    weights = {}
    for layer in range(shape["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{name}.lora_A.weight"] = torch.randn(RANK, shape["hidden_size"])
        weights[f"{name}.lora_B.weight"] = torch.randn(queries, RANK)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


main()
