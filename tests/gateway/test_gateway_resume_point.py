"""Where a stream goes on: every position and every list of tokens that a client may send."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from journal_fakes import header, tokens

from cluster.errors import FailedPreconditionError, OutOfRangeError, SluiceError
from cluster.gateway.journal_record import JournalState
from cluster.gateway.resume_point import MAX_EVENTS_AHEAD, ResumePoint, resume_point
from cluster.types import FinishReason

# Events 0 (queued), 1 (running), 2 (one token), 3 (two), 4 (text only), 5 (one).
STATE = JournalState(
    header(max_tokens=8),
    tokens=tuple(tokens(10, 11, 12, 13)),
    marks=((0, 0), (1, 0), (2, 1), (3, 3), (4, 3), (5, 4)),
    last_seq=5,
)
FINISHED = replace(STATE, marks=(*STATE.marks, (6, 4)), last_seq=6, finish_reason=FinishReason.STOP)
FAILED = replace(STATE, error="INTERNAL: broken")
NEW = JournalState(header(max_tokens=8))


@pytest.mark.parametrize(
    ("after_seq", "num_received"), [(0, 0), (1, 0), (2, 1), (3, 3), (4, 3), (5, 4)]
)
def test_position_alone_tells_the_tokens(after_seq: int, num_received: int) -> None:
    for state in (STATE, FINISHED, FAILED):
        point = resume_point(state, after_seq, ())
        assert point == ResumePoint(num_received, after_seq + 1, STATE.tokens)


def test_client_without_anything_gets_all() -> None:
    assert resume_point(STATE, None, ()) == ResumePoint(0, 0, STATE.tokens)
    assert resume_point(NEW, None, ()) == ResumePoint(0, 0, ())


@pytest.mark.parametrize(
    ("after_seq", "received"),
    [
        (2, [10]),
        (3, [10, 11, 12]),
        (5, [10, 11, 12, 13]),
        (6, [10, 11, 12, 13, 14]),
        (70, [10, 11, 12, 13, 14]),  # one token and 64 events ahead
        (21, [10, 11, 12, 13]),
        # An earlier call has repeated tokens in fewer events than the journal knows of.
        (3, [10, 11, 12, 13]),
        (3, [10, 11, 12, 13, 14]),
    ],
)
def test_tokens_that_agree_are_taken(after_seq: int, received: list[int]) -> None:
    point = resume_point(STATE, after_seq, received)
    assert (point.num_received, point.next_seq) == (len(received), after_seq + 1)
    known = [token.token_id for token in point.tokens]
    assert known == [10, 11, 12, 13, *received[4:]]


@pytest.mark.parametrize(
    ("state", "after_seq", "received", "error", "text"),
    [
        (STATE, None, [10], FailedPreconditionError, "tokens_received has 1 tokens and after_seq"),
        (STATE, 6, [], OutOfRangeError, "after_seq=6 .* up to 5 .*: send tokens_received"),
        (NEW, 0, [], OutOfRangeError, "after_seq=0 .* up to -1 .*: send tokens_received"),
        (FINISHED, 7, [], OutOfRangeError, "after_seq=7 .* up to 6"),
        (FAILED, 6, [], OutOfRangeError, "after_seq=6"),
        (STATE, 5, [10, 99], FailedPreconditionError, r"tokens_received\[1\]=99, .* 11 there"),
        (STATE, 5, [99] * 4, FailedPreconditionError, r"tokens_received\[0\]=99"),
        (STATE, 5, list(range(10, 19)), OutOfRangeError, r"9 tokens, limit=8 \(max_tokens\)"),
        (FINISHED, 5, [10, 11, 12, 13, 14], OutOfRangeError, r"5 tokens, limit=4 \(the whole"),
        (FAILED, 5, [10, 11, 12, 13, 14], OutOfRangeError, r"5 tokens, limit=4 \(the whole"),
        (STATE, 70, [10, 11, 12, 13], OutOfRangeError, r"after_seq=70, limit=69 .* is 5\)"),
        (STATE, 71, [10, 11, 12, 13, 14], OutOfRangeError, "after_seq=71, limit=70"),
        (STATE, 2**64 - 1, [10], OutOfRangeError, "limit=69"),
        (FINISHED, 7, [10, 11, 12, 13], OutOfRangeError, "after_seq=7, limit=6"),
        (FAILED, 6, [10, 11, 12, 13], OutOfRangeError, "after_seq=6, limit=5"),
        (STATE, 3, [10], FailedPreconditionError, "1 tokens, with event after_seq=3 there were 3"),
        (STATE, 4, [10, 11], FailedPreconditionError, "with event after_seq=4 there were 3"),
        (STATE, 9, [10, 11], FailedPreconditionError, "with event after_seq=9 there were 4"),
    ],
)
def test_contradiction_is_refused(
    state: JournalState, after_seq: Any, received: Any, error: type[SluiceError], text: str
) -> None:
    with pytest.raises(error, match=text):
        resume_point(state, after_seq, received)


def test_event_between_those_of_two_calls_needs_tokens() -> None:
    """What the client had with it is not known: guessing would repeat or skip tokens."""
    gap = replace(STATE, marks=((0, 0), (1, 0), (5, 4)))
    with pytest.raises(OutOfRangeError, match=r"after_seq=3 .*: send tokens_received"):
        resume_point(gap, 3, ())
    assert resume_point(gap, 3, [10, 11]).num_received == 2


@given(data=st.data())
def test_history_decides_exactly(data: st.DataObject) -> None:
    """An answer, a journal that has seen the first part of it, and a client of any kind."""
    nums = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=12), "tokens per event")
    answer = [1000 + index for index in range(sum(nums))]
    marks = [(seq, sum(nums[: seq + 1])) for seq in range(len(nums))]
    num_journalled = data.draw(st.integers(0, len(marks)), "events journalled")
    known = marks[:num_journalled]
    num_known = known[-1][1] if known else 0
    is_ended = num_journalled == len(marks) and data.draw(st.booleans(), "ended")
    state = JournalState(
        header(max_tokens=max(1, len(answer))),
        tokens=tuple(tokens(*answer[:num_known])),
        marks=tuple(known),
        last_seq=num_journalled - 1,
        finish_reason=FinishReason.LENGTH if is_ended else None,
    )
    after_seq = data.draw(st.none() | st.integers(0, len(nums) + 18), "after_seq")
    received = answer[: data.draw(st.integers(0, len(answer)), "received")]
    if received and data.draw(st.booleans(), "wrong"):
        received[data.draw(st.integers(0, len(received) - 1), "at")] = 7
    num_at = max(
        (num for seq, num in known if after_seq is not None and seq <= after_seq), default=0
    )
    num_ahead = max(0, len(received) - num_known)
    if after_seq is None:
        is_consistent, num_received = not received, 0
    elif not received:
        is_consistent, num_received = after_seq < num_journalled, num_at
    else:
        num_received = len(received)
        num_more = 0 if is_ended else num_ahead + MAX_EVENTS_AHEAD
        is_consistent = (
            7 not in received[:num_known]
            and num_received >= num_at
            and after_seq <= state.last_seq + num_more
            and not (is_ended and num_ahead)
        )
    try:
        point = resume_point(state, after_seq, received)
    except (OutOfRangeError, FailedPreconditionError):
        assert not is_consistent
        return
    assert is_consistent
    assert point.next_seq == (0 if after_seq is None else after_seq + 1)
    lacking = [token.token_id for token in point.tokens[point.num_received :]]
    assert point.num_received == num_received
    assert lacking == answer[num_received:num_known], "what the client lacks"


@given(data=st.data())
def test_honest_client_always_goes_on(data: st.DataObject) -> None:
    """Whatever the journal lags behind by, within its bound, and however far the client has got."""
    nums = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=40), "tokens per event")
    num_waits = data.draw(st.integers(0, MAX_EVENTS_AHEAD), "events before the first token")
    nums = [0] * num_waits + nums
    answer = list(range(sum(nums)))
    marks = [(seq, sum(nums[: seq + 1])) for seq in range(len(nums))]
    known = marks[: data.draw(st.integers(0, len(marks)), "events journalled")]
    num_known = known[-1][1] if known else 0
    state = JournalState(
        header(max_tokens=len(answer)),
        tokens=tuple(tokens(*answer[:num_known])),
        marks=tuple(known),
        last_seq=len(known) - 1,
    )
    seq, num = data.draw(st.sampled_from(marks), "the client's last event")
    if not num:
        return  # such a client has nothing, and says so
    point = resume_point(state, seq, answer[:num])
    assert point.num_received == num
    assert [token.token_id for token in point.tokens] == answer[: max(num, num_known)]
