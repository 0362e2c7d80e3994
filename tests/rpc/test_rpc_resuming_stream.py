"""When a stream goes on, where, and from where; without a network, in virtual time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import (
    RESUME_ELSEWHERE,
    CancelledError,
    ConfigError,
    DeadlineError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    OutOfRangeError,
    OverloadedError,
    PermissionDeniedError,
    SluiceError,
    SupersededError,
    UnavailableError,
)
from cluster.rpc.addresses import Addresses
from cluster.rpc.failure import CallFailure
from cluster.rpc.public import Event, Finished, Resumed, Running
from cluster.rpc.resuming_stream import MAX_BACKOFF_S, ResumingStream, StreamCall
from cluster.rpc.stream_query import StreamQuery, begin_stream, resume_stream
from tests.client.scripted_gateways import NUM_TOKENS, TEXT, TOKENS, events_from, text_of, tokens_of

CUT = CallFailure(UnavailableError("Socket closed"), code="UNAVAILABLE")
STEP_S = 0.01  # between events


def ours(error: SluiceError, retry_after_s: float = 0.0) -> CallFailure:
    return CallFailure(error, code=error.code, is_ours=True, retry_after_s=retry_after_s)


ELSEWHERE = ours(UnavailableError("drains", reason=RESUME_ELSEWHERE))
UNKNOWN = ours(NotFoundError("unknown"))


class _RandomAtMost(random.Random):
    """Draws the upper bound."""

    def uniform(self, a: float, b: float) -> float:
        return b


@dataclass
class Drive:
    """A client whose calls end as they are told to, and what it did."""

    query: StreamQuery
    ends: list[tuple[int, CallFailure | None]]  # of each call: events before, and the failure
    num_addresses: int = 2
    chunks: Sequence[int] = (1,)  # tokens per delta, of each call in turn
    now_s: float = 1000.0
    events: list[Event] = field(default_factory=list)
    calls: list[StreamCall] = field(default_factory=list)
    delays_s: list[float] = field(default_factory=list)
    is_reached: bool = True

    @property
    def ways(self) -> list[tuple[int, str]]:
        return [(call.index, call.method) for call in self.calls]

    def run(self, rng: random.Random | None = None) -> Drive:
        addresses = Addresses([f"g{index}:1" for index in range(self.num_addresses)])
        addresses.is_reached = self.is_reached
        stream = ResumingStream(self.query, addresses, rng or _RandomAtMost(), self.now_s)
        while not stream.is_finished:
            try:
                self._call(stream)
            except CallFailure as failure:
                self.delays_s.append(stream.broken(failure, self.now_s))
                self.now_s += self.delays_s[-1]
        return self

    def _call(self, stream: ResumingStream) -> None:
        call = stream.next_call(self.now_s)
        assert call.timeout_s == pytest.approx(self.query.timeout_s - (self.now_s - 1000.0))
        self.calls.append(call)
        num_events, failure = self.ends.pop(0) if self.ends else (99, None)
        request: Any = call.request
        next_seq, num_received = 0, 0
        if call.method == "Resume":
            next_seq = request.after_seq + 1 if request.HasField("after_seq") else 0
            num_received = len(request.tokens_received)
            assert tuple(request.tokens_received) == TOKENS[:num_received]
        chunk = self.chunks[(len(self.calls) - 1) % len(self.chunks)]
        for message in list(events_from(next_seq, num_received, chunk))[:num_events]:
            self.now_s += STEP_S
            self.events += stream.read(message, self.now_s)
        if failure is not None:
            raise failure
        stream.check_end()


def begin(**options: Any) -> StreamQuery:
    return begin_stream("x", None, **options)


cuts = st.lists(
    st.tuples(
        st.integers(0, NUM_TOKENS + 4),
        st.sampled_from(
            [
                CUT,
                None,  # ends without an error
                ELSEWHERE,
                CallFailure(SluiceError("reset"), code="INTERNAL"),
                CallFailure(CancelledError("reset"), code="CANCELLED"),
                CallFailure(SluiceError("reset"), code="UNKNOWN"),
            ]
        ),
    ),
    max_size=8,
)


@given(
    ends=cuts,
    num_addresses=st.integers(1, 3),
    chunks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    is_id_given=st.booleans(),
    seed=st.integers(0, 99),
)
def test_stream_that_is_cut_anywhere_is_that_of_an_uncut_one(
    ends: list[Any], num_addresses: int, chunks: list[int], is_id_given: bool, seed: int
) -> None:
    query = begin(request_id="own" if is_id_given else "")
    drive = Drive(query, list(ends), num_addresses, chunks)
    drive.run(random.Random(seed))
    assert tokens_of(drive.events) == TOKENS
    assert text_of(drive.events) == TEXT
    assert [isinstance(event, Finished) for event in drive.events].count(True) == 1
    assert isinstance(drive.events[-1], Finished)
    assert all(0 <= delay_s <= MAX_BACKOFF_S for delay_s in drive.delays_s)


def test_resume_goes_on_behind_the_last_event_at_the_next_address() -> None:
    drive = Drive(begin(), [(5, CUT), (3, CUT)], num_addresses=3).run()
    assert drive.ways == [(0, "GenerateStream"), (1, "Resume"), (2, "Resume")]
    first, second = (call.request for call in drive.calls[1:])
    assert (first.after_seq, list(first.tokens_received)) == (4, list(TOKENS[:3]))
    assert (second.after_seq, list(second.tokens_received)) == (7, list(TOKENS[:5]))


def test_without_a_token_all_events_are_asked_for() -> None:
    drive = Drive(begin(), [(2, CUT)]).run()
    resume: Any = drive.calls[1].request
    assert drive.ways[1] == (1, "Resume")
    assert not resume.HasField("after_seq") and not resume.tokens_received
    assert tokens_of(drive.events) == TOKENS


def test_id_of_the_callers_own_is_asked_anew_until_a_token_has_come() -> None:
    drive = Drive(begin(request_id="r7"), [(2, CUT), (4, CUT)]).run()
    assert drive.ways == [(0, "GenerateStream"), (1, "GenerateStream"), (0, "Resume")]
    assert tokens_of(drive.events) == TOKENS


def test_request_that_still_runs_is_resumed_where_it_runs() -> None:
    runs = ours(InvalidArgumentError("has not ended", field="request_id"))
    drive = Drive(begin(request_id="r7"), [(1, CUT), (0, runs)]).run()
    assert drive.ways == [(0, "GenerateStream"), (1, "GenerateStream"), (1, "Resume")]
    drive = Drive(begin(request_id="r7"), [(1, CUT), (0, runs), (0, CUT)]).run()
    assert drive.ways[2:] == [(1, "Resume"), (0, "Resume")]
    with pytest.raises(InvalidArgumentError):  # the first time it is the caller's mistake
        Drive(begin(request_id="r7"), [(0, runs)]).run()


def test_request_that_runs_and_is_unknown_ends() -> None:
    runs = ours(InvalidArgumentError("has not ended", field="request_id"))
    ends: list[Any] = [(1, CUT), (0, runs), (0, UNKNOWN), (0, runs)]
    with pytest.raises(InvalidArgumentError):
        Drive(begin(request_id="r7"), ends).run()


def test_unknown_request_without_a_token_is_asked_anew_where_somebody_answers() -> None:
    drive = Drive(begin(), [(2, CUT), (0, UNKNOWN)]).run()
    assert drive.ways == [(0, "GenerateStream"), (1, "Resume"), (1, "GenerateStream")]
    assert drive.calls[2].request == drive.calls[0].request
    assert drive.delays_s[1] == 0.0


def test_unknown_request_with_tokens_says_how_many_came() -> None:
    drive = Drive(begin(), [(5, CUT), (0, UNKNOWN)])
    with pytest.raises(UnavailableError, match="cut off after 3 tokens and its journal is gone"):
        drive.run()


def test_pauses_grow_with_full_jitter_until_a_token_comes() -> None:
    drive = Drive(begin(), [(0, CUT)] * 8 + [(3, CUT), (0, CUT)]).run()
    assert drive.delays_s == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 0.05, 0.1]


def test_stream_is_given_up_when_nothing_goes_on_in_time() -> None:
    drive = Drive(begin(resume_timeout_s=5.0), [(5, CUT)] + [(0, CUT)] * 99)
    with pytest.raises(UnavailableError, match=r"after 3 tokens .* resume_timeout_s=5: Socket"):
        drive.run()
    assert 3.0 < drive.now_s - 1000.0 <= 5.1


def test_waiting_long_before_the_cut_does_not_count() -> None:
    query = begin(resume_timeout_s=5.0)
    stream = ResumingStream(query, Addresses(["g0:1"]), random.Random(0), 1000.0)
    stream.next_call(1000.0)
    assert stream.broken(CUT, 1400.0) < 0.1  # a prompt of 400 s


def test_place_in_a_queue_is_no_progress() -> None:
    drive = Drive(begin(resume_timeout_s=5.0), [(1, CUT)] * 99)
    with pytest.raises(UnavailableError, match=r"did not go on .*Socket closed"):
        drive.run()


def test_failure_that_the_journal_repeats_is_the_end() -> None:
    no_replica, no_store = (ours(UnavailableError(text)) for text in ("no replica", "no store"))
    drive = Drive(begin(), [(5, no_replica), (0, CUT), (0, no_replica)])
    with pytest.raises(UnavailableError, match=r"^no replica$"):
        drive.run()
    assert len(drive.calls) == 3
    ends: list[Any] = [(5, CUT), (0, no_store), (0, no_store), (3, ELSEWHERE), (0, ELSEWHERE)]
    assert tokens_of(Drive(begin(), ends).run().events) == TOKENS


@pytest.mark.parametrize("num_events", [1, 2, 6])
def test_failure_behind_an_event_is_none_of_the_journals(num_events: int) -> None:
    """A request that queues in vain at one gateway after the other gets the same words of each."""
    no_replica = ours(UnavailableError("no replica was ready: try again later"))
    drive = Drive(begin(), [(num_events, no_replica)] * 4).run()
    assert tokens_of(drive.events) == TOKENS and len(drive.calls) > 2


def test_failure_before_tokens_came_is_not_what_a_journal_repeats_behind_them() -> None:
    full = ours(UnavailableError("full"))
    drive = Drive(begin(), [(5, full), (5, CUT), (0, full)]).run()
    assert tokens_of(drive.events) == TOKENS


def test_resumption_can_be_turned_off() -> None:
    drive = Drive(begin(resume_timeout_s=0.0), [(5, CUT)])
    with pytest.raises(UnavailableError, match=r"^Socket closed$"):
        drive.run()
    assert len(drive.calls) == 1


def test_deadline_of_the_caller_ends_it() -> None:
    drive = Drive(begin(timeout_s=1.0), [(5, CUT)] + [(0, CUT)] * 99)
    with pytest.raises(DeadlineError, match=r"timeout_s=1: the stream was cut off after 3 tokens"):
        drive.run()
    assert drive.now_s < 1001.0


def test_gateway_that_sends_on_is_left_at_once_and_asked_last() -> None:
    ends: list[Any] = [(5, ELSEWHERE), (0, CUT), (0, CUT)]
    drive = Drive(begin(), ends, num_addresses=3).run()
    assert [index for index, _ in drive.ways] == [0, 1, 2, 0]
    assert drive.delays_s[0] == 0.0 and all(drive.delays_s[1:])


def test_gateways_that_all_send_on_are_not_asked_in_a_tight_loop() -> None:
    drive = Drive(begin(), [(5, ELSEWHERE)] + [(0, ELSEWHERE)] * 4).run()
    assert drive.delays_s[:2] == [0.0, 0.0]
    assert all(drive.delays_s[2:])


def test_gateway_says_when_to_come_back() -> None:
    full = ours(OverloadedError("full", retry_after_s=3.0), retry_after_s=3.0)
    drive = Drive(begin(), [(5, CUT), (0, full)]).run()
    assert drive.delays_s == [0.05, 3.0]
    with pytest.raises(OverloadedError):  # it was never begun
        Drive(begin(), [(0, full)]).run()
    with pytest.raises(UnavailableError, match="resume_timeout_s=2: full"):
        Drive(begin(resume_timeout_s=2.0), [(5, CUT), (0, full)]).run()


@pytest.mark.parametrize(
    "error",
    [
        SupersededError("elsewhere"),
        SluiceError("INTERNAL: a defect"),
        CancelledError("by an operator"),
        FailedPreconditionError("contradicts"),
        OutOfRangeError("ahead"),
        PermissionDeniedError("foreign"),
        DeadlineError("late"),
    ],
    ids=lambda error: error.code,
)
def test_what_a_gateway_says_for_good_is_the_end(error: SluiceError) -> None:
    for ends in ([(5, ours(error))], [(5, CUT), (0, ours(error))]):
        with pytest.raises(type(error)) as caught:
            Drive(begin(), list(ends)).run()
        assert caught.value is error


def test_what_came_on_the_way_and_is_no_cut_is_the_end() -> None:
    with pytest.raises(OverloadedError):
        Drive(begin(), [(5, CallFailure(OverloadedError("big"), code="RESOURCE_EXHAUSTED"))]).run()


def test_gateway_that_cannot_resume_leaves_the_first_error() -> None:
    no_method = CallFailure(SluiceError("UNIMPLEMENTED: what"), code="UNIMPLEMENTED")
    with pytest.raises(UnavailableError, match="Socket closed"):
        Drive(begin(), [(5, CUT), (0, no_method)]).run()


def test_client_that_never_reached_anybody_gives_up_soon() -> None:
    drive = Drive(begin(), [(0, CUT)] * 99, num_addresses=2, is_reached=False)
    with pytest.raises(UnavailableError, match=r"^Socket closed$"):
        drive.run()
    assert [index for index, _ in drive.ways] == [0, 1, 0, 1]
    Drive(begin(), [(0, CUT)] * 9, is_reached=True).run()


def test_resumption_is_reported_where_asked_for() -> None:
    query = begin(report_resumptions=True)
    drive = Drive(query, [(5, CUT), (0, CUT), (2, CUT)]).run()
    reports = [event for event in drive.events if isinstance(event, Resumed)]
    assert [(report.address, report.num_resumptions) for report in reports] == [
        ("g0:1", 1),
        ("g1:1", 2),
    ]
    assert reports[0].gap_s == pytest.approx(0.05 + 0.1 + STEP_S)
    assert isinstance(drive.events[drive.events.index(reports[0]) + 1], Running)
    quiet = Drive(begin(), [(5, CUT)]).run()
    assert not any(isinstance(event, Resumed) for event in quiet.events)


def _disordered(num_times: int, seq_shift: int) -> ResumingStream:
    """Return a stream after so many calls with a wrong event, each resumed."""
    stream = ResumingStream(begin(), Addresses(["g0:1", "g1:1"]), random.Random(0), 0.0)
    for _ in range(num_times):
        stream.next_call(0.0)
        first, second, third = list(events_from(0, 0, 1))[:3]
        third.seq += seq_shift
        stream.read(first, 0.0)
        stream.read(second, 0.0)
        try:
            stream.read(third, 0.0)
        except CallFailure as failure:
            stream.broken(failure, 0.0)
    return stream


@pytest.mark.parametrize(("seq_shift", "message"), [(1, "event 2 was lost"), (-1, "event 1 came")])
def test_gap_or_repetition_is_resumed_once(seq_shift: int, message: str) -> None:
    assert not _disordered(1, seq_shift).is_finished
    with pytest.raises(UnavailableError, match=message):
        _disordered(2, seq_shift)


@pytest.mark.parametrize("failure", [CUT, ours(DeadlineError("late"))])
def test_failure_behind_the_last_event_changes_nothing(failure: CallFailure) -> None:
    drive = Drive(begin(), [(99, failure)]).run()
    assert len(drive.calls) == 1 and isinstance(drive.events[-1], Finished)
    assert drive.delays_s == [0.0]


def test_end_without_the_last_event_is_a_cut() -> None:
    drive = Drive(begin(), [(5, None)]).run()
    assert drive.ways == [(0, "GenerateStream"), (1, "Resume")]
    assert drive.delays_s == [0.05]
    with pytest.raises(UnavailableError, match="cut off after 5 events"):
        Drive(begin(resume_timeout_s=0.0), [(5, None)]).run()


def test_time_without_progress_counts_anew_after_each_cut() -> None:
    drive = Drive(begin(resume_timeout_s=0.2), [(3, CUT)] * 5).run()
    assert drive.now_s - 1000.0 > 0.4
    assert tokens_of(drive.events) == TOKENS


def test_resume_of_an_earlier_request_goes_on_from_its_position() -> None:
    query = resume_stream("r7", 4, TOKENS[:3], detach_on_disconnect_s=2.0)
    drive = Drive(query, [(3, CUT)]).run()
    first, second = (call.request for call in drive.calls)
    assert (first.request_id, first.after_seq, first.detach_on_disconnect_s) == ("r7", 4, 2.0)
    assert list(first.tokens_received) == list(TOKENS[:3])
    assert (second.after_seq, list(second.tokens_received)) == (7, list(TOKENS[:5]))
    assert tokens_of(drive.events) == TOKENS[3:]


def test_resume_with_a_position_alone_never_says_some_of_the_tokens() -> None:
    query = resume_stream("r7", 4, ())
    stream = ResumingStream(query, Addresses("g0:1"), random.Random(0), 0.0)
    stream.next_call(0.0)
    for message in list(events_from(5, 3, 1))[:3]:
        stream.read(message, 0.0)
    stream.broken(CUT, 0.0)
    request: Any = stream.next_call(0.0).request
    assert request.after_seq == 7 and not request.tokens_received


def test_resume_of_an_unknown_request_says_so() -> None:
    with pytest.raises(NotFoundError):
        Drive(resume_stream("r7", None, ()), [(0, UNKNOWN)]).run()
    with pytest.raises(UnavailableError, match="cut off after 1 tokens and its journal is gone"):
        Drive(resume_stream("r7", None, ()), [(3, CUT), (0, UNKNOWN)]).run()


@pytest.mark.parametrize(
    ("make", "field_name"),
    [
        (lambda: begin(resume_timeout_s=-1.0), "resume_timeout_s"),
        (lambda: begin(resume_timeout_s=float("nan")), "resume_timeout_s"),
        (lambda: begin(detach_on_disconnect_s=float("inf")), "detach_on_disconnect_s"),
        (lambda: resume_stream("\ud800", None, ()), "request_id"),
        (lambda: resume_stream("r", -1, ()), "after_seq"),
        (lambda: resume_stream("r", 2**64 - 1, ()), "after_seq"),
        (lambda: resume_stream("r", None, (1,)), "after_seq"),
        (lambda: resume_stream("r", 1, (3, -1)), "tokens_received"),
        (lambda: resume_stream("r", 1, (2**32,)), "tokens_received"),
        (lambda: Addresses([]), "address"),
        (lambda: Addresses(["a:1", ""]), "address"),
    ],
)
def test_what_cannot_be_asked_is_refused_here(make: Any, field_name: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        make()
    assert caught.value.field == field_name
    assert isinstance(caught.value, ConfigError) == (field_name == "address")


def test_every_made_up_id_is_new() -> None:
    first, second = begin(), begin()
    assert first.request_id and first.request_id != second.request_id
    assert first.has_unique_id and not begin(request_id="r").has_unique_id
