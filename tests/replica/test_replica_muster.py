"""How a leader's workers come together, with threads in the workers' place."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import astuple
from typing import Any

import pytest

from cluster.clock import WallClock
from cluster.config import ClusterConfig, load_config
from cluster.errors import UnavailableError
from cluster.replica import muster as muster_module
from cluster.replica.build import WorkerTier
from cluster.replica.channel import Channel, connect
from cluster.replica.group import GroupLifecycle, GroupState
from cluster.replica.muster import Connections, Muster
from cluster.replica.processes import ProcessId
from cluster.replica.worker import WorkerSpec

HOST = "127.0.0.1"
FACTS = {"num_blocks": 1, "process": astuple(ProcessId.of(os.getpid()))}


class RememberingGuardian:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.children: list[ProcessId] = []

    def add_child(self, process: ProcessId) -> None:
        self.children.append(process)


def configuration(tp: int, pp: int) -> ClusterConfig:
    return load_config(None, [f"parallel.tp={tp}", f"parallel.pp={pp}"])


def lifecycle_of(config: ClusterConfig, start_timeout_s: float = 60.0) -> GroupLifecycle:
    return GroupLifecycle(
        config.parallel.world_size,
        start_timeout_s=start_timeout_s,
        drain_timeout_s=1.0,
        clock=WallClock(),
    )


def specs_of(muster: Muster, config: ClusterConfig) -> list[WorkerSpec]:
    template = WorkerSpec(0, config.model_dump(), ("", 0), b"", 0, ("", 0), 8, 64, 1)
    num_workers = config.parallel.world_size
    endpoints = [(f"host-{index}", 1000 + index) for index in range(num_workers)]
    return [muster.spec(template, i, endpoints, WorkerTier()) for i in range(num_workers)]


def work(spec: WorkerSpec) -> tuple[Channel, Channel]:
    """Come as a worker comes that has loaded at once."""
    assert spec.beat_address is not None
    plans = connect(spec.leader_address, spec.auth_key, send_timeout_s=1.0)
    plans.send("hello", spec.index)
    plans.send("ready", spec.index, FACTS)
    beats = connect(spec.beat_address, spec.beat_key, send_timeout_s=1.0)
    beats.send("hello", spec.index)
    beats.send("ready", spec.index, {})
    return plans, beats


def test_worker_is_told_where_its_stage_and_its_pipeline_meet() -> None:
    config = configuration(2, 2)
    specs = specs_of(Muster(config, HOST), config)
    assert [spec.index for spec in specs] == [0, 1, 2, 3]
    assert [spec.stage_port for spec in specs] == [1000, 1000, 1002, 1002]
    assert {spec.pipeline_address for spec in specs} == {("host-1", 1001)}, "0's is its stage's"
    assert len({spec.leader_address for spec in specs}) == 1
    assert specs[0].beat_address not in (None, specs[0].leader_address)
    config = configuration(1, 2)
    specs = specs_of(Muster(config, HOST), config)
    assert {spec.pipeline_address for spec in specs} == {("host-0", 1000)}


async def test_leader_has_two_connections_to_every_worker_by_index() -> None:
    config = configuration(1, 2)
    guardian: Any = RememberingGuardian()
    muster = Muster(config, HOST, guardian)
    lifecycle = lifecycle_of(config)
    specs = specs_of(muster, config)
    gathering = asyncio.create_task(muster.gather(lifecycle))
    ends = await asyncio.gather(*(asyncio.to_thread(work, spec) for spec in reversed(specs)))
    connections: Connections = await asyncio.wait_for(gathering, 20)
    for index, (plans, beats) in enumerate(reversed(ends)):
        plans.send("result", index)
        beats.send("beat", float(index))
        assert connections.plans[index].receive() == ("result", index)
        assert connections.beats[index].receive() == ("beat", float(index))
    assert lifecycle.state is GroupState.READY
    assert guardian.children == [ProcessId.of(os.getpid())] * 2
    for channel in (*connections.plans, *connections.beats, *(c for pair in ends for c in pair)):
        channel.close()


async def test_worker_that_is_lost_while_others_load_ends_the_wait() -> None:
    config = configuration(1, 2)
    lifecycle = lifecycle_of(config)
    muster = Muster(config, HOST)
    gathering = asyncio.create_task(muster.gather(lifecycle))
    await asyncio.sleep(0.1)
    lifecycle.worker_lost(1, "killed")
    with pytest.raises(UnavailableError):
        await asyncio.wait_for(gathering, 20)


async def test_worker_that_never_beats_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(muster_module, "BEATS_TIMEOUT_S", 0.3)
    config = configuration(1, 2)
    muster = Muster(config, HOST)
    gathering = asyncio.create_task(muster.gather(lifecycle_of(config)))

    def come(spec: WorkerSpec) -> Channel:
        plans = connect(spec.leader_address, spec.auth_key, send_timeout_s=1.0)
        plans.send("hello", spec.index)
        plans.send("ready", spec.index, FACTS)
        return plans

    ends = await asyncio.gather(
        *(asyncio.to_thread(come, spec) for spec in specs_of(muster, config))
    )
    began_s = time.monotonic()
    with pytest.raises(UnavailableError):
        await asyncio.wait_for(gathering, 20)
    assert time.monotonic() - began_s < 10
    for end in ends:
        end.close()
