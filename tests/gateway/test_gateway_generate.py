from __future__ import annotations

import asyncio
import contextlib

import grpc
import pytest
from gateway_fakes import FINGERPRINT, FakeLeader, eventually, stage

from cluster.client import AsyncClient, Finished, Queued, Running, TextDelta
from cluster.errors import (
    DeadlineError,
    InvalidArgumentError,
    OverloadedError,
    SluiceError,
    UnavailableError,
)
from cluster.gateway.tokenizer import Tokenizer
from cluster.kvstore.block_hash import block_hashes, router_key
from cluster.rpc.sluice.v1 import inference_pb2 as pb
from cluster.rpc.sluice.v1.inference_pb2_grpc import InferenceStub
from cluster.types import ReplicaLoad, SampledToken, TokenLogprob

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    from cluster.config import ModelConfig

    return Tokenizer.load(ModelConfig())


def script_of(tokenizer: Tokenizer, text: str) -> list[SampledToken]:
    return [SampledToken(token) for token in tokenizer._encode(text, continues=False)]


async def test_stream_runs_from_running_to_finished() -> None:
    leader = FakeLeader()
    async with stage(leader) as running, AsyncClient(running.address) as client:
        events = [e async for e in client.stream("def f():", sampling={"max_tokens": 5})]
    assert events[0] == Running("replica-1")
    deltas = [e for e in events if isinstance(e, TextDelta)]
    assert [t for d in deltas for t in d.token_ids] == [64, 65, 66, 67, 68]
    assert "".join(d.text for d in deltas) == "`abcd"
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert finished.finish_reason == "length"
    assert finished.usage.completion_tokens == 5
    assert finished.usage.cached_tokens == 3
    assert 0 < finished.timings.queued_s < finished.timings.ttft_s <= finished.timings.total_s


async def test_stream_numbers_events_without_gaps_and_ends_once() -> None:
    request = pb.GenerateRequest(text="x", sampling=pb.SamplingParams(max_tokens=50))
    async with (
        stage(FakeLeader()) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        call = InferenceStub(channel).GenerateStream(pb.GenerateStreamRequest(request=request))
        events = [event async for event in call]
    assert [event.seq for event in events] == list(range(len(events)))
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "running" and kinds[-1] == "finished"
    assert set(kinds[1:-1]) == {"delta"}
    assert len({event.request_id for event in events}) == 1


async def test_generate_equals_the_collected_stream(tokenizer: Tokenizer) -> None:
    leader = FakeLeader()
    leader.script = script_of(tokenizer, "héllo 世界 👍!\n")
    n = len(leader.script)
    async with stage(leader) as running, AsyncClient(running.address) as client:
        done = await client.generate(token_ids=[1, 2], sampling={"max_tokens": n}, request_id="me")
        events = [e async for e in client.stream(token_ids=[1, 2], sampling={"max_tokens": n})]
    assert done.text == "héllo 世界 👍!\n"
    assert done.request_id == "me"
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == done.text
    assert not any("\ufffd" in e.text for e in events if isinstance(e, TextDelta))


async def test_stop_string_ends_the_text_and_the_request(tokenizer: Tokenizer) -> None:
    leader = FakeLeader()
    leader.script = script_of(tokenizer, "one two three four five six")
    leader.step_s = 0.002
    sampling = {"max_tokens": 400, "stop": ["ee fo"]}
    async with stage(leader) as running, AsyncClient(running.address) as client:
        done = await client.generate("x", sampling=sampling)
        await eventually(lambda: leader.num_live == 0)
    assert done.text == "one two thr"
    assert done.finish_reason == "stop"
    assert done.usage.completion_tokens == len(done.token_ids) < 12
    assert leader.cancelled == [leader.submitted[0].request_id]


async def test_end_of_text_token_has_no_text() -> None:
    leader = FakeLeader()
    leader.script = [SampledToken(65), SampledToken(0)]
    async with stage(leader) as running, AsyncClient(running.address) as client:
        done = await client.generate("x", sampling={"max_tokens": 9})
    assert (done.text, done.token_ids, done.finish_reason) == ("a", (65, 0), "stop")
    assert leader.cancelled == []


async def test_logprobs_come_with_their_tokens() -> None:
    leader = FakeLeader()
    top = (TokenLogprob(65, -0.5), TokenLogprob(66, -1.5))
    leader.script = [SampledToken(65, -0.5, top)]
    async with stage(leader) as running, AsyncClient(running.address) as client:
        done = await client.generate("x", sampling={"max_tokens": 2, "logprobs": 2})
    assert leader.submitted[0].sampling.num_logprobs == 2
    assert [(t.text, t.logprob) for t in done.logprobs] == [("a", -0.5)] * 2
    assert [(t.text, t.logprob) for t in done.logprobs[0].top] == [("a", -0.5), ("b", -1.5)]


async def test_submit_carries_sampling_and_the_rest_of_the_deadline() -> None:
    leader = FakeLeader()
    async with stage(leader) as running, AsyncClient(running.address) as client:
        await client.generate(
            token_ids=[1, 2, 3],
            sampling={"max_tokens": 1, "seed": 2**64 - 1, "top_k": 7, "stop_token_ids": [5]},
            timeout_s=20,
        )
    (request,) = leader.submitted
    assert request.prompt_token_ids == (1, 2, 3)
    assert request.sampling.seed == 2**64 - 1
    assert (request.sampling.top_k, request.sampling.stop_token_ids) == (7, (5,))
    assert request.deadline_s is not None and 15 < request.deadline_s < 21  # gRPC rounds up


async def test_cancelled_client_reaches_the_leader_at_once() -> None:
    leader = FakeLeader()
    leader.step_s = 0.01
    async with stage(leader) as running, AsyncClient(running.address) as client:
        events = client.stream("x", sampling={"max_tokens": 400})
        async for event in events:
            if isinstance(event, TextDelta):
                break
        await events.aclose()
        await eventually(lambda: leader.num_live == 0, timeout_s=1)
        assert leader.cancelled == [leader.submitted[0].request_id]
        await eventually(lambda: running.server.num_inflight == 0, timeout_s=1)


async def test_many_random_cancellations_leave_nothing_behind() -> None:
    leader = FakeLeader()
    leader.step_s = 0.001
    async with stage(leader) as running, AsyncClient(running.address) as client:

        async def one(index: int) -> None:
            with contextlib.suppress(TimeoutError, DeadlineError):
                async with asyncio.timeout(index % 40 / 1000):
                    await client.generate("x", sampling={"max_tokens": 400})

        await asyncio.gather(*(one(index) for index in range(200)))
        await eventually(lambda: leader.num_live == 0 and running.server.num_inflight == 0)
        assert (await client.generate("x", sampling={"max_tokens": 1})).token_ids


async def test_deadline_ends_the_request_everywhere() -> None:
    leader = FakeLeader()
    leader.max_steps = 1
    async with stage(leader) as running, AsyncClient(running.address) as client:
        with pytest.raises(DeadlineError):
            await client.generate("x", sampling={"max_tokens": 9}, timeout_s=0.3)
        await eventually(lambda: leader.num_live == 0 and running.server.num_inflight == 0)


async def test_dead_leader_leaves_the_table_and_its_requests_wait_for_another() -> None:
    leader = FakeLeader()
    leader.max_steps = 2
    async with (
        stage(leader, queue_timeout_s=0.5) as running,
        AsyncClient(running.address) as client,
    ):
        request = client.generate("x", sampling={"max_tokens": 9}, resume_timeout_s=0)
        task = asyncio.create_task(request)
        await eventually(lambda: leader.num_live == 1)
        await leader.die()
        with pytest.raises(UnavailableError, match=r"gateway\.queue_timeout_s=0\.5"):
            await task
        await running.wait_state("replica-1", "connecting")
        await running.registry.unregister("replica-1")
        await running.wait_state("replica-1", None)


async def test_refused_request_goes_to_the_next_replica() -> None:
    full, free = FakeLeader("a"), FakeLeader("b")
    full.refusal = "RESOURCE_EXHAUSTED: 8 requests wait, limit=8: try again later"
    free.load = ReplicaLoad(num_running=3)  # the router prefers the other one
    async with stage(full, free) as running, AsyncClient(running.address) as client:
        events = [e async for e in client.stream("x", sampling={"max_tokens": 1})]
        assert [e.replica_id for e in events if isinstance(e, Running)] == ["a", "b"]
        free.refusal = full.refusal
        with pytest.raises(OverloadedError, match="limit=8") as caught:
            await client.generate("x")
        assert caught.value.retry_after_s > 0


async def test_request_without_replica_waits_for_one() -> None:
    async with stage() as running, AsyncClient(running.address) as client:
        events = client.stream("x", sampling={"max_tokens": 1})
        assert await anext(events) == Queued(0)
        assert (await client.status()).num_queued == 1
        await running.add(FakeLeader())
        rest = [e async for e in events]
        assert rest[0] == Running("replica-1") and isinstance(rest[-1], Finished)
        assert (await client.status()).num_queued == 0


async def test_queued_request_gives_up_after_its_time() -> None:
    async with stage(queue_timeout_s=0.05) as running, AsyncClient(running.address) as client:
        with pytest.raises(UnavailableError, match=r"queue_timeout_s=0\.05"):
            await client.generate("x")


async def test_queue_and_inflight_are_bounded() -> None:
    bounds = {"max_queued_requests": 1, "max_inflight_requests": 2}
    async with stage(**bounds) as running, AsyncClient(running.address) as client:
        waiting = client.stream("x")
        assert await anext(waiting) == Queued(0)
        with pytest.raises(OverloadedError, match="max_queued_requests=1"):
            await client.generate("x")
        leader = FakeLeader()
        leader.max_steps = 0
        await running.add(leader)
        assert await anext(waiting) == Running("replica-1")
        other = asyncio.create_task(client.generate("x"))
        await eventually(lambda: leader.num_live == 2)
        with pytest.raises(OverloadedError, match="max_inflight_requests=2") as caught:
            await client.generate("x")
        assert caught.value.retry_after_s == 1.0
        other.cancel()
        await waiting.aclose()


async def test_live_request_id_is_refused_once_and_free_afterwards() -> None:
    leader = FakeLeader()
    leader.max_steps = 0
    async with stage(leader) as running, AsyncClient(running.address) as client:
        first = asyncio.create_task(client.generate("x", request_id="same"))
        await eventually(lambda: leader.num_live == 1)
        with pytest.raises(InvalidArgumentError, match="has not ended") as caught:
            await client.generate("x", request_id="same")
        assert caught.value.field == "request_id"
        first.cancel()
        leader.max_steps = None
        await eventually(lambda: running.server.num_inflight == 0)
        assert (await client.generate("x", request_id="same")).request_id == "same"


async def test_draining_replica_gets_no_new_requests() -> None:
    draining, other = FakeLeader("a"), FakeLeader("b")
    async with stage(draining, other) as running, AsyncClient(running.address) as client:
        draining.push_load(ReplicaLoad(is_draining=True))
        await running.wait_state("a", "draining")
        for _ in range(4):
            await client.generate("x", sampling={"max_tokens": 1})
        assert len(other.submitted) == 4


async def test_cached_prefix_decides_and_a_lost_message_is_noticed(tokenizer: Tokenizer) -> None:
    prompt = list(range(100, 164))
    hashes = block_hashes(prompt, 16, fingerprint=FINGERPRINT)
    leaders = [FakeLeader(name) for name in "abc"]
    leaders[1].blocks = [router_key(item) for item in hashes]
    async with stage(*leaders) as running, AsyncClient(running.address) as client:
        await client.generate(token_ids=prompt, sampling={"max_tokens": 1})
        assert [len(leader.submitted) for leader in leaders] == [0, 1, 0]
        state = {r.replica_id: r.num_indexed_blocks for r in (await client.status()).replicas}
        assert state == {"a": 0, "b": 4, "c": 0}
        leaders[1].blocks = [1]
        leaders[1].push(seq=7)  # in place of 1
        await eventually(lambda: leaders[1].num_watches == 2, timeout_s=3)
        await running.wait_state("b", "ready")
        state = {r.replica_id: r.num_indexed_blocks for r in (await client.status()).replicas}
        assert state["b"] == 1


async def test_store_failure_keeps_connected_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(kind: str) -> dict[str, bytes]:
        raise UnavailableError("store is out of reach")

    async with stage(FakeLeader()) as running, AsyncClient(running.address) as client:
        monkeypatch.setattr(running.store, "list_leases", fail)
        await asyncio.sleep(0.6)  # more than two looks
        assert (await client.generate("x", sampling={"max_tokens": 1})).token_ids


async def test_connected_replica_outlives_its_lease() -> None:
    leader = FakeLeader()
    async with stage(leader) as running, AsyncClient(running.address) as client:
        await running.registry.unregister("replica-1")
        await asyncio.sleep(0.6)  # more than two looks
        assert (await client.generate("x", sampling={"max_tokens": 1})).token_ids
        await leader.die()
        await running.wait_state("replica-1", None)


async def test_unknown_engine_error_is_internal() -> None:
    leader = FakeLeader()
    leader.refusal = "ALREADY_EXISTS: strange"
    async with stage(leader) as running, AsyncClient(running.address) as client:
        with pytest.raises(SluiceError, match="INTERNAL"):
            await client.generate("x")


async def test_streams_share_one_session() -> None:
    leader = FakeLeader()
    async with stage(leader) as running, AsyncClient(running.address) as client:
        streams = [client.generate("x", sampling={"max_tokens": 200}) for _ in range(8)]
        assert all(len(done.token_ids) == 200 for done in await asyncio.gather(*streams))


async def test_tokenize_and_models(tokenizer: Tokenizer) -> None:
    async with stage(FakeLeader()) as running, AsyncClient(running.address) as client:
        assert tuple(await client.tokenize("def f():")) == await tokenizer.encode("def f():")
        long = "x = 1\n" * 5000  # in a thread
        assert tuple(await client.tokenize(long)) == await tokenizer.encode(long)
        (model,) = await client.list_models()
        assert (model.name, model.max_model_len, model.vocab_size) == ("sluice-demo", 512, 4096)
