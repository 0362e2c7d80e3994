from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest

from cluster.router.plausible import (
    MAX_COUNT,
    MAX_HINGES,
    MAX_SECONDS,
    MAX_TOTAL,
    check_info,
    check_load,
)
from cluster.types import (
    MAX_DUE_WORKS,
    CacheLoad,
    DueWork,
    ReplicaInfo,
    ReplicaLoad,
    StepCost,
    StoreState,
)

_COST = StepCost(
    floor_s=0.01,
    token_s=1e-4,
    hinges=((8, 0.0), (64, 1e-4)),
    sequence_s=1e-5,
    context_s=1e-8,
    prompt_work_s=1e-9,
    num_steps=12,
)
_LOAD = ReplicaLoad(
    num_running=3,
    num_waiting=2,
    num_queued_prefill_tokens=4096,
    num_free_blocks=10,
    num_blocks=10,
    num_generated_tokens=2**50,
    step_cost=_COST,
    cache=CacheLoad(StoreState.EXACT, num_host_slots=4, stored_bytes=2**45, saved_s=3.5),
    due=(DueWork(-0.5, 0.1), DueWork(0.25, 0.0), DueWork(0.25, 2.0)),
    late_s=1.5,
    prefill_token_s=1e-4,
    decode_step_s=0.03,
    fetch_block_s=0.001,
)
_INFO = ReplicaInfo("replica-1", "10.0.0.7:4242", "demo", "07" * 16, 2, 1, 16, max_model_len=2)
_TIMES = ("late_s", "prefill_token_s", "decode_step_s", "fetch_block_s")
_COUNTS = (
    "num_running",
    "num_waiting",
    "num_queued_prefill_tokens",
    "num_free_blocks",
    "num_blocks",
)


def _with(**changes: Any) -> ReplicaLoad:
    return replace(_LOAD, **changes)


def _with_cost(**changes: Any) -> ReplicaLoad:
    return replace(_LOAD, step_cost=replace(_COST, **changes))


def _with_cache(**changes: Any) -> ReplicaLoad:
    return replace(_LOAD, cache=replace(_LOAD.cache, **changes))


@pytest.mark.parametrize("load", [_LOAD, ReplicaLoad(), _with(step_cost=None)])
def test_report_that_can_be_true_is_plausible(load: ReplicaLoad) -> None:
    assert check_load(load) is None


@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf, -math.inf, 2 * MAX_SECONDS])
@pytest.mark.parametrize("name", _TIMES)
def test_time_that_cannot_be_is_named(name: str, value: float) -> None:
    reason = check_load(_with(**{name: value}))
    assert reason == f"{name}={value}, limit=0 to 1e+09"


@pytest.mark.parametrize("value", [-1, MAX_COUNT + 1])
@pytest.mark.parametrize("name", _COUNTS)
def test_count_that_cannot_be_is_named(name: str, value: int) -> None:
    reason = check_load(_with(**{name: value}))
    assert reason is not None and reason.startswith(f"{name}={value}, limit=")


@pytest.mark.parametrize("value", [-1, MAX_TOTAL + 1])
def test_total_that_cannot_be_is_named(value: int) -> None:
    reason = check_load(_with(num_prefix_hit_tokens=value))
    assert reason is not None and reason.startswith(f"num_prefix_hit_tokens={value}, limit=")


@pytest.mark.parametrize("name", [f.name for f in fields(CacheLoad) if f.name != "store_state"])
def test_nonsense_about_the_tiers_is_named(name: str) -> None:
    reason = check_load(_with_cache(**{name: -1}))
    assert reason is not None and reason.startswith(f"cache.{name}=-1, limit=0 to ")


def test_more_free_blocks_than_blocks_are_not_plausible() -> None:
    reason = check_load(_with(num_free_blocks=11))
    assert reason == "num_free_blocks=11, limit=num_blocks=10"


@pytest.mark.parametrize("value", [-1e-12, math.nan, math.inf])
@pytest.mark.parametrize("name", [f.name for f in fields(StepCost) if f.name.endswith("_s")])
def test_step_cost_that_cannot_be_is_named(name: str, value: float) -> None:
    reason = check_load(_with_cost(**{name: value}))
    assert reason is not None and reason.startswith(f"step_cost.{name}={value}, limit=0 to ")


@pytest.mark.parametrize(
    ("hinges", "words"),
    [
        (((8, -1e-9),), "hinges.token_s=-1e-09"),
        (((8, math.nan),), "hinges.token_s=nan"),
        (((-8, 0.0),), "hinges.tokens=-8"),
        (((64, 0.1), (8, 0.1)), "8 tokens after 64"),
        (((8, 0.1), (8, 0.1)), "8 tokens after 8"),
        (tuple((i, 0.0) for i in range(MAX_HINGES + 1)), f"{MAX_HINGES + 1} hinges"),
    ],
)
def test_hinges_that_cannot_be_are_named(hinges: tuple[tuple[int, float], ...], words: str) -> None:
    reason = check_load(_with_cost(hinges=hinges))
    assert reason is not None and words in reason


@pytest.mark.parametrize(
    ("due", "words"),
    [
        ((DueWork(0.1, -0.1),), "due.work_s=-0.1, limit=0"),
        ((DueWork(0.1, math.nan),), "due.work_s=nan"),
        ((DueWork(math.nan, 0.1),), "due.due_s=nan"),
        ((DueWork(-math.inf, 0.1),), "due.due_s=-inf"),
        ((DueWork(0.2, 0.1), DueWork(0.1, 0.1)), "due_s=0.1 after 0.2"),
        ((DueWork(0.0, 0.1),) * (MAX_DUE_WORKS + 1), f"{MAX_DUE_WORKS + 1} entries"),
    ],
)
def test_due_work_that_cannot_be_is_named(due: tuple[DueWork, ...], words: str) -> None:
    reason = check_load(_with(due=due))
    assert reason is not None and words in reason


def test_most_due_work_is_plausible() -> None:
    assert check_load(_with(due=(DueWork(0.0, 0.1),) * MAX_DUE_WORKS)) is None


@pytest.mark.parametrize("block_size", [1, 65536])
def test_replica_that_can_be_is_plausible(block_size: int) -> None:
    assert check_info(replace(_INFO, block_size=block_size)) is None


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("replica_id", "", "1 to 256 printable characters"),
        ("replica_id", "a\nb", "1 to 256 printable characters"),
        ("replica_id", "x" * 257, "1 to 256 printable characters"),
        ("address", "", "1 to 256 printable characters"),
        ("fingerprint", "", "1 to 256 printable characters"),
        ("fingerprint", "no hex", "pairs of hexadecimal digits"),
        ("fingerprint", "07 07", "pairs of hexadecimal digits"),
        ("fingerprint", "070", "pairs of hexadecimal digits"),
        ("tp", 0, "1 to 4096"),
        ("pp", -1, "1 to 4096"),
        ("pp", 4097, "1 to 4096"),
        ("block_size", 0, "1 to 65536"),
        ("block_size", 65537, "1 to 65536"),
        ("max_model_len", 1, "2 to "),
    ],
)
def test_replica_that_cannot_be_is_told_by_its_field(name: str, value: Any, limit: str) -> None:
    reason = check_info(replace(_INFO, **{name: value}))
    assert reason is not None and reason.startswith(f"{name}=")
    assert f"limit={limit}" in reason
