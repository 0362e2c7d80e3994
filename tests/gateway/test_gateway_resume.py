"""Streams that go on in another call: at the same gateway, at another one, refused."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from gateway_fakes import FakeLeader, Stage, eventually, stage
from resume_fakes import (
    Received,
    begin,
    connected,
    nothing,
    read,
    refusal,
    resume,
    two_gateways,
)
from tenant_files import KEYS, auth_config, bearer, sha256, write_tenants

from cluster.client import AsyncClient, TextDelta
from cluster.clock import WallClock
from cluster.config import StoreConfig
from cluster.errors import UnavailableError
from cluster.gateway.journal_entry import EntryKind, seal
from cluster.kvstore.embedded import EmbeddedStore
from cluster.kvstore.store import Journal, JournalWrite, JournalWrites
from cluster.rpc.sluice.v1 import inference_pb2 as pb
from cluster.types import SampledToken, TokenLogprob

pytestmark = pytest.mark.integration

ALICE, BOB = bearer(KEYS["alice"]), bearer(KEYS["bob"])
SCRIPT = [64 + step % 30 for step in range(40)]  # a character each


def _leader(step_s: float = 0.01) -> FakeLeader:
    leader = FakeLeader()
    leader.script = [SampledToken(token) for token in SCRIPT[:30]]
    leader.step_s = step_s
    return leader


def _assert_unbroken(received: Received, num_tokens: int = 40) -> None:
    assert received.token_ids == SCRIPT[:num_tokens]
    assert received.text == "".join(chr(token + 32) for token in SCRIPT[:num_tokens])
    assert received.seqs == list(range(len(received.seqs)))
    assert received.finished is not None
    assert received.finished.usage.completion_tokens == num_tokens
    assert received.finished.usage.prompt_tokens == 3


async def _is_idle(*gateways: Stage) -> bool:
    return all(
        running.server.num_inflight == 0
        and not running.server._running
        and not running.dispatcher._flights
        for running in gateways
    )


@pytest.mark.parametrize("has_tokens", [True, False])
async def test_stream_that_its_client_left_goes_on_at_another_gateway(has_tokens: bool) -> None:
    leader = _leader()
    async with two_gateways(leader) as (first, second), connected(first) as stub:
        call = begin(stub)
        received = await read(call, nothing(), 12)
        call.cancel()
        await eventually(lambda: _is_idle(first))
        await first.server._journals.flush()
        async with connected(second) as other:
            await read(resume(other, received, has_tokens=has_tokens), received)
        _assert_unbroken(received)
        again = leader.submitted[-1]
        assert list(again.output_token_ids) == SCRIPT[: len(again.output_token_ids)]
        assert len(again.output_token_ids) >= 12, "what is known is not generated again"
        assert second.value("sluice_resumptions_total", cause="client") == 1
        await eventually(lambda: _is_idle(first, second))


async def test_resumption_ends_the_call_that_carries_the_request_here() -> None:
    leader = _leader()
    async with stage(leader) as running, connected(running) as stub, connected(running) as other:
        call = begin(stub)
        received = await read(call, nothing(), 5)
        going_on = asyncio.create_task(read(resume(other, received), received))
        code, reason, _ = await refusal(call)
        assert (code, reason) == ("ABORTED", "SUPERSEDED")
        _assert_unbroken(await going_on)
        assert running.value("sluice_superseded_requests_total") == 1
        assert running.value("sluice_requests_total", code="ABORTED") == 1
        await eventually(lambda: leader.num_live == 0)
        await eventually(lambda: _is_idle(running))


async def test_resumption_ends_the_call_that_carries_the_request_elsewhere() -> None:
    leader = _leader(0.02)
    async with (
        two_gateways(leader) as (first, second),
        connected(first) as stub,
        connected(second) as other,
    ):
        call = begin(stub)
        received = await read(call, nothing(), 5)
        going_on = asyncio.create_task(read(resume(other, received), received))
        code, reason, _ = await refusal(call)
        assert (code, reason) == ("ABORTED", "SUPERSEDED")
        _assert_unbroken(await going_on)
        assert first.value("sluice_superseded_requests_total") == 1
        await eventually(lambda: _is_idle(first, second))


async def test_position_alone_is_enough_for_what_this_gateway_has_not_journalled_yet() -> None:
    async with (
        stage(_leader(), journal_interval_s=600.0) as running,
        connected(running) as stub,
        connected(running) as other,
    ):
        received = await read(begin(stub), nothing(), 9)
        await read(resume(other, received, has_tokens=False), received)
        _assert_unbroken(received)


async def test_resumption_ends_a_call_whose_client_reads_nothing() -> None:
    leader = FakeLeader(max_model_len=1024)
    top = tuple(TokenLogprob(token, -1.0) for token in range(64, 84))
    leader.script = [SampledToken(64, -1.0, top)]
    sampling = pb.SamplingParams(max_tokens=800, logprobs=20)
    async with stage(leader) as running, connected(running) as stub, connected(running) as other:
        request = pb.GenerateRequest(
            request_id="r", token_ids=pb.TokenIds(ids=[1]), sampling=sampling
        )
        call = stub.GenerateStream(pb.GenerateStreamRequest(request=request))
        received = await read(call, nothing(), 1)
        await eventually(lambda: len(leader.submitted) == 1 and leader.num_live == 0, 30.0)
        (stuck,) = running.server._running.values()
        await read(resume(other, received), received)
        assert stuck not in running.server._running.values()
        assert len(received.token_ids) == 800
        assert received.seqs == list(range(len(received.seqs)))
        assert running.value("sluice_superseded_requests_total") == 1
        call.cancel()


async def test_of_two_resumptions_at_once_the_later_one_goes_on() -> None:
    leader = _leader(0.02)
    async with stage(leader) as running, connected(running) as stub:
        call = begin(stub)
        received = await read(call, nothing(), 3)
        known = Received([*received.seqs], [*received.token_ids], received.text)
        calls = [resume(stub, known) for _ in range(5)]
        ends = await asyncio.gather(
            *(
                read(each, Received([*known.seqs], [*known.token_ids], known.text))
                for each in calls
            ),
            return_exceptions=True,
        )
        whole = [end for end in ends if isinstance(end, Received)]
        errors = [end for end in ends if isinstance(end, grpc.aio.AioRpcError)]
        assert (len(whole), len(errors)) == (1, 4)
        _assert_unbroken(whole[0])
        assert {error.code() for error in errors} == {grpc.StatusCode.ABORTED}
        await eventually(lambda: _is_idle(running))


@pytest.mark.parametrize("num_received", [0, 7, 40])
async def test_answer_that_is_complete_is_sent_from_its_journal(num_received: int) -> None:
    leader = _leader(0.0)
    async with two_gateways(leader) as (first, second), connected(first) as stub:
        whole = await read(begin(stub), nothing())
        await first.server._journals.flush()
        received = nothing()
        for event in await _events(stub, "again", num_received):
            received.take(event)
        async with connected(second) as other:
            await read(resume(other, received), received)
        _assert_unbroken(received)
        assert received.finished is not None and whole.finished is not None
        assert received.finished.usage == whole.finished.usage
        assert received.finished.timings.ttft_s == pytest.approx(whole.finished.timings.ttft_s)
        assert second.value("sluice_completion_tokens_total") == 0, "counted where it finished"
        assert second.value("sluice_resumptions_total", cause="client") == 1
        assert len(leader.submitted) == 1 + bool(num_received)
        await eventually(lambda: _is_idle(first, second))


async def _events(stub: Any, request_id: str, num_tokens: int) -> list[pb.GenerateStreamResponse]:
    """Return the first events of an answer that is like every other one."""
    events: list[pb.GenerateStreamResponse] = []
    if num_tokens:
        call, count = begin(stub, request_id), 0
        while count < num_tokens:
            event = await call.read()
            if count + len(event.delta.token_ids) > num_tokens:
                del event.delta.token_ids[num_tokens - count :]
                event.delta.text = event.delta.text[: num_tokens - count]
            events.append(event)
            count += len(event.delta.token_ids)
        call.cancel()
    return events


async def test_resumption_of_what_is_unknown_is_not_found() -> None:
    async with stage(_leader()) as running, connected(running) as stub:
        code, _, message = await refusal(resume(stub, nothing(), "never begun"))
        assert code == "NOT_FOUND" and "'never begun'" in message
        code, _, _ = await refusal(resume(stub, nothing(), ""))
        assert code == "INVALID_ARGUMENT"
        code, _, _ = await refusal(resume(stub, nothing(), "x" * 129))
        assert code == "INVALID_ARGUMENT"
        assert running.value("sluice_resumptions_total", cause="client") == 0


async def test_resumption_by_another_tenant_is_refused_and_changes_nothing(
    tmp_path: Path,
) -> None:
    auth = auth_config(tmp_path).model_dump()
    async with stage(_leader(), auth=auth) as running, connected(running) as stub:
        call = begin(stub, metadata=ALICE)
        received = await read(call, nothing(), 5)
        code, _, message = await refusal(resume(stub, received, metadata=BOB))
        assert code == "PERMISSION_DENIED" and "alice" not in message
        code, _, _ = await refusal(resume(stub, received))
        assert code == "UNAUTHENTICATED"
        _assert_unbroken(await read(call, received))


@pytest.mark.parametrize(
    ("after_seq", "tokens", "code"),
    [
        (10**6, [], "OUT_OF_RANGE"),
        (10**6, SCRIPT[:5], "OUT_OF_RANGE"),
        (5, SCRIPT + SCRIPT, "OUT_OF_RANGE"),
        (5, [64, 65, 99], "FAILED_PRECONDITION"),
        (None, [64], "FAILED_PRECONDITION"),
        (5, [10**9], "INVALID_ARGUMENT"),
    ],
)
async def test_position_that_cannot_be_is_refused_and_changes_nothing(
    after_seq: int | None, tokens: list[int], code: str
) -> None:
    async with stage(_leader()) as running, connected(running) as stub:
        call = begin(stub)
        received = await read(call, nothing(), 5)
        wrong = stub.Resume(
            pb.ResumeRequest(request_id="r", after_seq=after_seq, tokens_received=tokens)
        )
        assert (await refusal(wrong))[0] == code
        _assert_unbroken(await read(call, received))
        assert running.value("sluice_superseded_requests_total") == 0


class LateStore(EmbeddedStore):
    """Out of reach; then it answers, and takes no journals yet."""

    is_away = False
    takes_journals = True

    async def list_leases(self, kind: str) -> dict[str, bytes]:
        if self.is_away:
            raise UnavailableError("out of reach")
        return await super().list_leases(kind)

    async def write_journals(self, writes: Sequence[JournalWrite]) -> JournalWrites:
        if not self.takes_journals:
            raise UnavailableError("out of reach")
        return await super().write_journals(writes)


async def test_journal_that_the_store_could_not_take_yet_is_waited_for() -> None:
    store = LateStore(StoreConfig(), clock=WallClock())
    async with two_gateways(_leader(), store=store) as (first, second), connected(first) as stub:
        store.is_away, store.takes_journals = True, False
        received = await read(begin(stub, detach_s=30.0), nothing(), 12)
        await eventually(lambda: second.server._fleet.store_up_s < 1.0)
        store.is_away = False
        async with connected(second) as other:
            code, _, message = await refusal(resume(other, received))
            assert code == "UNAVAILABLE" and "did not answer a moment ago" in message
        async with AsyncClient(second.address) as client:
            later = asyncio.get_running_loop().call_later(
                0.3, setattr, store, "takes_journals", True
            )
            tokens = [
                token
                async for event in client.resume("r", resume_timeout_s=10.0)
                if isinstance(event, TextDelta)
                for token in event.token_ids
            ]
            assert later.when() < asyncio.get_running_loop().time(), "it had to ask again"
        assert tokens == SCRIPT[:40]


async def test_damaged_journal_is_not_found_and_its_content_not_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with stage(_leader()) as running, connected(running) as stub:
        entries = (seal(EntryKind.HEADER, 0, {"prompt": "a secret"}),)
        write = JournalWrite("r", "", "somebody", entries, begins=True)
        await running.store.write_journals([write])
        with caplog.at_level(logging.DEBUG):
            code, _, message = await refusal(resume(stub, nothing()))
        assert code == "NOT_FOUND" and "damaged" in message
        assert "journal of request 'r' is damaged" in caplog.text
        assert "a secret" not in caplog.text


class _LostStore(EmbeddedStore):
    """Can be lost for readers of journals."""

    def __init__(self) -> None:
        super().__init__(StoreConfig(), clock=WallClock())
        self.is_up = True

    async def read_journal(self, key: str) -> Journal | None:
        if not self.is_up:
            raise UnavailableError("redis://sluice@10.0.0.7:6379 does not answer")
        return await super().read_journal(key)


async def test_resumption_without_the_store_is_unavailable_and_names_no_host() -> None:
    store = _LostStore()
    async with stage(_leader(), store=store) as running, connected(running) as stub:
        call = begin(stub)
        received = await read(call, nothing(), 5)
        store.is_up = False
        code, _, message = await refusal(resume(stub, received))
        assert code == "UNAVAILABLE" and "10.0.0.7" not in message
        _assert_unbroken(await read(call, received))


async def test_request_that_replicas_died_of_fails_again_in_the_same_way() -> None:
    async with stage(_leader()) as running, connected(running) as stub:
        received = await read(begin(stub), nothing())
        assert received.finished is not None
        await running.server._journals.flush()
        journal = await running.store.read_journal("r")
        assert journal is not None
        end = seal(EntryKind.END, 1, -1, None, "INTERNAL: two replicas died of it")
        write = JournalWrite("died", "", "x", (journal.entries[0], end), begins=True, ends=True)
        await running.store.write_journals([write])
        code, reason, message = await refusal(resume(stub, nothing(), "died"))
        assert (code, reason) == ("INTERNAL", "POISONOUS_REQUEST")
        assert message == "two replicas died of it"


async def test_resumption_is_within_no_rate_limit_but_counts(tmp_path: Path) -> None:
    tenant = {
        "name": "alice",
        "key_sha256": [sha256(KEYS["alice"])],
        **{"max_streams": 1, "requests_per_minute": 1, "tokens_per_minute": 43},
    }
    auth = {"tenants_file": str(write_tenants(tmp_path, [tenant]))}
    async with two_gateways(_leader(), auth=auth) as (first, second), connected(first) as stub:
        received = await read(begin(stub, metadata=ALICE), nothing(), 5)
        async with connected(second) as other:
            await read(resume(other, received, metadata=ALICE), received)
            _assert_unbroken(received)
            code, reason, _ = await refusal(begin(other, "new", metadata=ALICE))
            assert (code, reason) == ("RESOURCE_EXHAUSTED", "RATE_LIMITED")


async def test_goodput_counts_no_request_twice() -> None:
    async with stage(_leader()) as running, connected(running) as stub, connected(running) as other:

        def counted() -> list[float]:
            return [running.value("sluice_goodput_total", met=met) for met in ("true", "false")]

        call = begin(stub, service_class=pb.SERVICE_CLASS_STANDARD)
        received = await read(call, nothing(), 5)
        await read(resume(other, received), received)
        await refusal(call)
        await eventually(lambda: _is_idle(running))
        assert counted() == [0, 0], "it did not end in the call that began it"
        call = begin(stub, "r2", service_class=pb.SERVICE_CLASS_STANDARD)
        received = await read(call, nothing(), 5)
        call.cancel()
        await eventually(lambda: _is_idle(running))
        await read(resume(other, received, "r2"), received)
        assert counted() == [0, 1], "it was counted when its client went"
        assert running.value("sluice_completion_tokens_total") == 80
