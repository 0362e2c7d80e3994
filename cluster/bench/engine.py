"""Measures an engine in this process, without Ray or a network.

    probe the machine │ load │ warm up │ rounds of N requests at once │ single requests
                      └ peak_rss_bytes counts from here                └ ttft_s, decoding rate

Every prompt is new but for the shared prefix, so the prefix cache helps with nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

from cluster.bench.engine_drive import (
    Pace,
    StepTime,
    drive,
    greedy_request,
    random_tokens,
)
from cluster.bench.engine_setup import LoadedEngine, check_engine, load_engine, num_threads_of
from cluster.bench.engine_work import Alone, model_work, shares
from cluster.bench.hardware import matrix_kind, measure_peaks
from cluster.bench.statistics import LatencyObjective, RequestRecord, percentile, summarize
from cluster.clock import WallClock
from cluster.config import ClusterConfig
from cluster.errors import SluiceError
from cluster.types import EngineRequest

NUM_SINGLE = 3
"""Requests measured alone, one after the other; the median counts."""

WARMUP_INPUT_TOKENS = 32
WARMUP_OUTPUT_TOKENS = 4

OnProgress = Callable[[str, int, int], None]
"""Gets what is being done, and how many requests of how many are done with."""


@dataclass(frozen=True)
class EngineLoad:
    """The work of one measurement."""

    num_requests: int = 16  # at once
    num_input_tokens: int = 256  # of each prompt, the shared prefix included
    num_output_tokens: int = 64  # of each answer, >= 2
    num_shared_prefix_tokens: int = 0  # first tokens that all prompts have in common
    num_rounds: int = 1  # each of `num_requests`; medians count
    num_warmups: int = 1  # rounds of short requests before
    seed: int = 0  # of the prompts

    @property
    def num_sequence_tokens(self) -> int:
        """Tokens of one request, prompt and answer."""
        return self.num_input_tokens + self.num_output_tokens

    def num_blocks(self, block_size: int) -> int:
        """Return the KV blocks that all requests at once need."""
        return self.num_requests * -(-self.num_sequence_tokens // block_size)


@dataclass(frozen=True)
class EngineBenchResult:
    """What a run gives: plain data, and the engine for whoever wants to look further."""

    figures: dict[str, Any]
    loaded: LoadedEngine
    bench: EngineBench


def run_engine_bench(
    config: ClusterConfig, load: EngineLoad, on_progress: OnProgress = lambda *_: None
) -> EngineBenchResult:
    """Measure an engine under a load.

    Raises:
        ConfigError: The model, its cache or its sequences do not fit, or do not run here.
        SluiceError: A request failed.
    """
    import torch

    from cluster.kernels import native
    from cluster.model.memory import peak_rss_bytes, reset_peak_rss

    info = check_engine(config, load.num_sequence_tokens)
    torch.set_num_threads(num_threads_of(config))
    device, dtype = config.model.device, info.dtype_for(config.model.dtype)
    quantization = info.quantization_for(config.model.quantization)
    on_progress("measuring the machine", 0, 1)
    peaks = measure_peaks(device, matrix_kind(dtype, quantization))
    reset_peak_rss()
    on_progress("loading", 0, 1)
    loaded = load_engine(config, info)
    bench = EngineBench(loaded, load, on_progress)
    bench.warm_up()
    rounds, steps = bench.rounds()
    alone = bench.alone()
    work = model_work(info, loaded.weight_bytes, loaded.kv_bytes_per_token)
    result = _batch_figures(rounds) | {
        "load_s": loaded.load_s,
        "ttft_s": alone.ttft_s,
        "single_stream_tokens_per_s": alone.tokens_per_s,
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_device_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "weight_bytes": loaded.weight_bytes,
        "kv_cache_bytes": loaded.kv_cache_bytes,
        **shares(work, peaks, alone, steps),
    }
    figures = {
        "model": config.model.served_name,
        "engine": {
            "dtype": dtype,
            "quantization": quantization,
            "cache_dtype": config.cache.dtype,
            "device": torch.cuda.get_device_name() if device == "cuda" else device,
            "threads": torch.get_num_threads(),
            "kernels": "cuda" if device == "cuda" else native.isa() or "torch",
            "attention": loaded.attention,
            "decode_graphs": loaded.has_graphs,
            "num_blocks": config.cache.num_blocks,
            "max_num_seqs": config.engine.max_num_seqs,
            "max_num_batched_tokens": config.engine.max_num_batched_tokens,
        },
        "load": asdict(load),
        "hardware": asdict(peaks),
        "result": result,
    }
    return EngineBenchResult(figures, loaded, bench)


class EngineBench:
    """The rounds of one measurement.

    Args:
        loaded: The engine.
        load: What it is given.
        on_progress: Told of each request that ended.
    """

    def __init__(self, loaded: LoadedEngine, load: EngineLoad, on_progress: OnProgress) -> None:
        self._loaded = loaded
        self._load = load
        self._on_progress = on_progress
        self._ids = count()

    def warm_up(self) -> None:
        """Let every kernel see a full batch and a long prompt once."""
        load = self._load
        num_in = min(WARMUP_INPUT_TOKENS, load.num_input_tokens)
        num_out = min(WARMUP_OUTPUT_TOKENS, load.num_output_tokens)
        for _ in range(load.num_warmups):
            self._run("warming up", self._requests(load.num_requests, num_in, num_out))
            self._run("warming up", self._requests(1, load.num_input_tokens, num_out))

    def rounds(self) -> tuple[list[list[RequestRecord]], list[StepTime]]:
        """Return the records of each round, and the steps of all."""
        steps: list[StepTime] = []
        rounds = []
        for index in range(self._load.num_rounds):
            rounds.append(self.one_round(f"round {index + 1} of {self._load.num_rounds}"))
            steps += self._loaded.server.steps
        return rounds, steps

    def one_round(self, label: str) -> list[RequestRecord]:
        """Return the records of the whole load, given at once."""
        load = self._load
        requests = self._requests(load.num_requests, load.num_input_tokens, load.num_output_tokens)
        return self._run(label, requests)

    def alone(self) -> Alone:
        """Return the median of single requests, each alone in the engine."""
        load = self._load
        records = []
        for _ in range(NUM_SINGLE):
            request = self._requests(1, load.num_input_tokens, load.num_output_tokens)
            records += self._run("single requests", request)
        # The last token is never computed, the first comes with the prompt.
        num_context = load.num_input_tokens + load.num_output_tokens / 2
        ttft_s = percentile([r.ttft_s for r in records if r.ttft_s], 50)
        tpot_s = percentile([r.tpot_s for r in records if r.tpot_s], 50)
        assert ttft_s and tpot_s, "a request has two tokens at least"
        num_cached = max(record.num_cached_tokens for record in records)
        return Alone(load.num_input_tokens, ttft_s, 1 / tpot_s, num_context, num_cached)

    def _requests(self, num_requests: int, num_in: int, num_out: int) -> list[EngineRequest]:
        vocab_size, seed = self._loaded.info.vocab_size, self._load.seed
        num_shared = min(self._load.num_shared_prefix_tokens, num_in)
        prefix = random_tokens(f"{seed}/prefix", num_shared, vocab_size)
        found = []
        for index in (next(self._ids) for _ in range(num_requests)):
            own = random_tokens(f"{seed}/{index}", num_in - num_shared, vocab_size)
            found.append(greedy_request(str(index), prefix + own, num_out))
        return found

    def _run(self, label: str, requests: Sequence[EngineRequest]) -> list[RequestRecord]:
        num_done = 0

        def on_record(record: RequestRecord) -> None:
            nonlocal num_done
            num_done += 1
            self._on_progress(label, num_done, len(requests))

        self._on_progress(label, 0, len(requests))
        self._loaded.server.steps = []
        pace = Pace(num_users=len(requests), max_at_once=len(requests))
        records = drive(self._loaded.server, requests, pace, WallClock(), on_record)
        bad = next((record for record in records if not record.is_ok), None)
        if bad is not None:
            raise SluiceError(f"a request of the load ended with {bad.status}")
        return records


def _batch_figures(rounds: list[list[RequestRecord]]) -> dict[str, Any]:
    """Return rates, medians over the rounds, and latencies of the requests of all."""
    summaries = [summarize(records, LatencyObjective()) for records in rounds]

    def median(name: str) -> float | None:
        return percentile([summary[name] for summary in summaries], 50)

    every = summarize([record for records in rounds for record in records], LatencyObjective())
    return {
        "num_requests": every["num_requests"],
        "num_out_tokens": sum(r.num_tokens for records in rounds for r in records),
        "wall_s": median("window_s"),
        "out_tokens_per_s": median("out_tokens_per_s"),
        "total_tokens_per_s": median("total_tokens_per_s"),
        "rounds_out_tokens_per_s": [summary["out_tokens_per_s"] for summary in summaries],
        "cached_token_share": every["cached_token_share"],
        "batch_ttft_s": every["ttft_s"],
        "batch_tpot_s": every["tpot_s"],
        "batch_itl_s": every["itl_s"],
    }


def profile_round(bench: EngineBench, device: str, num_rows: int = 25) -> list[dict[str, Any]]:
    """Return where one more round's time goes, by torch operation, most first.

    The first row is what lies between torch's operations: Python, and the cost of profiling it.
    """
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        start_s = time.perf_counter()
        bench.one_round("profiling")
        wall_s = time.perf_counter() - start_s
    rows = [
        {
            "name": event.key,
            "calls": event.count,
            "cpu_s": event.self_cpu_time_total * 1e-6,
            "device_s": event.self_device_time_total * 1e-6 if device == "cuda" else 0.0,
        }
        for event in profiler.key_averages()
    ]
    rows.sort(key=lambda row: -(row["cpu_s"] + row["device_s"]))
    between_s = wall_s - sum(row["cpu_s"] for row in rows)
    between = {"name": "between operations", "calls": 1, "cpu_s": between_s, "device_s": 0.0}
    return [{**row, "share": row["cpu_s"] / wall_s} for row in (between, *rows[:num_rows])]
