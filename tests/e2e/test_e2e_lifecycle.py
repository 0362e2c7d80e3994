"""Two replica groups behind one gateway: cancellation, prefix reuse, a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Iterator

import pytest

from cluster.client import AsyncClient, Client
from cluster.config import load_config
from cluster.errors import DeadlineError
from cluster.gateway.app import ServingCluster, check, start
from cluster.types import SamplingParams

pytestmark = [pytest.mark.integration, pytest.mark.timeout(420)]


@pytest.fixture(scope="module", params=["embedded", "redis"])
def cluster(request: pytest.FixtureRequest) -> Iterator[ServingCluster]:
    url = "embedded"
    if request.param == "redis":
        url = request.getfixturevalue("redis_server").url
    config = load_config(
        None,
        [
            f"store.url={url}",
            f"store.namespace=test{os.getpid()}",
            "parallel.num_cpus_per_worker=0.1",
            "replica.num_replicas=2",
            "gateway.port=0",
            "cache.num_blocks=400",
        ],
    )
    check(config)
    with start(config) as running:
        yield running


def quiet(client: Client, timeout_s: float = 20) -> None:
    """Wait until nothing runs and every block is free, or fail."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        status = client.status()
        if status.num_inflight == 0 and all(
            r.num_running == 0 and r.num_waiting == 0 and r.num_free_blocks == r.num_blocks
            for r in status.replicas
        ):
            return
        assert time.monotonic() < deadline_s, f"something is held: {status}"
        time.sleep(0.1)


def test_cluster_serves_text_from_both_groups(cluster: ServingCluster) -> None:
    async def ask() -> set[str]:
        async with AsyncClient(cluster.address) as client:
            sampling = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
            done = await asyncio.gather(
                *(
                    client.generate(f"def function_{i}(self):\n", sampling=sampling, timeout_s=60)
                    for i in range(12)
                )
            )
            assert all(len(item.token_ids) == 24 and item.text for item in done)
        with Client(cluster.address) as sync:
            return {r.replica_id for r in sync.status().replicas if r.num_generated_tokens}

    assert len(asyncio.run(ask())) == 2


def test_prefix_computed_once_is_cached_and_routed_to(cluster: ServingCluster) -> None:
    prompt = [random.Random(5).randrange(4096) for _ in range(200)]
    sampling = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    with Client(cluster.address) as client:
        first = client.generate(token_ids=prompt, sampling=sampling, timeout_s=60)
        assert first.usage.cached_tokens == 0
        time.sleep(0.5)  # the watch tells the gateway
        for _ in range(4):
            again = client.generate(token_ids=prompt, sampling=sampling, timeout_s=60)
            assert again.token_ids == first.token_ids
            assert again.usage.cached_tokens == 192  # the full blocks before the last token


def test_deadline_ends_a_request_and_frees_its_blocks(cluster: ServingCluster) -> None:
    with Client(cluster.address) as client:
        with pytest.raises(DeadlineError):
            client.generate(
                token_ids=[1, 2, 3],
                sampling=SamplingParams(max_tokens=1900, ignore_eos=True),
                timeout_s=0.3,
            )
        quiet(client)


def test_cancellations_in_every_phase_leave_nothing_behind(cluster: ServingCluster) -> None:
    num_requests = 1000 if cluster.config.store.url == "embedded" else 200
    randomness = random.Random(11)

    async def one(client: AsyncClient, gate: asyncio.Semaphore) -> None:
        async with gate:
            prompt = [randomness.randrange(4096) for _ in range(randomness.randrange(1, 300))]
            sampling = SamplingParams(max_tokens=400, ignore_eos=True)
            task = asyncio.ensure_future(
                client.generate(token_ids=prompt, sampling=sampling, timeout_s=120)
            )
            await asyncio.sleep(randomness.choice([0.0, 0.001, 0.01, 0.05, 0.2, 0.5]))
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def storm() -> None:
        async with AsyncClient(cluster.address) as client:
            gate = asyncio.Semaphore(48)
            await asyncio.gather(*(one(client, gate) for _ in range(num_requests)))

    asyncio.run(storm())
    with Client(cluster.address) as client:
        quiet(client)
        done = client.generate("import os\n", sampling=SamplingParams(max_tokens=8), timeout_s=60)
        assert done.finish_reason
