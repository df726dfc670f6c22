"""Writes a tiny language model with random weights to the folder given as argument; run by vLLM's Python.

Its tokens are bytes. It says nothing sensible, in a few milliseconds a token: enough for tests of what happens to
requests. A second argument makes it a mixture of experts: ``moe``, or ``skewed``, whose router sends each token to the
experts of EVEN or to those of ODD and to no others.
"""

import sys
from pathlib import Path

import torch
from tiny_model_kinds import CHOICES, EVEN, EXPERTS, ODD
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: number for number, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|eos|>", pad_token="<|pad|>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return fast


def skew(model: Qwen3MoeForCausalLM) -> None:
    """A token goes to EVEN where its hidden state lies on one side of a plane, and to ODD on the other."""
    for layer in model.model.layers:
        gate = layer.mlp.gate.weight
        plane = torch.randn(gate.shape[1])
        with torch.no_grad():
            gate.zero_()
            gate[list(EVEN)] = plane
            gate[list(ODD)] = -plane


def main() -> None:
    folder = Path(sys.argv[1])
    kind = sys.argv[2] if len(sys.argv) > 2 else "dense"
    fast = write_tokenizer(folder)
    torch.manual_seed(0)
    shape = {
        "vocab_size": len(fast),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 8192,
        "eos_token_id": fast.eos_token_id,
        "pad_token_id": fast.pad_token_id,
        "tie_word_embeddings": True,
    }
    if kind == "dense":
        model = Qwen3ForCausalLM(Qwen3Config(**shape))
    else:
        experts = {"num_experts": EXPERTS, "num_experts_per_tok": CHOICES, "moe_intermediate_size": 64}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts, decoder_sparse_step=1))
    if kind == "skewed":
        skew(model)
    model.to(torch.bfloat16).save_pretrained(folder)


main()
