"""Every way in which a store can fail, under 32 streams: nobody notices, and it comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from fault_cluster import answers, check_answers, prompt_mix
from fault_proxy import Fault
from fault_scene import KEYS, Scene
from redis_server import free_port
from waiting import wait_until

from cluster.kvstore.codec import HEADER_BYTES, encode_block

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

FELT_S = 10.0
PASSWORD = "a-password-that-nobody-told"


@dataclass(frozen=True)
class Case:
    """One fault."""

    begin: Callable[[Scene], object]
    end: Callable[[Scene], object] = lambda scene: None
    felt: str = "num_failed"  # counter that says that it was there; "" where nobody can tell


def network(fault: Fault, delay_s: float = 0.0, felt: str = "num_failed") -> Case:
    return Case(
        lambda scene: scene.proxy.switch(fault, delay_s),
        lambda scene: scene.proxy.switch(Fault.NONE),
        felt,
    )


def lock(scene: Scene) -> None:
    """Demand a password from everybody, those who are connected too."""
    there = scene.redis()
    there.config_set("requirepass", PASSWORD)
    there.client_kill_filter(_type="normal", skipme=True)


def fill(scene: Scene) -> None:
    """Be out of memory, with nothing of ours in it: all would have to be written."""
    there = scene.redis()
    there.config_set("maxmemory", 1)
    there.flushall()


def another_models_frame(key: bytes, frame: bytes) -> bytes:
    """Return a whole frame of the right size, whose content belongs to another model's block."""
    payload = bytes(len(frame) - HEADER_BYTES - len(key))
    return encode_block(payload, bytes(8) + key[8:])


CASES = {
    "accepts_and_never_answers": network(Fault.SILENT),
    "answers_after_30_s": network(Fault.LATE, 30.0),
    "network_loses_half_of_the_packets": network(Fault.LOSSY),
    "resets_connections": network(Fault.REFUSE),
    "returns_corrupt_bytes": network(Fault.CORRUPT, felt="num_corrupt"),
    "returns_truncated_bytes": network(Fault.TRUNCATE),
    "is_killed_and_restarted_empty": Case(
        lambda scene: scene.server.kill(), lambda scene: scene.server.start()
    ),
    "is_flushed": Case(lambda scene: scene.redis().flushall(), felt=""),
    "is_out_of_memory": Case(
        fill,
        lambda scene: scene.redis().config_set("maxmemory", 0),
    ),
    "is_read_only": Case(
        lambda scene: scene.redis().replicaof("127.0.0.1", free_port()),
        lambda scene: scene.redis().replicaof("NO", "ONE"),
    ),
    "refuses_authentication": Case(
        lock, lambda scene: scene.redis(PASSWORD).config_set("requirepass", "")
    ),
    "holds_values_cut_short": Case(
        lambda scene: scene.change_values(lambda key, frame: frame[: len(frame) // 2]),
        felt="num_corrupt",
    ),
    "holds_values_of_another_model": Case(
        lambda scene: scene.change_values(another_models_frame), felt="num_corrupt"
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_store_that_fails_is_noticed_by_no_stream(scene: Scene, name: str) -> None:
    case, mix, key = CASES[name], prompt_mix(), KEYS["root"]
    scene.wait_for_order()
    scene.wait_for_hits()
    check_answers(asyncio.run(answers(scene.address, mix, key)))  # all of it is stored
    scene.flush_replicas()
    num_felt = scene.total(case.felt) if case.felt else 0

    def begin() -> None:
        case.begin(scene)
        scene.flush_replicas()  # those that follow need the store

    def is_felt() -> bool:  # a store that was slow just now is asked for nothing
        if scene.total(case.felt) > num_felt:
            return True
        scene.flush_replicas()
        check_answers(asyncio.run(answers(scene.address, mix, key)))
        return False

    try:
        done = asyncio.run(answers(scene.address, mix, key, num_rounds=3, when_running=begin))
        check_answers(done)
        if case.felt:
            wait_until(is_felt, FELT_S, "the fault is felt")
    finally:
        case.end(scene)
    order_s, hits_s = scene.wait_for_order(), scene.wait_for_hits()
    print(f"{name}: in order again after {order_s:.1f} s, hits {hits_s:.1f} s later")
