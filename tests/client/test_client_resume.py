"""Streams that go on by themselves, over real connections to scripted gateways."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from typing import Any

import grpc
import pytest

from cluster.client import AsyncClient, Client, Event, Finished, Resumed, Running
from cluster.errors import (
    RESUME_ELSEWHERE,
    CancelledError,
    FailedPreconditionError,
    NotFoundError,
    PermissionDeniedError,
    SluiceError,
    SupersededError,
    UnavailableError,
)
from tests.client.scripted_gateways import TEXT, TOKENS, Fate, gateways, text_of, tokens_of

pytestmark = pytest.mark.integration
NOBODY = "127.0.0.1:1"
ELSEWHERE = UnavailableError("drains", reason=RESUME_ELSEWHERE)
BOTH = pytest.mark.parametrize("is_async", [False, True], ids=["plain", "asyncio"])


def follow(
    addresses: Any, is_async: bool, method: str = "stream", *args: Any, **options: Any
) -> Any:
    """Return what a stream of either client yields, or a completion."""
    if not is_async:
        with Client(addresses) as client:
            answer = getattr(client, method)(*args, **options)
            return answer if method == "generate" else list(answer)

    async def collect() -> Any:
        async with AsyncClient(addresses) as client:
            answer = getattr(client, method)(*args, **options)
            if method == "generate":
                return await answer
            return [event async for event in answer]

    return asyncio.run(collect())


def check_whole(events: list[Event]) -> None:
    assert tokens_of(events) == TOKENS
    assert text_of(events) == TEXT
    assert isinstance(events[-1], Finished)


CUTS = {
    "no end": Fate(),
    "ours": Fate(error=UnavailableError("no replica")),
    "elsewhere": Fate(error=ELSEWHERE),
    "unavailable": Fate(code=grpc.StatusCode.UNAVAILABLE),
    "internal": Fate(code=grpc.StatusCode.INTERNAL),
    "unknown": Fate(code=grpc.StatusCode.UNKNOWN),
    "cancelled": Fate(code=grpc.StatusCode.CANCELLED),
    "gap": Fate(skips=1),
    "repetition": Fate(skips=-1),
    "server stops": Fate(is_stopped=True),
}


@BOTH
@pytest.mark.parametrize("end", CUTS.values(), ids=CUTS)
def test_stream_that_is_cut_goes_on_at_the_next_gateway(end: Fate, is_async: bool) -> None:
    with gateways(replace(end, num_events=5)) as (addresses, script):
        events = follow(addresses, is_async, "stream", "x", report_resumptions=True)
    check_whole(events)
    assert script.ways == [(0, "GenerateStream"), (1, "Resume")]
    first, second = (call.request for call in script.calls)
    assert second.request_id == first.request.request_id
    reports = [event for event in events if isinstance(event, Resumed)]
    assert [(report.address, report.num_resumptions) for report in reports] == [(addresses[1], 1)]
    assert 0 <= reports[0].gap_s < 5


@BOTH
def test_caller_sees_nothing_of_a_cut(is_async: bool) -> None:
    with gateways(Fate(4, ELSEWHERE), Fate(3, ELSEWHERE)) as (addresses, _):
        events = follow(addresses, is_async, "stream", "x")
        done = follow(addresses, is_async, "generate", "x", request_id="r7")
    check_whole(events)
    assert not any(isinstance(event, Resumed) for event in events)
    assert (done.request_id, done.text, done.token_ids) == ("r7", TEXT, TOKENS)
    assert done.finish_reason == "stop" and done.usage.cached_tokens == 1


@BOTH
def test_completion_is_whole_over_cuts(is_async: bool) -> None:
    with gateways(Fate(3), Fate(2), Fate(4)) as (addresses, script):
        done = follow(addresses, is_async, "generate", "x")
    assert (done.text, done.token_ids) == (TEXT, TOKENS)
    assert [method for _, method in script.ways] == ["GenerateStream"] + ["Resume"] * 3


@BOTH
def test_any_cut_points_give_the_uncut_stream(is_async: bool) -> None:
    for num_events in range(1, 16, 2):
        with gateways(Fate(num_events), Fate(2), Fate(3)) as (addresses, _):
            check_whole(follow(addresses, is_async, "stream", "x"))


@BOTH
def test_one_address_is_asked_again(is_async: bool) -> None:
    with gateways(Fate(5, ELSEWHERE), Fate(2), num_gateways=1) as (addresses, script):
        check_whole(follow(addresses[0], is_async, "stream", "x"))
    assert [gateway for gateway, _ in script.ways] == [0, 0, 0]


@BOTH
def test_gateway_that_is_not_there_is_passed_over(is_async: bool) -> None:
    with gateways() as (addresses, script):
        check_whole(follow([NOBODY, *addresses], is_async, "stream", "x", request_id="r7"))
        check_whole(follow([NOBODY, *addresses], is_async, "stream", "x"))
    # The journal is asked first where nobody else can have the id.
    assert [method for _, method in script.ways] == ["GenerateStream", "Resume", "GenerateStream"]


@BOTH
def test_nobody_anywhere_is_unavailable_at_once(is_async: bool) -> None:
    with pytest.raises(UnavailableError, match="connect"):
        follow([NOBODY, NOBODY], is_async, "stream", "x")


@BOTH
def test_resumption_can_be_turned_off(is_async: bool) -> None:
    with (
        gateways(Fate(5, ELSEWHERE)) as (addresses, script),
        pytest.raises(UnavailableError, match=r"^drains$") as caught,
    ):
        follow(addresses, is_async, "stream", "x", resume_timeout_s=0.0)
    assert caught.value.reason == RESUME_ELSEWHERE
    assert len(script.calls) == 1


@BOTH
@pytest.mark.parametrize("error", [SupersededError("elsewhere"), SluiceError("a defect")])
def test_error_for_good_is_raised(error: SluiceError, is_async: bool) -> None:
    with (
        gateways(Fate(5, error)) as (addresses, script),
        pytest.raises(type(error), match=str(error)),
    ):
        follow(addresses, is_async, "stream", "x")
    assert len(script.calls) == 1


@BOTH
def test_journal_that_is_gone_loses_no_more_than_the_status_says(is_async: bool) -> None:
    with gateways(Fate(2, is_journalled=False)) as (addresses, script):
        check_whole(follow(addresses, is_async, "stream", "x"))
    assert script.ways == [(0, "GenerateStream"), (1, "Resume"), (1, "GenerateStream")]
    with (
        gateways(Fate(3, is_journalled=False)) as (addresses, _),
        pytest.raises(UnavailableError, match="after 2 tokens and its journal is gone"),
    ):
        follow(addresses, is_async, "stream", "x")


@BOTH
def test_earlier_request_is_gone_on_with(is_async: bool) -> None:
    with gateways() as (addresses, script):
        follow(addresses, is_async, "stream", "x", request_id="r7", detach_on_disconnect_s=3.0)
        check_whole(follow(addresses, is_async, "resume", "r7"))
        rest = follow(addresses, is_async, "resume", "r7", 4, TOKENS[:3], detach_on_disconnect_s=2)
        assert tokens_of(rest) == TOKENS[3:] and isinstance(rest[0], Running)
        with pytest.raises(FailedPreconditionError):
            follow(addresses, is_async, "resume", "r7", 4, TOKENS[1:3])
        with pytest.raises(NotFoundError):
            follow(addresses, is_async, "resume", "r8")
        script.fates = [Fate(0, PermissionDeniedError("foreign"))]
        with pytest.raises(PermissionDeniedError):
            follow(addresses, is_async, "resume", "r7")
    begun, _, resumed = (call.request for call in script.calls[:3])
    assert begun.detach_on_disconnect_s == 3.0
    assert resumed.detach_on_disconnect_s == 2.0 and resumed.after_seq == 4


@BOTH
def test_credentials_go_with_every_call(is_async: bool) -> None:
    async def ask_async() -> None:
        async with AsyncClient(addresses, api_key="sk-a", metadata=[("x", "y")]) as client:
            check_whole([event async for event in client.stream("x")])

    with gateways(Fate(5)) as (addresses, script):
        if is_async:
            asyncio.run(ask_async())
        else:
            with Client(addresses, api_key="sk-a", metadata=[("x", "y")]) as client:
                check_whole(list(client.stream("x")))
    for call in script.calls:
        assert (call.details["authorization"], call.details["x"]) == ("Bearer sk-a", "y")


@BOTH
def test_queries_move_on_unless_they_may_have_changed_something(is_async: bool) -> None:
    async def ask(addresses: list[str], method: str, *args: Any) -> Any:
        async with AsyncClient(addresses) as client:
            return await getattr(client, method)(*args)

    def ask_plain(addresses: list[str], method: str, *args: Any) -> Any:
        with Client(addresses) as client:
            return getattr(client, method)(*args)

    def either(addresses: list[str], method: str, *args: Any) -> Any:
        if is_async:
            return asyncio.run(ask(addresses, method, *args))
        return ask_plain(addresses, method, *args)

    lost = Fate(code=grpc.StatusCode.UNAVAILABLE)
    with gateways(lost) as (addresses, script):
        assert either(addresses, "list_models") == []
        assert either([NOBODY, *addresses], "drain_replica", "r") == 3
        script.fates = [lost]
        with pytest.raises(UnavailableError, match="Stream removed"):
            either(addresses, "drain_replica", "r")
        script.fates = [lost, lost]
        with pytest.raises(UnavailableError, match="Stream removed"):
            either(addresses, "list_models")
        script.fates = [Fate(error=NotFoundError("no such replica"))]
        with pytest.raises(NotFoundError):
            either(addresses, "drain_replica", "r")
        script.fates = [Fate(error=PermissionDeniedError("no"))]
        with pytest.raises(PermissionDeniedError):
            either(addresses, "list_models")
    assert [gateway for gateway, _ in script.ways] == [0, 1, 0, 0, 0, 1, 0, 0]


def test_gateway_that_answered_is_asked_first() -> None:
    with gateways() as (addresses, script), Client([NOBODY, *addresses]) as client:
        client.list_models()
        client.list_models()
        check_whole(list(client.stream("x")))
    assert script.ways == [(0, "ListModels"), (0, "ListModels"), (0, "GenerateStream")]


def test_closed_client_waits_for_no_gateway() -> None:
    with gateways(Fate(4)) as (addresses, script):
        client = Client([addresses[0], NOBODY])
        events = client.stream("x")
        assert next(events)
        script.fates = [Fate(0, UnavailableError("away"))] * 99
        threading.Timer(0.3, client.close).start()
        with pytest.raises((UnavailableError, CancelledError)):
            list(events)
        with pytest.raises(CancelledError, match="the client is closed"):
            client.list_models()


async def test_cancelled_task_does_not_resume() -> None:
    with gateways(Fate(4)) as (addresses, script):
        script.fates += [Fate(0, UnavailableError("away"))] * 99
        async with AsyncClient(addresses) as client:
            task = asyncio.create_task(client.generate("x"))
            while len(script.calls) < 3:  # noqa: ASYNC110 - it watches another thread
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
