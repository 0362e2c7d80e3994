"""kill -9 of a replica, a gateway, or both: clients get the unbroken stream, whatever it holds."""

from __future__ import annotations

from functools import partial

import pytest

from cluster.bench.resumption import Sweep, aims_of
from cluster.bench.resumption_cases import CASES, PROMPT, plain, sampling_of
from cluster.bench.resumption_cluster import Layout, ResumptionCluster
from cluster.bench.resumption_nursery import Nursery
from cluster.bench.resumption_stream import Cut, difference, follow
from cluster.client import AsyncClient

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

NUM_TOKENS = 64
EVERY = 16
MAX_GAP_S = 5.0  # the aims are for a quiet machine: `sluice bench resumption` holds them


@pytest.mark.parametrize("case", CASES)
async def test_kills_change_nothing_of_a_stream(sweep: Sweep, case: str) -> None:
    sampling = await sampling_of(case, NUM_TOKENS, sweep.reference)
    result = await sweep.run(case, sampling, partial(aims_of, every=EVERY))
    assert result.failed == []
    assert result.different == []
    assert result.missed == []
    assert result.undisturbed == ""
    assert result.num_identical == result.num_streams == len(result.gaps_s)
    assert max(result.gaps_s) < MAX_GAP_S


async def test_gateway_and_replica_that_die_together_change_nothing(nursery: Nursery) -> None:
    overrides = ("model.dtype=float32",)
    # Slow enough for the journal to have been written many times by then.
    layout = Layout(num_leaders=2, num_gateways=2, overrides=overrides, min_step_s=0.03)
    sampling = plain("everything", NUM_TOKENS)
    async with ResumptionCluster(layout, nursery) as cluster:

        def kill_both(replica_id: str) -> None:
            cluster.kill_leader(replica_id)
            cluster.kill_gateway(cluster.addresses[0])

        async with AsyncClient(cluster.addresses) as client:
            reference = await follow(client, PROMPT, sampling)
            cut = Cut(NUM_TOKENS - 8, kill_both)
            followed = await follow(client, PROMPT, sampling, cut=cut, resume_timeout_s=10.0)
    assert reference.answer is not None and followed.answer is not None, followed.error
    assert followed.cut_index is not None
    assert followed.replica_ids[0] == reference.replica_ids[0] != followed.replica_ids[-1]
    num_cached_tokens = cluster.num_cacheable(reference.answer.usage.prompt_tokens)
    assert num_cached_tokens > 0, "the replica that died had it cached, the other one had not"
    found = difference(followed.answer, reference.answer, num_cached_tokens=num_cached_tokens)
    assert found == ""
