"""Turn a GGUF file into a model folder that vLLM serves.

Runs in the model servers' environment (transformers, gguf, accelerate)::

    python prepare_model.py GGUF OUTPUT

The quantized weights are expanded to bfloat16 and written as safetensors beside the tokenizer and its chat
template, which is the one in the GGUF metadata.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def chat_template(gguf_file: Path) -> str:
    """Read the chat template of the GGUF metadata."""
    from gguf import GGUFReader

    field = GGUFReader(gguf_file).get_field("tokenizer.chat_template")
    if field is None:
        sys.exit(f"{gguf_file.name} carries no chat template; set model_path to an instruct model")
    return str(field.contents())


def convert(gguf_file: Path, output: Path) -> None:
    """Write tokenizer, configuration and bfloat16 weights of ``gguf_file`` to ``output``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    tokenizer.chat_template = chat_template(gguf_file)
    model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.bfloat16)
    # The weights are dequantized: nothing may ask vLLM for a GGUF loader.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    convert(arguments.gguf, arguments.output)


if __name__ == "__main__":
    main()
