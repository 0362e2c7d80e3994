"""Where a stream goes on, from what its journal and its client know: a pure decision.

    journal    t0 t1 t2 t3 t4            written a fraction of a second behind the stream
    client     t0 t1 t2 t3 t4 t5 t6      ahead of it
               t0 t1                     or behind, what followed was lost on its way

The tokens of both must agree as far as both have them; the longer one counts.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.errors import FailedPreconditionError, OutOfRangeError
from cluster.gateway.journal_record import JournalState
from cluster.types import SampledToken

MAX_EVENTS_AHEAD = 64
"""Events without a token that a client may have and its journal not: places in a queue, mostly."""


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """What the client has, and what is known."""

    num_received: int  # tokens that the client has
    next_seq: int  # of the next event
    tokens: tuple[SampledToken, ...] = field(repr=False)  # the client's and those behind them


def resume_point(
    state: JournalState, after_seq: int | None, tokens_received: Sequence[int]
) -> ResumePoint:
    """Return where to go on.

    Args:
        state: Of the journal.
        after_seq: The last event that the client has; None is none.
        tokens_received: Ids of all tokens that it has; empty: it has those of `after_seq`.

    Raises:
        OutOfRangeError: The position is ahead of what can be known.
        FailedPreconditionError: The position, the tokens and the journal contradict each other.
    """
    if after_seq is None:
        if tokens_received:
            raise FailedPreconditionError(
                f"tokens_received has {len(tokens_received)} tokens and after_seq is not set: "
                "name the last event that was received"
            )
        return ResumePoint(0, 0, state.tokens)
    if tokens_received:
        _check_tokens(state, tokens_received)
        _check_position(state, after_seq, len(tokens_received))
        ahead = (SampledToken(token_id) for token_id in tokens_received[len(state.tokens) :])
        return ResumePoint(len(tokens_received), after_seq + 1, (*state.tokens, *ahead))
    return ResumePoint(_num_tokens_at(state, after_seq), after_seq + 1, state.tokens)


def _check_tokens(state: JournalState, tokens_received: Sequence[int]) -> None:
    num_received, num_known = len(tokens_received), len(state.tokens)
    limit = num_known if state.is_ended else state.header.sampling.max_tokens
    if num_received > limit:
        whole = "the whole answer" if state.is_ended else "max_tokens"
        raise OutOfRangeError(
            f"tokens_received has {num_received} tokens, limit={limit} ({whole}): "
            "send those of this request"
        )
    for index, (received, known) in enumerate(zip(tokens_received, state.tokens, strict=False)):
        if received != known.token_id:
            raise FailedPreconditionError(
                f"tokens_received[{index}]={received}, the answer has {known.token_id} there: "
                "send the tokens of this request as they came"
            )


def _check_position(state: JournalState, after_seq: int, num_received: int) -> None:
    """Check the position of a client that has sent its tokens."""
    num_ahead = max(0, num_received - len(state.tokens))
    num_more = 0 if state.is_ended else num_ahead + MAX_EVENTS_AHEAD
    if after_seq > state.last_seq + num_more:
        raise OutOfRangeError(
            f"after_seq={after_seq}, limit={state.last_seq + num_more} "
            f"(the journal's last event is {state.last_seq}): send the last event that was received"
        )
    index = _num_marks(state, after_seq)
    num_tokens = state.marks[index - 1][1] if index else 0
    if num_tokens > num_received:
        raise FailedPreconditionError(
            f"tokens_received has {num_received} tokens, with event after_seq={after_seq} "
            f"there were {num_tokens}: send all tokens up to that event"
        )


def _num_tokens_at(state: JournalState, after_seq: int) -> int:
    """Return how many tokens a client has that sent its position only."""
    index = _num_marks(state, after_seq)
    if not index or state.marks[index - 1][0] != after_seq:
        raise OutOfRangeError(
            f"after_seq={after_seq} without tokens_received, the journal has events up to "
            f"{state.last_seq} and not this one: send tokens_received"
        )
    return state.marks[index - 1][1]


def _num_marks(state: JournalState, after_seq: int) -> int:
    """Return how many events there are up to this one."""
    return bisect_right(state.marks, after_seq, key=lambda mark: mark[0])
