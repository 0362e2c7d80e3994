"""Put and get of blocks against raw redis-py, by block size: the ways of `store_paths` in turns."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

from cluster.bench.statistics import percentile
from cluster.bench.store_paths import (
    Batch,
    BytesPath,
    DirectBlocks,
    MoverBlocks,
    RawRedis,
    Series,
)
from cluster.config import StoreConfig

SIZES = (16 * 2**10, 64 * 2**10, 192 * 2**10, 1536 * 2**10)
"""Bytes of a block: 192 KiB is one of the 0.5B shape in bf16, 1.5 MiB one of a model with eight KV
heads of 128 in 24 layers."""

SERIES_BYTES = 32 * 2**20
TIMEOUT_S = 10.0
"""Speed is measured: nothing may be given up because others use the machine."""

REFERENCE = "redis_py"


def run_raw(
    config: StoreConfig, num_rounds: int, on_progress: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Return rates, latencies and ratios by block size and way.

    Args:
        config: Of the store: a Redis.
        num_rounds: Of all ways, which take turns; medians count.
        on_progress: Told what is being done.

    Raises:
        SluiceError: The server does not answer, or a block came back changed.
    """
    config = config.model_copy(update={"timeout_s": TIMEOUT_S, "max_bytes": 8 * SERIES_BYTES})
    sizes = []
    for index, size in enumerate(SIZES):
        on_progress(f"raw: {size // 1024} KiB", index, len(SIZES))
        sizes.append(_measure(config, size, num_rounds))
    return {
        "series_bytes": SERIES_BYTES,
        "chunk_bytes": config.kv_chunk_bytes,
        "reference": REFERENCE,
        "sizes": sizes,
    }


def _measure(config: StoreConfig, size: int, num_rounds: int) -> dict[str, Any]:
    batches = make_batches(size, SERIES_BYTES // size, max(1, config.kv_chunk_bytes // size))
    puts: dict[str, list[Series]] = {}
    gets: dict[str, list[Series]] = {}
    with _open_paths(config, size) as paths:
        names = list(paths)
        for number in range(num_rounds + 1):  # the first one, which is not counted, warms up
            for name in names[number % len(names) :] + names[: number % len(names)]:
                path = paths[name]
                put, get = path.put(batches), path.get(batches)
                path.clear(batches)
                if number:
                    puts.setdefault(name, []).append(put)
                    gets.setdefault(name, []).append(get)
    return {
        "block_bytes": size,
        "batch_blocks": len(batches[0].hashes),
        "put": {name: figures_of(series, puts[REFERENCE]) for name, series in puts.items()},
        "get": {name: figures_of(series, gets[REFERENCE]) for name, series in gets.items()},
    }


def make_batches(size: int, num_blocks: int, num_at_once: int) -> list[Batch]:
    """Return random blocks, in batches of `num_at_once`."""
    batches = []
    for start in range(0, num_blocks, num_at_once):
        numbers = range(start, min(start + num_at_once, num_blocks))
        hashes = [blake2b(str(n).encode(), digest_size=16).digest() for n in numbers]
        batches.append(Batch(hashes, [os.urandom(size) for _ in numbers]))
    return batches


@contextmanager
def _open_paths(config: StoreConfig, size: int) -> Iterator[dict[str, BytesPath]]:
    num_slots = SERIES_BYTES // size
    paths: dict[str, BytesPath] = {}
    try:
        paths[REFERENCE] = RawRedis(config.resolved_kv_url, config.namespace)
        paths["blocks"] = DirectBlocks(config)
        paths["mover"] = MoverBlocks(config, block_nbytes=size, num_slots=num_slots)
        yield paths
    finally:
        for path in paths.values():
            path.close()


def figures_of(series: Sequence[Series], reference: Sequence[Series]) -> dict[str, Any]:
    """Return the medians over the rounds; the ratio is the median of those within a round."""
    latencies_s = [latency_s for one in series for latency_s in one.latencies_s]
    ratios = [
        one.bytes_per_s / other.bytes_per_s for one, other in zip(series, reference, strict=True)
    ]
    return {
        "bytes_per_s": percentile([one.bytes_per_s for one in series], 50),
        "rounds_bytes_per_s": [one.bytes_per_s for one in series],
        "p50_s": percentile(latencies_s, 50),
        "p99_s": percentile(latencies_s, 99),
        "ratio": percentile(ratios, 50),
    }
