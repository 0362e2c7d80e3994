"""A request ends exactly once, and nothing happens to it after that."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.gateway.request_life import RequestLife, RequestState

ENDS = {
    RequestState.FINISHED,
    RequestState.FAILED,
    RequestState.CANCELLED,
    RequestState.SUPERSEDED,
}


@given(st.lists(st.sampled_from(RequestState), max_size=20))
def test_no_sequence_of_events_has_two_ends(wanted: list[RequestState]) -> None:
    life = RequestLife()
    entered = []
    for state in wanted:
        try:
            life.go(state)
        except AssertionError:
            continue
        entered.append(state)
    ends = [state for state in entered if state in ENDS]
    assert len(ends) <= 1
    assert not ends or entered[-1] in ENDS
    assert life.is_over == bool(ends)


def test_answer_is_cut_and_goes_on_as_often_as_replicas_are_lost() -> None:
    life = RequestLife()
    for _ in range(5):
        life.go(RequestState.RUNNING)
        life.go(RequestState.CUT)
        life.go(RequestState.WAITING)
    life.go(RequestState.RUNNING)
    life.go(RequestState.FINISHED)
    with pytest.raises(AssertionError, match="finished is not followed by failed"):
        life.go(RequestState.FAILED)


def test_what_was_cut_is_not_finished_before_it_has_run_again() -> None:
    life = RequestLife()
    life.go(RequestState.RUNNING)
    life.go(RequestState.CUT)
    with pytest.raises(AssertionError):
        life.go(RequestState.FINISHED)
