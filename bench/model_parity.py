"""Does vLLM on CPU give transformers' greedy text, and how fast, in bfloat16 and float32?

Run it with the environment of the model servers, on a machine that does nothing else (5 minutes on 2 cores)::

    ~/.cache/llmtrace-kit/vllm/VERSION/bin/python bench/model_parity.py MODEL_FOLDER

For each dtype: the number of prompts whose 48 greedy tokens equal those of transformers in float32 and in the
same dtype, the mean length of the common prefix, the time to first token of a prompt of 2,000 words cold and
cached, and the time per token. One thread, as the stack's servers have.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

TOKENS = 48
START_TIMEOUT_S = 300
DTYPES = ("float32", "bfloat16")
PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about a harbour in winter.",
    "List three uses of a lighthouse.",
    "Translate to French: The train leaves at noon.",
    "What is 17 plus 25? Answer with the number.",
    "Give one reason to plant trees in a city.",
    "Summarise: The bridge was closed because the river rose overnight, and ferries took its place.",
    "Name the planets of the solar system in order.",
    "Write a Python function that reverses a string.",
)
WORDS = (
    "river",
    "stone",
    "bridge",
    "lantern",
    "harbour",
    "ledger",
    "copper",
    "winter",
    "signal",
    "garden",
    "orbit",
)


def reference(model_dir: Path, dtype: str) -> list[list[int]]:
    """Greedy tokens of transformers for each prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype))
    outputs = []
    for prompt in PROMPTS:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        with torch.inference_mode():
            out = model.generate(**ids, max_new_tokens=TOKENS, do_sample=False)
        answer = out[0, ids["input_ids"].shape[1] :].tolist()
        outputs.append([token for token in answer if token != tokenizer.eos_token_id])
    return outputs


class Server:
    """A vLLM server with the stack's settings, on a free port."""

    def __init__(self, model_dir: Path, dtype: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115
        command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(model_dir), "--served-model-name", "m", "--dtype", dtype),
            *(
                "--host",
                "127.0.0.1",
                "--port",
                str(self.port),
                "--max-model-len",
                "4096",
                "--block-size",
                "32",
            ),
            *("--kv-cache-memory-bytes", str(1 << 29), "--gpu-memory-utilization", "0.15", "--enforce-eager"),
        ]
        environment = os.environ | {
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(command, env=environment, stdout=self.log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2)
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.stop()
                    sys.exit(f"vLLM ({dtype}) did not answer within {START_TIMEOUT_S} s; its log: {self.log.name}")
                time.sleep(0.5)
            else:
                return

    def stop(self) -> None:
        """Stop the server."""
        self.process.terminate()
        self.process.wait(30)

    def post(self, **body: object) -> object:
        """Send a chat request; return the open response."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/chat/completions",
            json.dumps({"model": "m", "temperature": 0, **body}).encode(),
            {"content-type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=120)

    def tokens(self, prompt: str) -> list[int]:
        """Greedy tokens for ``prompt``."""
        with self.post(
            messages=[{"role": "user", "content": prompt}], max_tokens=TOKENS, return_token_ids=True
        ) as answer:
            choice = json.load(answer)["choices"][0]
        return [token for token in choice["token_ids"] if token != 2]

    def times(self, text: str) -> tuple[float, float]:
        """Seconds to the first token and per further token of a streamed answer."""
        started = time.perf_counter()
        with self.post(
            messages=[{"role": "user", "content": text}], max_tokens=33, stream=True, ignore_eos=True
        ) as stream:
            arrivals = [
                time.perf_counter() - started
                for line in stream
                if b'"content":"' in line and b'"content":""' not in line
            ]
        return arrivals[0], (arrivals[-1] - arrivals[0]) / (len(arrivals) - 1)


def common_prefix(left: list[int], right: list[int]) -> int:
    """Number of equal leading tokens."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def words(count: int, seed: int) -> str:
    """Seeded text of ``count`` words."""
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def measure(model_dir: Path, dtype: str, references: dict[str, list[list[int]]]) -> dict[str, object]:
    """Parity and times of one dtype."""
    server = Server(model_dir, dtype)
    try:
        answers = [server.tokens(prompt) for prompt in PROMPTS]
        server.times(words(50, 0))
        cold, cached, per_token = [], [], []
        for seed in (1, 2, 3):
            text = words(2000, seed)
            cold.append(server.times(text)[0])
            again, token = server.times(text)
            cached.append(again)
            per_token.append(token)
    finally:
        server.stop()
    parity = {
        name: {
            "equal": sum(a == b for a, b in zip(answers, expected, strict=True)),
            "of": len(PROMPTS),
            "common_prefix": round(statistics.mean(map(common_prefix, answers, expected)), 1),
        }
        for name, expected in references.items()
        if name in {dtype, "float32"}
    }
    return {
        "parity_with_transformers": parity,
        "ttft_2000_words_cold_s": round(statistics.median(cold), 3),
        "ttft_2000_words_cached_s": round(statistics.median(cached), 3),
        "ms_per_token": round(statistics.median(per_token) * 1000, 1),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    model_dir = parser.parse_args().model_dir
    references = {dtype: reference(model_dir, dtype) for dtype in DTYPES}
    print(json.dumps({dtype: measure(model_dir, dtype, references) for dtype in DTYPES}, indent=2))


if __name__ == "__main__":
    main()
