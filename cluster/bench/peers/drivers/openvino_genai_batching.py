"""OpenVINO GenAI's continuous batching."""

from __future__ import annotations

import numpy as np
import openvino  # type: ignore[import-not-found]
import openvino_genai  # type: ignore[import-not-found]

from .measurement import Arguments, Generate, main

BLOCK_TOKENS = 32
"""OpenVINO's KV blocks on a CPU."""


def load(arguments: Arguments) -> Generate:
    """Compile the exported model for bf16 arithmetic; the KV cache keeps its default, INT8."""
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.num_kv_blocks = arguments.requests * (-(-arguments.sequence_len // BLOCK_TOKENS) + 1)
    scheduler.max_num_seqs = arguments.requests
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = False
    properties = {
        "INFERENCE_PRECISION_HINT": "bf16",
        "INFERENCE_NUM_THREADS": arguments.threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        str(arguments.model), scheduler, "CPU", properties
    )

    def generate(prompts: list[list[int]], output_len: int) -> list[int]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = output_len
        config.ignore_eos = True
        config.do_sample = False
        inputs = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        answers = pipeline.generate(inputs, [config] * len(prompts))
        return [len(answer.m_generation_ids[0]) for answer in answers]

    return generate


if __name__ == "__main__":
    main(load)
