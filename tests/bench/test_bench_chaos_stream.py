"""One client of `sluice bench chaos`: it stays, or goes away and comes back as another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from cluster.bench import chaos_stream
from cluster.bench.chaos_checker import Seen
from cluster.bench.chaos_requests import Ask, Manner, Visit
from cluster.bench.chaos_stream import Record, Visitor
from cluster.client import Event, Finished, Resumed, Running, TextDelta, Timings, Usage
from cluster.clock import VirtualClock
from cluster.errors import SluiceError, UnavailableError
from cluster.types import FinishReason, SamplingParams


class ScriptedClient:
    """Yields what it is told to, first for `stream`, then for `resume`."""

    calls: list[tuple[str, dict[str, Any]]]
    scripts: list[list[Event | SluiceError]]
    num_closed = 0

    def __init__(self, addresses: Sequence[str]) -> None:
        self.addresses = addresses

    async def __aenter__(self) -> ScriptedClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        pass

    def stream(self, **options: Any) -> AsyncIterator[Event]:
        return self._play("stream", options | {"addresses": self.addresses})

    def resume(self, request_id: str, **options: Any) -> AsyncIterator[Event]:
        named = {"request_id": request_id, "addresses": self.addresses}
        return self._play("resume", options | named)

    async def _play(self, method: str, options: dict[str, Any]) -> AsyncIterator[Event]:
        ScriptedClient.calls.append((method, options))
        try:
            for event in ScriptedClient.scripts.pop(0):
                if isinstance(event, SluiceError):
                    raise event
                yield event
        finally:
            ScriptedClient.num_closed += 1


END = Finished(FinishReason.LENGTH, Usage(5, 3, 0), Timings(0.0, 0.0, 0.0))


def delta(token_id: int) -> TextDelta:
    return TextDelta(f"t{token_id}", (token_id,))


def visited(
    monkeypatch: pytest.MonkeyPatch, visit: Visit, *scripts: list[Event | SluiceError]
) -> Record:
    monkeypatch.setattr(chaos_stream, "AsyncClient", ScriptedClient)
    ScriptedClient.calls, ScriptedClient.scripts = [], list(scripts)
    ScriptedClient.num_closed = 0
    ask = Ask("greedy", (1, 2, 3, 4, 5), SamplingParams())
    clock = VirtualClock()

    def now() -> float:
        clock.advance(0.5)
        return clock.now()

    return asyncio.run(Visitor(["a:1", "b:2"], [ask], now).visit(visit))


def test_client_that_stays_takes_all_and_notes_when_it_went_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script: list[Event | SluiceError] = [
        Running("r1"),
        delta(1),
        Resumed(0.7, "b:2", 1),
        Running("r2"),
        delta(2),
        END,
    ]
    record = visited(monkeypatch, Visit(0), script)
    assert (record.seen.token_ids, record.seen.text) == ([1, 2], "t1t2")
    assert (record.seen.finish_reason, record.seen.num_prompt_tokens) == ("length", 5)
    assert [name for _, name in record.trace.replicas] == ["r1", "r2"]
    ((begin_s, end_s),) = record.trace.resumptions
    assert end_s - begin_s == pytest.approx(0.7) and len(record.trace.stretches[0]) == 3
    ((method, options),) = ScriptedClient.calls
    assert method == "stream" and options["report_resumptions"] and options["request_id"] == ""
    assert options["detach_on_disconnect_s"] == 0.0 and ScriptedClient.num_closed == 1


def test_client_that_leaves_comes_back_as_another_one_with_what_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    visit = Visit(0, Manner.DETACHES, num_tokens=2)
    record = visited(
        monkeypatch, visit, [Running("r1"), delta(1), delta(2), delta(3)], [delta(3), END]
    )
    assert record.seen.token_ids == [1, 2, 3] and record.seen.finish_reason == "length"
    assert record.forgotten is None
    (_, begun), (method, gone_on) = ScriptedClient.calls
    assert begun["detach_on_disconnect_s"] > 0 and begun["request_id"] == record.request_id
    assert method == "resume" and gone_on["request_id"] == record.request_id
    assert (gone_on["after_seq"], gone_on["tokens_received"]) == (2, (1, 2))
    assert gone_on["addresses"] != begun["addresses"], "another gateway first"
    assert [len(stretch) for stretch in record.trace.stretches] == [2, 2]
    assert ScriptedClient.num_closed == 2


def test_client_without_a_memory_gets_all_of_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    visit = Visit(0, Manner.LEAVES, num_tokens=1, has_memory=False)
    record = visited(monkeypatch, visit, [Running("r1"), delta(1)], [delta(1), delta(2), END])
    assert record.seen.token_ids == [1, 2]
    assert record.forgotten == Seen([1], "t1")
    assert ScriptedClient.calls[1][1]["after_seq"] is None
    assert ScriptedClient.calls[1][1]["tokens_received"] == ()


def test_client_that_leaves_stays_where_the_answer_is_shorter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = visited(monkeypatch, Visit(0, Manner.LEAVES, num_tokens=9), [delta(1), END])
    assert record.seen.finish_reason == "length" and len(ScriptedClient.calls) == 1


def test_error_of_a_stream_is_kept_beside_what_came(monkeypatch: pytest.MonkeyPatch) -> None:
    record = visited(monkeypatch, Visit(0), [delta(1), UnavailableError("gone")])
    assert record.seen.token_ids == [1] and isinstance(record.seen.error, UnavailableError)
    assert record.trace.end_s > record.trace.begin_s
