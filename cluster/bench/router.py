"""`sluice bench router`: what a decision costs and what the prefix index takes, in this process.

Decisions are made as in a gateway: replicas report load and new blocks ten times a second, first
tokens come, requests end. Only the decision is timed. The index is larger than the caches of most
processors, and nobody has looked a prompt's blocks up before.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from cluster.bench.router_content import (
    BLOCK_SIZE,
    FINGERPRINT,
    Keys,
    make_content,
    make_info,
    make_load,
    new_keys,
)
from cluster.bench.router_gateway import BenchGateway
from cluster.bench.statistics import spread
from cluster.gateway.routing import PromptKeys
from cluster.router.plausible import check_load
from cluster.router.prefix_index import PrefixIndex
from cluster.router.replica_table import ReplicaTable
from cluster.rpc import convert
from cluster.rpc.sluice.internal.v1 import engine_pb2


@dataclass(frozen=True, slots=True)
class RouterBench:
    """What to measure."""

    num_replicas: tuple[int, ...] = (64, 1024)  # of each round of decisions
    num_blocks: int = 1_000_000  # of all replicas together
    num_prompt_blocks: int = 100
    num_requests: int = 2000  # of each round
    seed: int = 0


def run_router_bench(
    what: RouterBench, on_progress: Callable[[str], None] = lambda label: None
) -> dict[str, Any]:
    """Measure; return plain data.

    Args:
        what: To measure.
        on_progress: Called with what begins.
    """
    rng = random.Random(what.seed)
    on_progress("memory")
    # First of all, while the process has no freed memory that would hide what the index takes.
    figures: dict[str, Any] = {"load": asdict(what), "memory": _memory(what, rng)}
    figures["decisions"] = []
    for num_replicas in what.num_replicas:
        on_progress(f"decisions among {num_replicas} replicas")
        figures["decisions"].append(_decisions(what, num_replicas, rng))
    on_progress("snapshots and deltas")
    return figures | {"sync": _sync(what, rng), "keys_s": spread(_keys(what, rng))}


def _memory(what: RouterBench, rng: random.Random) -> dict[str, Any]:
    """Fill an index with blocks that all differ: the most that so many can take."""
    num_replicas = what.num_replicas[0]
    caches = [new_keys(rng, what.num_blocks // num_replicas) for _ in range(num_replicas)]
    process = psutil.Process()
    gc.collect()
    before_bytes = process.memory_info().rss
    index = PrefixIndex()
    for place, cache in enumerate(caches):
        index.replace(str(place), cache)
    return {
        "num_replicas": num_replicas,
        "num_blocks": sum(map(len, caches)),
        "num_dropped": index.num_dropped,
        "num_bytes": index.num_bytes,
        "rss_bytes": process.memory_info().rss - before_bytes,
    }


def _decisions(what: RouterBench, num_replicas: int, rng: random.Random) -> dict[str, Any]:
    content = make_content(num_replicas, what.num_blocks, what.num_prompt_blocks, rng)
    gateway = BenchGateway(content, rng)
    index = gateway.dispatcher.index
    decide_s, match_s, report_s = [], [], []
    for number in range(what.num_requests):
        decide_s.append(gateway.decide(f"request-{number}", content.prompt(rng)))
        prompt = content.prompt(rng)  # another one: its blocks are not in the processor's cache
        start_s = time.perf_counter()
        index.match(prompt)
        match_s.append(time.perf_counter() - start_s)
        report_s += gateway.go_on()
    return {
        "num_replicas": num_replicas,
        "num_blocks": sum(map(len, content.caches)),
        "num_keys": index.num_keys,
        "num_bytes": index.num_bytes,
        "num_dispatched": gateway.num_dispatched,
        "decide_s": spread(decide_s),
        "match_s": spread(match_s),
        "report_s": spread(report_s),
    }


def _sync(what: RouterBench, rng: random.Random) -> dict[str, Any]:
    """Take the snapshots of all leaders, as a gateway does that starts; then lose a leader."""
    num_replicas = what.num_replicas[0]
    content = make_content(num_replicas, what.num_blocks, what.num_prompt_blocks, rng)
    infos = [make_info(place) for place in range(num_replicas)]
    messages = [_snapshot(cache, rng) for cache in content.caches]
    index, table, index_s = PrefixIndex(), ReplicaTable(), 0.0
    start_s = time.perf_counter()
    for info, data in zip(infos, messages, strict=True):
        message = engine_pb2.WatchResponse.FromString(data)
        load = convert.load_from_proto(message.load)
        assert check_load(load) is None
        index_start_s = time.perf_counter()
        index.replace(info.replica_id, message.added)
        index_s += time.perf_counter() - index_start_s
        table.add(info, load, now_s=0.0)
    total_s = time.perf_counter() - start_s
    num_blocks = sum(map(len, content.caches))
    return {
        "num_replicas": num_replicas,
        "num_blocks": num_blocks,
        "total_s": total_s,
        "index_s": index_s,
        "index_blocks_per_s": num_blocks / index_s,
        "sweep_s": spread(_sweeps(index, infos[0].replica_id, infos[-1].replica_id)),
    }


def _snapshot(cache: Keys, rng: random.Random) -> bytes:
    load = convert.load_to_proto(make_load(len(cache), rng))
    message = engine_pb2.WatchResponse(is_snapshot=True, added=cache, load=load)
    return message.SerializeToString()


def _sweeps(index: PrefixIndex, lost_id: str, other_id: str) -> list[float]:
    """Lose a replica; return the seconds of each call until its blocks are swept away."""
    sweeps_s = []
    start_s = time.perf_counter()
    index.drop(lost_id)
    while index.num_dead_slots:
        sweeps_s.append(time.perf_counter() - start_s)
        start_s = time.perf_counter()
        index.apply(other_id, added=(), removed=())
    return [*sweeps_s, time.perf_counter() - start_s]


def _keys(what: RouterBench, rng: random.Random) -> list[float]:
    """Hash prompts, which comes once before a decision; return the seconds of each."""
    keys_s = []
    for _ in range(what.num_requests):
        token_ids = tuple(rng.choices(range(2**17), k=what.num_prompt_blocks * BLOCK_SIZE))
        start_s = time.perf_counter()
        PromptKeys(token_ids, salt=b"")(FINGERPRINT, BLOCK_SIZE)
        keys_s.append(time.perf_counter() - start_s)
    return keys_s
