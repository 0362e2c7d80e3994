"""How `sluice bench chaos` brings a fault about, on processes that are none."""

from __future__ import annotations

import asyncio
import signal
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster.bench.chaos_faults import Hands, Strike
from cluster.bench.chaos_processes import ProcessSample
from cluster.bench.chaos_schedule import fault_kinds
from cluster.config import ClusterConfig, GatewayConfig, ReplicaConfig


class FakeFamily:
    """Processes that get signals; a guardian ends them or does not."""

    def __init__(self) -> None:
        self.signals: list[tuple[int, signal.Signals]] = []
        self.is_gone = False

    def workers_of(self, leader_pid: int) -> list[int]:
        return {77: [80, 81]}.get(leader_pid, [])

    def sample(self) -> list[ProcessSample]:
        kinds = {70: "leader", 71: "mover", 72: "mover"}
        return [ProcessSample(pid, 0.0, 9.0, kind, 1) for pid, kind in kinds.items()]

    def signal(self, pid: int, number: signal.Signals) -> None:
        if self.is_gone:
            raise ProcessLookupError
        self.signals.append((pid, number))


def stop(
    name: str, monkeypatch: pytest.MonkeyPatch, family: FakeFamily, *, is_ended: bool
) -> tuple[Hands, list[float]]:
    waits_s: list[float] = []
    sleep = asyncio.sleep

    async def pass_over(seconds: float) -> None:
        waits_s.append(seconds)
        family.is_gone = is_ended
        await sleep(0)

    config = ClusterConfig(
        replica=ReplicaConfig(heartbeat_timeout_s=1.25),
        gateway=GatewayConfig(heartbeat_timeout_s=2.5),
    )
    hands = Hands(cast(Any, SimpleNamespace(config=config, family=family)), cast(Any, None))
    (kind,) = fault_kinds(f"stop-{name}")
    look = cast(Any, SimpleNamespace(leader_pids={"x1": 77}, gateway_pids={"x1": 78}))

    async def strike_and_rest() -> None:
        await hands.bring_about(Strike(kind, "x1", look))
        await hands.rest()

    monkeypatch.setattr(asyncio, "sleep", pass_over)
    asyncio.run(strike_and_rest())
    return hands, waits_s


STOPPED = [("leader", 77, 3.75), ("gateway", 78, 5.0)]


@pytest.mark.parametrize(("name", "pid", "timeout_s"), STOPPED)
def test_who_is_stopped_has_to_be_gone_soon_behind_the_heartbeat_timeout(
    monkeypatch: pytest.MonkeyPatch, name: str, pid: int, timeout_s: float
) -> None:
    family = FakeFamily()
    hands, waits_s = stop(name, monkeypatch, family, is_ended=True)
    assert waits_s == [timeout_s]
    assert family.signals == [(pid, signal.SIGSTOP)] and hands.not_ended == []


@pytest.mark.parametrize(("name", "pid", "timeout_s"), STOPPED)
def test_who_is_stopped_and_still_there_is_ended_and_told_of(
    monkeypatch: pytest.MonkeyPatch, name: str, pid: int, timeout_s: float
) -> None:
    family = FakeFamily()
    hands, _ = stop(name, monkeypatch, family, is_ended=False)
    assert family.signals == [(pid, signal.SIGSTOP), (pid, signal.SIGKILL)]
    told = f"{name} {pid} was stopped, and still there after {timeout_s:g} s"
    assert hands.not_ended == [told]


def bring_about(name: str, family: FakeFamily, leader_pid: int = 77) -> None:
    hands = Hands(
        cast(Any, SimpleNamespace(config=ClusterConfig(), family=family)), cast(Any, None)
    )
    (kind,) = fault_kinds(name)
    look = cast(Any, SimpleNamespace(leader_pids={"r1": leader_pid}))
    asyncio.run(hands.bring_about(Strike(kind, "r1", look)))


@pytest.mark.parametrize(("name", "pid"), [("kill-leader", 77), ("kill-worker", 81)])
def test_of_the_victim_the_leader_or_its_youngest_worker_is_killed(name: str, pid: int) -> None:
    family = FakeFamily()
    bring_about(name, family)
    assert family.signals == [(pid, signal.SIGKILL)]


def test_oldest_mover_is_killed() -> None:
    family = FakeFamily()
    bring_about("kill-mover", family)
    assert family.signals == [(71, signal.SIGKILL)]


def test_fault_without_a_victim_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProcessLookupError, match="leader 5 has no workers"):
        bring_about("kill-worker", FakeFamily(), leader_pid=5)
    monkeypatch.setattr(FakeFamily, "sample", lambda self: [])
    with pytest.raises(ProcessLookupError, match=r"no mover runs"):
        bring_about("kill-mover", FakeFamily())
