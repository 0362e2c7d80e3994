"""Tenants share nothing at any tier, unless they are of one group; and registered prefixes."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from pathlib import Path

import psutil
import pytest
from fault_cluster import BLOCK_SIZE, REQUEST_TIMEOUT_S, Ask, answers, random_tokens
from fault_scene import KEYS, Scene
from typer.testing import CliRunner
from waiting import wait_until

from cluster.cli.app import app
from cluster.client import AsyncClient, Completion, Finished, Running
from cluster.errors import NotFoundError
from cluster.rpc import public
from cluster.types import SamplingParams

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

SHORT = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
PROMPT_TOKENS = 200
FULL_TOKENS = PROMPT_TOKENS // BLOCK_SIZE * BLOCK_SIZE
NUM_PREFIX_BLOCKS = 12
REBUILD_S = 90.0
REPORT_S = 0.3  # a load report has come by then


def ask(scene: Scene, tenant: str, prompt: tuple[int, ...]) -> Completion:
    with scene.client_of(tenant) as client:
        return client.generate(token_ids=prompt, sampling=SHORT, timeout_s=REQUEST_TIMEOUT_S)


def cached(scene: Scene, tenant: str, prompt: tuple[int, ...]) -> int:
    return ask(scene, tenant, prompt).usage.cached_tokens


def num_indexed(scene: Scene, tenant: str, prompt: tuple[int, ...]) -> int:
    """Return the most blocks of a tenant's prompt that the router's index has of one replica."""
    with scene.client_of(tenant) as client:
        return max(found.num_blocks for found in client.inspect_cache(token_ids=prompt).replicas)


def wait_indexed(scene: Scene, tenant: str, prompt: tuple[int, ...]) -> None:
    full = FULL_TOKENS // BLOCK_SIZE
    wait_until(lambda: num_indexed(scene, tenant, prompt) == full, 5.0, "the router knows")


def test_device_cache_and_router_hit_within_a_tenant_or_group_only(scene: Scene) -> None:
    prompt = random_tokens("device", PROMPT_TOKENS)
    assert cached(scene, "alice", prompt) == 0
    wait_indexed(scene, "alice", prompt)
    assert num_indexed(scene, "carol", prompt) == 0
    assert cached(scene, "carol", prompt) == 0
    wait_indexed(scene, "carol", prompt)
    for tenant in ("alice", "carol", "bob"):  # bob is of alice's group
        assert num_indexed(scene, tenant, prompt) == FULL_TOKENS // BLOCK_SIZE
        assert cached(scene, tenant, prompt) == FULL_TOKENS
    assert num_indexed(scene, "root", prompt) == 0
    assert cached(scene, "root", prompt) == 0


def test_host_tier_hits_within_a_tenant_or_group_only(scene: Scene) -> None:
    counters = ("num_host_hit_tokens", "num_store_hit_tokens")
    for num_fillers in range(16, 48, 4):  # as many as put it out of the device, not of the host
        prompt = random_tokens(f"host {num_fillers}", PROMPT_TOKENS)
        for _ in range(8):  # so often that it outlives what comes now
            ask(scene, "alice", prompt)
        fillers = [Ask(random_tokens(f"{num_fillers} {i}", 150), SHORT) for i in range(num_fillers)]
        asyncio.run(answers(scene.address, fillers, KEYS["root"]))
        assert cached(scene, "carol", prompt) == cached(scene, "root", prompt) == 0
        time.sleep(REPORT_S)
        before = [scene.total(counter) for counter in counters]
        num_cached = cached(scene, "bob", prompt)
        time.sleep(REPORT_S)
        hits = [scene.total(counter) - old for counter, old in zip(counters, before, strict=True)]
        if hits[0]:
            assert num_cached == FULL_TOKENS and hits[1] == 0
            return
    raise AssertionError("the host tier never had the prompt")


def test_store_hits_within_a_tenant_or_group_only(scene: Scene) -> None:
    scene.wait_for_order()
    prompt = random_tokens("store", PROMPT_TOKENS)
    ask(scene, "alice", prompt)
    with scene.client_of("alice") as client:
        full = FULL_TOKENS // BLOCK_SIZE
        wait_until(
            lambda: client.inspect_cache(token_ids=prompt).num_stored_blocks == full, 5.0, "stored"
        )
    with scene.client_of("carol") as client:
        assert client.inspect_cache(token_ids=prompt).num_stored_blocks == 0
    scene.flush_replicas()
    before = scene.total("num_store_hit_tokens")
    for tenant in ("carol", "root"):
        assert cached(scene, tenant, prompt) == 0
    assert scene.total("num_store_hit_tokens") == before

    def hits(tenant: str) -> bool:
        scene.flush_replicas()
        return cached(scene, tenant, prompt) == FULL_TOKENS

    for tenant in ("alice", "bob"):
        wait_until(lambda tenant=tenant: hits(tenant), 10.0, f"{tenant} hits")  # type: ignore[misc]
    wait_until(lambda: scene.total("num_store_hit_tokens") > before, 2.0, "they came from there")


@pytest.fixture(scope="module")
def prefix(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, ...]:
    """The tokens that alice has registered as `sys`, with the command."""
    tokens = random_tokens("registered", NUM_PREFIX_BLOCKS * BLOCK_SIZE + 7)
    key_file: Path = tmp_path_factory.mktemp("keys") / "alice"
    key_file.write_text(KEYS["alice"])
    command = ["prefix", "add", "sys", "--token-ids", ",".join(map(str, tokens))]
    options = ["--address", scene.address, "--api-key-file", str(key_file), "--json"]
    result = CliRunner().invoke(app, [*command, *options])
    assert result.exit_code == 0, result.output
    registered = json.loads(result.stdout)
    assert registered["num_blocks"] == registered["num_stored_blocks"] == NUM_PREFIX_BLOCKS
    return tokens


def num_stored(scene: Scene) -> int:
    """Return how many of the prefix's blocks are stored; 0 where it is not registered."""
    with scene.client_of("alice") as client:
        return sum(found.num_stored_blocks for found in client.list_prefixes())


async def cached_by_replica(scene: Scene, tails: list[tuple[int, ...]]) -> dict[str, int]:
    """Ask for the prefix by name, with all tails at once; return each replica's best hit."""
    best: dict[str, int] = {}

    async def one(client: AsyncClient, tail: tuple[int, ...]) -> None:
        replica_id = ""
        async for event in client.stream(
            token_ids=tail, prefix="sys", sampling=SHORT, timeout_s=REQUEST_TIMEOUT_S
        ):
            if isinstance(event, Running):
                replica_id = event.replica_id
            if isinstance(event, Finished):
                best[replica_id] = max(best.get(replica_id, 0), event.usage.cached_tokens)

    async with AsyncClient(scene.address, api_key=KEYS["alice"]) as client:
        await asyncio.gather(*(one(client, tail) for tail in tails))
    return best


def test_registered_prefix_is_neither_sent_nor_computed_again(
    scene: Scene, prefix: tuple[int, ...]
) -> None:
    tail = random_tokens("tail", 20)
    with scene.client_of("alice") as client:
        named = client.generate(
            token_ids=tail, prefix="sys", sampling=SHORT, timeout_s=REQUEST_TIMEOUT_S
        )
    whole = ask(scene, "alice", prefix + tail)
    assert named.token_ids == whole.token_ids
    assert named.usage.prompt_tokens == len(prefix) + len(tail)
    assert named.usage.cached_tokens >= NUM_PREFIX_BLOCKS * BLOCK_SIZE
    message = public.generate_request(
        None, token_ids=tail, model="", sampling=SHORT, request_id="", prefix="sys"
    )
    assert len(message.SerializeToString()) < len(prefix)
    scene.flush_replicas()
    tails = [random_tokens(f"tail {i}", 20) for i in range(16)]
    wanted = NUM_PREFIX_BLOCKS * BLOCK_SIZE

    def both_have_it() -> bool:
        best = asyncio.run(cached_by_replica(scene, tails))
        return len(best) == 2 and min(best.values()) >= wanted

    wait_until(both_have_it, 10.0, "both replicas serve it from a cache")


def test_registered_prefix_is_unknown_to_other_tenants(
    scene: Scene, prefix: tuple[int, ...]
) -> None:
    for tenant in ("bob", "carol"):
        with scene.client_of(tenant) as client:
            assert client.list_prefixes() == []
            for call in (
                lambda client=client: client.generate("x", prefix="sys", timeout_s=10),
                lambda client=client: client.inspect_cache(prefix="sys"),
                lambda client=client: client.remove_prefix("sys"),
            ):
                with pytest.raises(NotFoundError):
                    call()
    assert num_stored(scene) == NUM_PREFIX_BLOCKS


def test_registered_prefix_survives_an_emptied_store(scene: Scene, prefix: tuple[int, ...]) -> None:
    assert num_stored(scene) == NUM_PREFIX_BLOCKS
    scene.redis().flushall()
    elapsed_s = wait_until(
        lambda: num_stored(scene) == NUM_PREFIX_BLOCKS, 15.0, "its blocks are stored again"
    )
    with scene.client_of("alice") as client:
        assert [found.name for found in client.list_prefixes()] == ["sys"]
    assert scene.client.cache_stats().store.num_pinned_blocks >= NUM_PREFIX_BLOCKS  # type: ignore[union-attr]
    print(f"stored again after {elapsed_s:.1f} s")


def test_new_group_begins_with_the_registered_prefix(scene: Scene, prefix: tuple[int, ...]) -> None:
    before = {r.replica_id for r in scene.client.status().replicas}
    psutil.Process(scene.leader_pids()[0]).send_signal(signal.SIGKILL)

    def new() -> list[str]:
        ready = [r for r in scene.client.status().replicas if r.state == "ready"]
        return [r.replica_id for r in ready if r.replica_id not in before]

    wait_until(lambda: bool(new()), REBUILD_S, "a new group is ready")
    with scene.client_of("alice") as client:
        found = {one.replica_id: one for one in client.inspect_cache(prefix="sys").replicas}
    assert found[new()[0]].num_blocks == NUM_PREFIX_BLOCKS
