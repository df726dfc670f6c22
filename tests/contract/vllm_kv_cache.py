"""Runs vLLM's own KV cache manager and prints what it does; run by the Python of a vLLM environment.

A random but repeatable course of requests, answers and resets goes through a small cache. Printed as JSON: the events
of each step as vLLM encodes them, and for some prompts how many tokens vLLM would take from its cache after the step;
and vLLM's hashes of some prompts' blocks.
"""

import json
import os
import random
import sys

os.environ.pop("PYTHONHASHSEED", None)
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import msgspec
import torch
from vllm import SamplingParams, __version__
from vllm.distributed.kv_events import AllBlocksCleared, KVEventBatch
from vllm.lora.request import LoRARequest
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash, maybe_convert_block_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

BLOCK_SIZE = 4
BLOCKS = 24
STEPS = 150
RESETS = (60, 110)
PROBES = 3
MODEL = "base"
ADAPTER = "adapter"

hash_function = get_hash_fn_by_name("sha256")
init_none_hash(hash_function)
hasher = get_request_block_hasher(BLOCK_SIZE, hash_function)
encode = msgspec.msgpack.Encoder().encode
dice = random.Random(20)
number = 0


def request(tokens: list[int], model: str, salt: str | None) -> Request:
    global number
    number += 1
    lora = LoRARequest(ADAPTER, 1, "/adapters/1") if model == ADAPTER else None
    parameters = SamplingParams(max_tokens=64)
    parameters.update_from_generation_config({}, 0)
    return Request(str(number), tokens, parameters, None, cache_salt=salt, lora_request=lora, block_hasher=hasher)


def prompt() -> tuple[list[int], str, str | None]:
    prefix = [dice.choice((7, 11))] * BLOCK_SIZE * dice.randrange(1, 4)
    rest = [dice.randrange(2)] * dice.choice((0, 0, 3, 4, 5))
    return (
        prefix + rest,
        dice.choice((MODEL, MODEL, MODEL, ADAPTER)),
        dice.choice((None, None, None, "salt-a", "salt-b")),
    )


def manager() -> KVCacheManager:
    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=1, dtype=torch.float32)
    config = KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    return KVCacheManager(config, 4096, BLOCK_SIZE, BLOCK_SIZE, enable_kv_cache_events=True)


def start(cache: KVCacheManager, running: list[Request]) -> None:
    asked = request(*prompt())
    blocks, cached, _ = cache.get_computed_blocks(asked)
    if cache.allocate_slots(asked, asked.num_tokens - cached, cached, blocks) is not None:
        asked.num_computed_tokens = asked.num_tokens
        running.append(asked)


def answer(cache: KVCacheManager, running: list[Request]) -> None:
    """A token for each running request; one without room is freed, as vLLM preempts."""
    for asked in list(running):
        asked.append_output_token_ids(dice.randrange(2))
        if cache.allocate_slots(asked, 1) is None:
            cache.free(asked)
            running.remove(asked)
        else:
            asked.num_computed_tokens = asked.num_tokens


def finish(cache: KVCacheManager, running: list[Request]) -> None:
    if running:
        cache.free(running.pop(dice.randrange(len(running))))


def probes(cache: KVCacheManager) -> list[dict[str, object]]:
    found = []
    for _ in range(PROBES):
        tokens, model, salt = prompt()
        _, cached, _ = cache.get_computed_blocks(request(tokens, model, salt))
        found.append({"tokens": tokens, "model": model, "salt": salt or "", "cached": cached})
    return found


def steps() -> list[dict[str, object]]:
    cache, running, told = manager(), [], []
    for step in range(STEPS):
        action = dice.choice((start, start, answer, answer, answer, finish))
        action(cache, running)
        if step in RESETS:
            while running:
                finish(cache, running)
            assert cache.reset_prefix_cache()
        events = cache.take_events()
        assert step not in RESETS or AllBlocksCleared() in events
        batch = encode(KVEventBatch(ts=1795570292.5, events=events, data_parallel_rank=0)).hex() if events else None
        told.append({"batch": batch, "probes": probes(cache)})
    return told


def hashes() -> list[dict[str, object]]:
    found = []
    for _ in range(40):
        tokens, model, salt = prompt()
        blocks = request(tokens, model, salt).block_hashes
        forms = [(block.hex(), maybe_convert_block_hash(block)) for block in blocks]
        found.append({"tokens": tokens, "model": model, "salt": salt or "", "hashes": forms})
    return found


json.dump({"vllm": __version__, "block_size": BLOCK_SIZE, "hashes": hashes(), "steps": steps()}, sys.stdout)
