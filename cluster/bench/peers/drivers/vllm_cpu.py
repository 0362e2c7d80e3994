"""vLLM's CPU build, in this process: nothing goes through a server."""

from __future__ import annotations

import os

# Read when vLLM is imported. One process: its core would otherwise poll beside the model's threads.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_NO_USAGE_STATS"] = "1"

from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

from .measurement import Arguments, Generate, kv_bytes_per_token, main

BLOCK_TOKENS = 128
"""vLLM's KV blocks on a CPU."""


def load(arguments: Arguments) -> Generate:
    """Load and compile, with a KV cache that holds the whole batch."""
    # Left to itself it takes one thread per physical core, however many it was given.
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{arguments.threads - 1}"
    blocks = arguments.requests * (-(-arguments.sequence_len // BLOCK_TOKENS) + 1)
    llm = LLM(
        model=str(arguments.model),
        dtype="auto",
        max_model_len=arguments.sequence_len,
        max_num_seqs=arguments.requests,
        kv_cache_memory_bytes=blocks * BLOCK_TOKENS * kv_bytes_per_token(arguments.model),
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        disable_log_stats=True,
    )

    def generate(prompts: list[list[int]], output_len: int) -> list[int]:
        params = SamplingParams(
            temperature=0.0, max_tokens=output_len, ignore_eos=True, detokenize=False
        )
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        answers = llm.generate(inputs, params, use_tqdm=False)
        return [len(answer.outputs[0].token_ids) for answer in answers]

    return generate


if __name__ == "__main__":
    main(load)
