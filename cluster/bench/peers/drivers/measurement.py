"""One way of measuring for all peers: a driver only says how to load and how to generate.

    load │ warm-up │ batch of N requests │ one request, 1 token │ one request, all tokens
         └ not counted                     └ ttft_s               └ single_stream_tokens_per_s

Every prompt is new, so that no prefix cache can help, and the same for each peer.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

NUM_REPEATS = 3
"""Of the measurements with one request; their median counts."""

WARM_UP_INPUT_TOKENS = 32
WARM_UP_OUTPUT_TOKENS = 4


@dataclass(frozen=True)
class Arguments:
    """What a driver is asked to do."""

    model: Path  # folder of the checkpoint, in the peer's own format
    requests: int  # of the batch
    input_len: int  # tokens of each prompt
    output_len: int  # tokens generated for each prompt, at least 2
    threads: int  # cores to use
    seed: int  # of the prompts

    @property
    def sequence_len(self) -> int:
        """Tokens of one request, prompt and answer."""
        return self.input_len + self.output_len


Generate = Callable[[list[list[int]], int], list[int]]
"""Answers all prompts greedily, each with exactly as many tokens as asked for, whatever they are;
returns how many tokens each answer has."""

Load = Callable[[Arguments], Generate]


def main(load: Load) -> None:
    """Measure what the command line asks for; print one JSON object as the last line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    for name in ("requests", "input-len", "output-len", "threads", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = Arguments(**vars(parser.parse_args()))
    print(json.dumps(measure(load, arguments)), flush=True)


def measure(load: Load, arguments: Arguments) -> dict[str, float]:
    """Return the figures of one run, named and in the units of `sluice bench engine`."""
    prompts = Prompts(arguments)
    started_s = time.perf_counter()
    generate = load(arguments)
    load_s = time.perf_counter() - started_s

    def timed(num_requests: int, output_len: int) -> float:
        return _timed(generate, prompts.draw(num_requests), output_len)

    # Kernels are picked per shape: both the full batch and the long prompt have to have been seen.
    generate(prompts.draw(arguments.requests, WARM_UP_INPUT_TOKENS), WARM_UP_OUTPUT_TOKENS)
    generate(prompts.draw(1), WARM_UP_OUTPUT_TOKENS)
    wall_s = timed(arguments.requests, arguments.output_len)
    ttft_s = statistics.median(timed(1, 1) for _ in range(NUM_REPEATS))
    alone_s = statistics.median(timed(1, arguments.output_len) for _ in range(NUM_REPEATS))
    out_tokens = arguments.requests * arguments.output_len
    return {
        "out_tokens_per_s": out_tokens / wall_s,
        "total_tokens_per_s": arguments.requests * arguments.sequence_len / wall_s,
        "wall_s": wall_s,
        "load_s": load_s,
        "ttft_s": ttft_s,
        "single_stream_tokens_per_s": (arguments.output_len - 1) / (alone_s - ttft_s),
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _timed(generate: Generate, prompts: list[list[int]], output_len: int) -> float:
    started_s = time.perf_counter()
    lengths = generate(prompts, output_len)
    wall_s = time.perf_counter() - started_s
    if lengths != [output_len] * len(prompts):
        raise RuntimeError(f"asked for {output_len} tokens per prompt, got {lengths}")
    return wall_s


class Prompts:
    """Random token ids, the same ones for every peer, none of them drawn twice."""

    def __init__(self, arguments: Arguments) -> None:
        self._input_len = arguments.input_len
        self._random = random.Random(arguments.seed)
        self._vocab_size = model_config(arguments.model)["vocab_size"]

    def draw(self, num_prompts: int, input_len: int | None = None) -> list[list[int]]:
        """Return prompts of `input_len` tokens; those of the work where it is None."""
        length = min(input_len or self._input_len, self._input_len)
        # Token 0 ends a sequence in the random models.
        draw = self._random.randrange
        return [[draw(1, self._vocab_size) for _ in range(length)] for _ in range(num_prompts)]


def model_config(model: Path) -> dict[str, int]:
    """Return the checkpoint's config.json."""
    config: dict[str, int] = json.loads((model / "config.json").read_text())
    return config


def kv_bytes_per_token(model: Path, element_bytes: int = 2) -> int:
    """Return the size of one token's keys and values in all layers."""
    config = model_config(model)
    kv_dim = config["num_key_value_heads"] * config["head_dim"]
    return 2 * config["num_hidden_layers"] * kv_dim * element_bytes


def peak_rss_bytes() -> int:
    """Return the largest resident set of this process so far.

    Linux's VmHWM begins anew with the program; ru_maxrss would count the parent's memory, which
    the process shares between fork and exec.
    """
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    except OSError:
        found = None
    if found:
        return int(found.group(1)) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
