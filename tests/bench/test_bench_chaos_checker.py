"""What the checker of `sluice bench chaos` calls exact, and what it calls everything else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cluster.bench.chaos_checker import ALLOWED, Finding, Seen, Verdict, check
from cluster.errors import (
    DeadlineError,
    NotFoundError,
    OverloadedError,
    PoisonError,
    SluiceError,
    UnavailableError,
)

TOKENS = [11, 12, 13, 14, 15, 16, 17, 18, 19, 20]


def answer(**changes: Any) -> Seen:
    whole = Seen(
        token_ids=list(TOKENS),
        text="abcdefghij",
        logprobs=[(-0.1 * n, -1.0, -2.0) for n in range(10)],
        finish_reason="length",
        num_prompt_tokens=30,
        num_completion_tokens=10,
    )
    return replace(whole, **changes)


def came(tokens: list[int], **changes: Any) -> Seen:
    """What has brought these tokens, with all else as it has to be."""
    fields = {
        "token_ids": tokens,
        "text": answer().text[: len(tokens)],
        "logprobs": answer().logprobs[: len(tokens)],
    }
    return answer(**(fields | changes))


def found(seen: Seen, *, may_miss_journal: bool = False) -> Finding:
    return check(answer(), seen, may_miss_journal=may_miss_journal)


def test_the_same_answer_is_exact_within_the_tolerance_of_log_probabilities() -> None:
    assert found(answer()) == Finding(Verdict.EXACT)
    near = [tuple(value + 9e-5 for value in one) for one in answer().logprobs]
    assert found(answer(logprobs=near)).verdict is Verdict.EXACT
    assert {Verdict.EXACT, Verdict.REFUSED} == ALLOWED


def test_another_token_is_wrong_wherever_the_stream_ends() -> None:
    for index in range(10):
        tokens = [*TOKENS[:index], 99, *TOKENS[index + 1 :]]
        for end in ({}, {"finish_reason": "", "error": UnavailableError("gone")}):
            finding = found(came(tokens, **end))
            assert finding.verdict is Verdict.WRONG
            assert finding.detail == f"token {index} is 99, not {TOKENS[index]}"


def test_tokens_that_come_again_are_duplicated() -> None:
    finding = found(came([*TOKENS[:6], *TOKENS[2:]]))
    assert finding == Finding(Verdict.DUPLICATED, "token 6: those from token 2 on come again")
    behind_the_end = found(came([*TOKENS, *TOKENS[5:]]))
    assert behind_the_end.verdict is Verdict.DUPLICATED


def test_tokens_that_are_left_out_are_wrong_and_said_to_be_missing() -> None:
    finding = found(came([*TOKENS[:2], *TOKENS[4:]]))
    assert finding == Finding(Verdict.WRONG, "token 2: 2 tokens are missing")
    more = found(came([*TOKENS, 77]))
    assert more == Finding(Verdict.WRONG, "token 10 comes behind the end of the answer")


def test_an_end_that_looks_well_behind_a_part_is_truncated() -> None:
    finding = found(came(TOKENS[:7]))
    assert finding == Finding(Verdict.TRUNCATED, "7 of 10 tokens")
    whole_text = found(came(TOKENS[:7], text=answer().text))
    assert whole_text == finding, "the last tokens may be without text"
    short_text = found(answer(text="abcdefg"))
    assert short_text.verdict is Verdict.TRUNCATED


def test_no_end_is_lost() -> None:
    finding = found(came(TOKENS[:7], finish_reason=""))
    assert finding == Finding(Verdict.LOST, "cut off behind 7 tokens, no status")
    assert found(answer(finish_reason="")).verdict is Verdict.LOST, "all tokens, but no end"


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (OverloadedError("full"), Verdict.REFUSED),
        (PoisonError("two replicas died of it"), Verdict.LOST),
        (UnavailableError("no replica"), Verdict.LOST),
        (DeadlineError("late"), Verdict.LOST),
        (NotFoundError("no journal"), Verdict.LOST),
        (SluiceError("internal error"), Verdict.LOST),
    ],
)
def test_a_status_is_allowed_where_it_says_what_happened(
    error: SluiceError, verdict: Verdict
) -> None:
    finding = found(came([], finish_reason="", error=error))
    assert finding == Finding(verdict, f"{error.code}: {error}")


def test_a_stream_with_tokens_must_not_be_sent_away() -> None:
    full = OverloadedError("full")
    behind_tokens = came(TOKENS[:1], finish_reason="", error=full)
    assert found(behind_tokens) == Finding(Verdict.LOST, "RESOURCE_EXHAUSTED: full")
    behind_none = came([], finish_reason="", error=full)
    for early, verdict in ((TOKENS[:1], Verdict.LOST), ([], Verdict.REFUSED)):
        forgotten = came(early, finish_reason="")
        assert check(answer(), behind_none, forgotten=forgotten).verdict is verdict


def test_a_journal_that_the_store_lost_may_be_missed() -> None:
    for error in (NotFoundError("unknown"), UnavailableError("gone", reason="JOURNAL_GONE")):
        seen = came(TOKENS[:3], finish_reason="", error=error)
        assert found(seen, may_miss_journal=True).verdict is Verdict.REFUSED
        assert found(seen).verdict is Verdict.LOST
    late = came(TOKENS[:3], finish_reason="", error=UnavailableError("nobody answers"))
    assert found(late, may_miss_journal=True).verdict is Verdict.LOST


def test_everything_else_of_an_answer_is_held_against_it_too() -> None:
    far = [*answer().logprobs[:4], (-0.4, -1.0, -2.0002), *answer().logprobs[5:]]
    nan = [(float("nan"), -1.0, -2.0), *answer().logprobs[1:]]
    for changes, detail in (
        ({"text": "abcdeXghij"}, "the text differs from character 5 on"),
        ({"text": "abcdefghijk"}, "the text differs from character 10 on"),
        ({"logprobs": far}, "a log probability of token 4 is off 2.0e-04"),
        ({"logprobs": nan}, "a log probability of token 0 is off nan"),
        ({"logprobs": far[:9]}, "9 log probabilities for 10 tokens"),
        ({"logprobs": [(-0.0,), *far[1:]]}, "token 0 has 1 log probabilities, not 3"),
        ({"finish_reason": "stop"}, "finish_reason is stop, not length"),
        ({"num_prompt_tokens": 31}, "num_prompt_tokens is 31, not 30"),
        ({"num_completion_tokens": 20}, "num_completion_tokens is 20, not 10"),
    ):
        assert found(answer(**changes)) == Finding(Verdict.WRONG, detail), changes


def test_what_a_client_forgot_has_to_be_right_as_well() -> None:
    right = came(TOKENS[:4], finish_reason="")
    assert check(answer(), answer(), forgotten=right) == Finding(Verdict.EXACT)
    for forgotten, detail in (
        (came([11, 99, 13]), "token 1 is 99, not 12"),
        (came([*TOKENS[:6], *TOKENS[2:6]]), "token 6: those from token 2 on come again"),
        (came(TOKENS[:4], text="abX"), "the text differs from character 2 on"),
        (came(TOKENS[:2], logprobs=[(-0.5, -1.0, -2.0)] * 2), "a log probability of token 0 is"),
    ):
        finding = check(answer(), answer(), forgotten=forgotten)
        assert finding.verdict is Verdict.WRONG
        assert finding.detail.startswith(f"before the client came back: {detail}")
