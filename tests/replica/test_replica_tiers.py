"""Real models over host tiers, movers and a store: one process, and groups of two workers."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.process import BaseProcess

import psutil
import pytest
import torch
from redis_server import RedisServer
from test_replica_mover_start import wait_gone

from cluster.clock import WallClock
from cluster.config import ClusterConfig, StoreConfig, load_config
from cluster.engine.engine import Engine
from cluster.engine.mover import Move, MoveKind
from cluster.kvstore.embedded_blocks import EmbeddedBlocks
from cluster.model.checkpoint import inspect_checkpoint
from cluster.replica.build import load_whole, make_engine, part_nbytes
from cluster.replica.channel import Channel, ChannelListener
from cluster.replica.executor import GroupExecutor, InProcessExecutor
from cluster.replica.group_tiers import GroupTiers
from cluster.replica.local_tiers import LocalTiers
from cluster.replica.mover_start import OpenStore
from cluster.replica.worker import WorkerSpec, run_worker
from cluster.types import EngineRequest, SamplingParams, StoreState

pytestmark = [pytest.mark.timeout(280)]

PROMPT = tuple(range(100, 196))  # six blocks; the last token is always computed
NUM_HIT_TOKENS = 80
MAX_TURNS = 50  # an engine waits some 20 ms for a store: not for a mover that is just starting
NUM_BLOCKS = 64
MAX_MODEL_LEN = 256
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


def configuration(*overrides: str) -> ClusterConfig:
    store = ["store.kv_write_after_uses=1", "store.timeout_s=5"]
    return load_config(None, ["model.dtype=float32", *store, *overrides])


def answer(engine: Engine, name: str) -> list[int]:
    engine.add(EngineRequest(name, PROMPT, GREEDY))
    tokens: list[int] = []
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        for output in engine.step():
            assert output.error is None
            tokens += [token.token_id for token in output.tokens]
            if output.finish_reason is not None:
                return tokens
    raise AssertionError("no end")


def step_until(engine: Engine, condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s, engine.load().cache
        engine.step()
        time.sleep(0.005)


def check_store_serves(writer: Engine, reader: Engine) -> None:
    """Answer cold, and then from the store alone."""
    expected = answer(writer, "cold")
    step_until(writer, lambda: writer.load().cache.num_stored_blocks >= NUM_HIT_TOKENS // 16)
    for turn in range(MAX_TURNS):
        reader.flush_cache()
        assert answer(reader, f"warm {turn}") == expected
        if reader.load().cache.num_store_hit_tokens >= NUM_HIT_TOKENS:
            break
    load = reader.load().cache
    assert load.num_store_hit_tokens >= NUM_HIT_TOKENS, load
    assert (load.num_failed, load.num_corrupt) == (0, 0)
    assert load.store_state is StoreState.EXACT


@contextlib.contextmanager
def engine_here(config: ClusterConfig, open_store: OpenStore | None = None) -> Iterator[Engine]:
    model = inspect_checkpoint(config.model.folder)
    tiers = LocalTiers(config, model, open_store)
    runner = load_whole(
        config,
        num_blocks=NUM_BLOCKS,
        max_model_len=MAX_MODEL_LEN,
        num_threads=1,
        slots=tiers.slots,
    )
    executor = InProcessExecutor(runner)
    try:
        yield make_engine(config, model, executor, WallClock(), tiers=tiers.tiers)
    finally:
        executor.shutdown()
        tiers.close()
        if tiers.mover_pid is not None:
            assert not psutil.pid_exists(tiers.mover_pid)


@pytest.mark.parametrize("cache_dtype", ["auto", "int8"])
def test_store_in_a_thread_serves_after_a_flush(cache_dtype: str) -> None:
    config = configuration(f"cache.dtype={cache_dtype}")
    blocks = EmbeddedBlocks(StoreConfig(), WallClock())
    with engine_here(config, lambda: blocks) as engine:
        check_store_serves(engine, engine)


@pytest.mark.integration
def test_blocks_of_one_replica_serve_another(redis_server: RedisServer) -> None:
    config = configuration(f"store.url={redis_server.url}", "store.namespace=tiers-two")
    with engine_here(config) as writer, engine_here(config) as reader:
        check_store_serves(writer, reader)


@pytest.mark.integration
def test_killed_mover_is_started_again(redis_server: RedisServer) -> None:
    config = configuration(f"store.url={redis_server.url}", "store.namespace=tiers-killed")
    tiers = LocalTiers(config, inspect_checkpoint(config.model.folder))
    link, first_pid = tiers.tiers.mover, tiers.mover_pid
    assert link is not None and first_pid is not None
    try:
        errors = []
        for move_id in range(40):
            link.submit(Move(move_id, MoveKind.FIND, (b"h" * 16,)))
            errors += [result.error for result in link.collect(5.0)]
            if move_id == 1:
                os.kill(first_pid, signal.SIGKILL)
            if any(errors[2:]) and not errors[-1]:
                break
            time.sleep(0.05)
        assert errors[:2] == ["", ""] and any(errors[2:]) and not errors[-1], errors
        assert tiers.mover_pid != first_pid
    finally:
        tiers.close()


def test_no_host_tier_and_no_store_is_fine() -> None:
    for override in ("cache.host_memory_bytes=0", "cache.prefix_caching=false"):
        with engine_here(configuration(override)) as engine:
            assert len(answer(engine, "a")) == GREEDY.max_tokens
            assert engine.load().cache.num_host_slots == 0
    with engine_here(configuration("store.kv_url='off'")) as engine:
        assert len(answer(engine, "a")) == GREEDY.max_tokens
        assert engine.load().cache.num_host_slots > 0


class Group:
    """Two workers in processes of their own, and what their leader has."""

    def __init__(self, config: ClusterConfig) -> None:
        model = inspect_checkpoint(config.model.folder)
        self.tiers = GroupTiers(config, model, "127.0.0.1")
        listener = ChannelListener("127.0.0.1", 2)
        ports = free_ports(2)
        spec = WorkerSpec(
            index=0,
            config=config.model_dump(),
            leader_address=listener.address,
            auth_key=listener.auth_key,
            stage_port=ports[0],
            pipeline_address=("127.0.0.1", ports[1]),
            num_blocks=NUM_BLOCKS,
            max_model_len=MAX_MODEL_LEN,
            num_threads=1,
        )
        context = multiprocessing.get_context("spawn")
        self.processes: list[BaseProcess] = []
        for index in range(2):
            mine = replace(spec, index=index, tier=self.tiers.of_worker(index))
            self.processes.append(context.Process(target=run_worker, args=(mine,), daemon=True))
            self.processes[-1].start()
        self.channels = self._accept(listener)
        self.tiers.connect()
        pp = config.parallel.pp
        executor = GroupExecutor(self.channels, num_blocks=NUM_BLOCKS, num_stages=pp)
        self.engine = make_engine(config, model, executor, WallClock(), tiers=self.tiers.tiers)

    def _accept(self, listener: ChannelListener) -> list[Channel]:
        accepting = ThreadPoolExecutor(1).submit(
            listener.accept_all, timeout_s=120.0, send_timeout_s=5.0, on_ready=lambda *_: None
        )
        try:
            return accepting.result(timeout=120)
        finally:
            listener.close()

    def mover_pids(self) -> list[int]:
        pids = []
        for process in self.processes:
            children = psutil.Process(process.pid).children()
            pids += [child.pid for child in children if "mover_start" in " ".join(child.cmdline())]
        return pids

    def leader_dies(self) -> None:
        """Let go of what the kernel would close."""
        for channel in self.channels:
            channel.close()
        self.tiers.close()

    def end(self) -> None:
        self.leader_dies()
        for process in self.processes:
            process.kill()
            process.join()


def free_ports(num_ports: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(num_ports)]
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.integration
def test_stages_store_and_fetch_their_parts_and_movers_end_with_a_killed_worker(
    redis_server: RedisServer,
) -> None:
    config = configuration(
        "parallel.pp=2", f"store.url={redis_server.url}", "store.namespace=tiers-pp"
    )
    group = Group(config)
    try:
        check_store_serves(group.engine, group.engine)
        movers = group.mover_pids()
        assert len(movers) == 2
        group.processes[0].kill()
        wait_gone(movers[0])
        group.leader_dies()
        wait_gone(movers[1])
    finally:
        group.end()


@pytest.mark.integration
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is missing: no tensor parallelism")
def test_ranks_store_and_fetch_their_parts_and_a_killed_mover_harms_nobody(
    redis_server: RedisServer,
) -> None:
    config = configuration(
        "parallel.tp=2", f"store.url={redis_server.url}", "store.namespace=tiers-tp"
    )
    group = Group(config)
    try:
        check_store_serves(group.engine, group.engine)
        expected = answer(group.engine, "again")
        psutil.Process(group.mover_pids()[1]).kill()
        for turn in range(2):
            group.engine.flush_cache()
            assert answer(group.engine, f"without {turn}") == expected
    finally:
        group.end()


def test_movers_that_do_not_come_are_no_store_and_no_failure(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = configuration("parallel.pp=2", "store.url=redis://127.0.0.1:1/0")
    tiers = GroupTiers(config, inspect_checkpoint(config.model.folder), "127.0.0.1")
    start_s = time.monotonic()
    tiers.connect(timeout_s=0.2)
    assert time.monotonic() - start_s < 5
    assert tiers.tiers.mover is None and tiers.tiers.num_slots > 0
    assert "a mover did not start" in caplog.text
    tiers.close()


def test_worker_keeps_its_part_of_a_block() -> None:
    config = configuration("parallel.pp=2", "parallel.tp=2")
    model = inspect_checkpoint(config.model.folder)
    tiers = GroupTiers(config, model, "127.0.0.1")
    parts = [tiers.of_worker(index) for index in range(4)]
    specs = [part.mover for part in parts if part.mover is not None]
    assert len({spec.prefix for spec in specs}) == 4, "each has keys of its own"
    assert [spec.index for spec in specs] == [0, 1, 2, 3]
    assert max(part.block_nbytes for part in parts) == tiers.tiers.block_nbytes
    assert sum(part.block_nbytes for part in parts) == part_nbytes(configuration(), model, 0)
    tiers.close()
