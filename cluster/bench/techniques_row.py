"""One row of the ablation, in a process of its own: a description on stdin, figures on stdout."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from typing import Any

from cluster.bench.engine_drive import Pace, Server, drive
from cluster.bench.statistics import LatencyObjective, RequestRecord, summarize
from cluster.bench.techniques_ladder import Technique, ladder, settings_of
from cluster.bench.techniques_workload import Workload
from cluster.clock import WallClock
from cluster.config import ClusterConfig, ModelConfig, load_config
from cluster.errors import ConfigError, SluiceError


@dataclass(frozen=True, slots=True)
class Row:
    """What a row's process is told."""

    technique: str  # name in the ladder
    model: str  # folder, or "demo"
    threads: int
    workload: Workload

    def encode(self) -> str:
        """Return the row as JSON."""
        fields = {name: getattr(self.workload, name) for name in Workload.__slots__}
        return json.dumps(
            {
                "technique": self.technique,
                "model": self.model,
                "threads": self.threads,
                "workload": fields,
            }
        )

    @staticmethod
    def decode(text: str) -> Row:
        """Return the row that `encode` wrote."""
        tree = json.loads(text)
        lists = {name: tuple(v) for name, v in tree["workload"].items() if isinstance(v, list)}
        tree["workload"] = Workload(**tree["workload"] | lists)
        return Row(**tree)


def run_row(row: Row) -> dict[str, Any]:
    """Return the figures of one row.

    Raises:
        SluiceError: The model or its switches do not run here, or a request failed.
    """
    from cluster.kernels import native
    from cluster.model.memory import peak_rss_bytes

    technique = next(one for one in ladder() if one.name == row.technique)
    check_fused(technique)
    config = config_of(row, technique)
    server, vocab_size = open_server(technique, config, row.workload)
    pace = Pace(
        num_users=row.workload.num_users,
        max_at_once=technique.num_at_once or row.workload.num_users,
        waits_for_all=technique.waits_for_all,
        budget_s=row.workload.budget_s,
    )
    num_warmup = min(4, pace.max_at_once)
    clock = WallClock()
    warmup = row.workload.warmup(num_warmup, vocab_size)
    drive(server, warmup, Pace(num_warmup, pace.max_at_once), clock)
    records = drive(server, row.workload.requests(vocab_size), pace, clock)
    return figures_of(records) | {
        "kernels": native.isa() or "torch",
        "peak_rss_bytes": peak_rss_bytes(),
    }


def check_fused(technique: Technique) -> None:
    """Return if the kernels that a technique is about are there, or it wants none.

    Raises:
        ConfigError: Plain torch would be measured under the technique's name.
    """
    from cluster.kernels import native

    if technique.kernels == "torch" or not (reason := native.load()):
        return
    raise ConfigError(
        f"SLUICE_KERNELS={os.environ.get('SLUICE_KERNELS', '')}: {technique.title} is measured "
        f"with the C++ kernels, and plain torch serves because {reason}; unset SLUICE_KERNELS, "
        "on a machine with AVX2 and a C++ compiler",
        field="SLUICE_KERNELS",
    )


def config_of(row: Row, technique: Technique) -> ClusterConfig:
    """Return the configuration of a row's engine, its cache made for the workload."""
    settings = settings_of(technique, row.workload, row.model)
    settings["parallel.threads_per_worker"] = row.threads
    if settings.get("model.quantization") == "int4":
        settings["model.quantization_group_size"] = group_size_for(row.model)
    config = load_config(None, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    blocks_of_one = -(-row.workload.max_sequence_tokens // config.cache.block_size)
    # One sequence more than run: the static prefix stays cached beside them.
    num_blocks = (config.engine.max_num_seqs + 1) * blocks_of_one
    cache = config.cache.model_copy(update={"num_blocks": num_blocks})
    return config.model_copy(update={"cache": cache})


def group_size_for(model: str) -> int:
    """Return the largest group of INT4 weights that divides every row of a model's linears."""
    from cluster.model.checkpoint import inspect_checkpoint
    from cluster.model.quantization.check import linear_shapes

    shapes = linear_shapes(inspect_checkpoint(ModelConfig(path=model).folder)).values()
    sizes = (128, 64, 32)
    fitting = (size for size in sizes if all(inputs % size == 0 for _, inputs in shapes))
    return next(fitting, sizes[-1])  # where none divides, loading says so


def open_server(
    technique: Technique, config: ClusterConfig, workload: Workload
) -> tuple[Server, int]:
    """Return a row's server, loaded, and the size of its vocabulary.

    Raises:
        ConfigError: The model or its switches do not run here.
    """
    import torch

    from cluster.bench.engine_setup import check_engine, load_engine, num_threads_of

    info = check_engine(config, workload.max_sequence_tokens)
    if technique.is_engine:
        return load_engine(config, info).server, info.vocab_size
    from cluster.bench.techniques_generate import GenerateServer

    torch.set_num_threads(num_threads_of(config))
    dtype = getattr(torch, technique.dtype)
    server = GenerateServer(config.model.folder, dtype, is_packed=technique.is_packed)
    return server, info.vocab_size


def figures_of(records: list[RequestRecord]) -> dict[str, Any]:
    """Return rates and latencies of a row's requests.

    Raises:
        SluiceError: One of them failed: the rates would be of something else.
    """
    bad = next((record for record in records if not record.is_ok), None)
    if bad is not None:
        raise SluiceError(f"a request ended with {bad.status}")
    summary = summarize(records, LatencyObjective())
    kept = ("num_requests", "window_s", "requests_per_s", "out_tokens_per_s", "total_tokens_per_s")
    latencies = {
        name: {share: summary[name][share] for share in ("p50", "p99")}
        for name in ("ttft_s", "tpot_s")
    }
    return {
        **{name: summary[name] for name in kept},
        "num_out_tokens": sum(record.num_tokens for record in records),
        "num_prompt_tokens": sum(record.num_prompt_tokens for record in records),
        "cached_token_share": summary["cached_token_share"],
        **latencies,
    }


def main() -> None:
    """Read a row, write its figures or the reason why there are none, as the last line."""
    row = Row.decode(sys.stdin.read())
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        answer = run_row(row)
    except SluiceError as error:
        answer = {"error": " ".join(str(error).split())}
    print(json.dumps(answer, allow_nan=False), flush=True)


if __name__ == "__main__":
    main()
