"""Holds what a client has seen against what an undisturbed run answers: pure.

exact        all of it, ended by its final event
refused      sent away before its first token; or the store lost its journal, behind right tokens
wrong        another token, text, log probability, finish reason or usage
duplicated   tokens that were there already came again
truncated    it looks finished, and is not
lost         no end: cut off, out of time, or a status that explains nothing
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import zip_longest

from cluster.errors import (
    JOURNAL_GONE,
    NotFoundError,
    OverloadedError,
    SluiceError,
)

MAX_LOGPROB_ERROR = 1e-4

_REPEAT_TOKENS = 4  # so many in a row are no accident

Logprobs = tuple[float, ...]
"""At one position: of the chosen token, then of the likeliest, best first."""


class Verdict(StrEnum):
    """What became of a stream."""

    EXACT = "exact"
    REFUSED = "refused"
    WRONG = "wrong"
    DUPLICATED = "duplicated"
    TRUNCATED = "truncated"
    LOST = "lost"


ALLOWED = frozenset({Verdict.EXACT, Verdict.REFUSED})
"""A run with any other verdict has failed."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A verdict, and what it rests on."""

    verdict: Verdict
    detail: str = ""  # of a stream that is not exact


@dataclass(slots=True)
class Seen:
    """What a client has received of one answer, in all."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[Logprobs] = field(default_factory=list)
    finish_reason: str = ""  # empty: there was no final event
    num_prompt_tokens: int = 0  # as the final event counts them
    num_completion_tokens: int = 0  # likewise
    error: SluiceError | None = None  # that it ended with


def check(
    expected: Seen,
    seen: Seen,
    *,
    forgotten: Seen | None = None,
    may_miss_journal: bool = False,
) -> Finding:
    """Return the verdict on a stream.

    Args:
        expected: The whole answer, undisturbed.
        seen: What came; of a client that forgot what it had, what came since.
        forgotten: What had come before. It was shown to somebody: it has to be right as well.
        may_miss_journal: The store lost what it knew while the stream lived, so that nobody can
            go on with it: NOT_FOUND says what happened, and so does JOURNAL_GONE.
    """
    if forgotten is not None:
        early = _check_beginning(expected, forgotten)
        if early is not None:
            return Finding(Verdict.WRONG, f"before the client came back: {early.detail}")
    difference = _check_beginning(expected, seen)
    if difference is not None:
        return difference
    if not seen.finish_reason:
        has_tokens = bool(seen.token_ids or (forgotten is not None and forgotten.token_ids))
        return _check_end(seen, has_tokens, may_miss_journal)
    num_tokens, num_expected = len(seen.token_ids), len(expected.token_ids)
    if num_tokens < num_expected or len(seen.text) < len(expected.text):
        return Finding(Verdict.TRUNCATED, f"{num_tokens} of {num_expected} tokens")
    for name in ("finish_reason", "num_prompt_tokens", "num_completion_tokens"):
        value, wanted = getattr(seen, name), getattr(expected, name)
        if value != wanted:
            return Finding(Verdict.WRONG, f"{name} is {value}, not {wanted}")
    return Finding(Verdict.EXACT)


def _check_beginning(expected: Seen, seen: Seen) -> Finding | None:
    """Return what keeps that which came from being a beginning of what is expected."""
    return (
        _check_tokens(expected.token_ids, seen.token_ids)
        or _check_text(expected, seen)
        or _check_logprobs(expected, seen)
    )


def _check_tokens(expected: Sequence[int], seen: Sequence[int]) -> Finding | None:
    index = _first_difference(expected, seen)
    if index is None:
        return None
    came = seen[index : index + _REPEAT_TOKENS]
    for start in range(index):
        if len(came) == _REPEAT_TOKENS and came == expected[start : start + _REPEAT_TOKENS]:
            detail = f"token {index}: those from token {start} on come again"
            return Finding(Verdict.DUPLICATED, detail)
    if index >= len(expected):
        return Finding(Verdict.WRONG, f"token {index} comes behind the end of the answer")
    for start in range(index + 1, len(expected)):
        if len(came) == _REPEAT_TOKENS and came == expected[start : start + _REPEAT_TOKENS]:
            return Finding(Verdict.WRONG, f"token {index}: {start - index} tokens are missing")
    return Finding(Verdict.WRONG, f"token {index} is {seen[index]}, not {expected[index]}")


def _first_difference(expected: Sequence[int], seen: Sequence[int]) -> int | None:
    """Return where what came is not a beginning of what is expected."""
    for index, (wanted, came) in enumerate(zip_longest(expected, seen)):
        if came is None:
            return None
        if came != wanted:
            return index
    return None


def _check_text(expected: Seen, seen: Seen) -> Finding | None:
    if not expected.text.startswith(seen.text):
        pairs = enumerate(zip_longest(expected.text, seen.text))
        index = next(i for i, (wanted, came) in pairs if wanted != came)
        return Finding(Verdict.WRONG, f"the text differs from character {index} on")
    return None


def _check_logprobs(expected: Seen, seen: Seen) -> Finding | None:
    if expected.logprobs and len(seen.logprobs) != len(seen.token_ids):
        detail = f"{len(seen.logprobs)} log probabilities for {len(seen.token_ids)} tokens"
        return Finding(Verdict.WRONG, detail)
    for index, (wanted, came) in enumerate(zip(expected.logprobs, seen.logprobs, strict=False)):
        if len(wanted) != len(came):
            detail = f"token {index} has {len(came)} log probabilities, not {len(wanted)}"
            return Finding(Verdict.WRONG, detail)
        error = max(abs(a - b) for a, b in zip(wanted, came, strict=True))
        if not error <= MAX_LOGPROB_ERROR:  # also where one is not a number
            return Finding(Verdict.WRONG, f"a log probability of token {index} is off {error:.1e}")
    return None


def _check_end(seen: Seen, has_tokens: bool, may_miss_journal: bool) -> Finding:
    error = seen.error
    if error is None:
        return Finding(Verdict.LOST, f"cut off behind {len(seen.token_ids)} tokens, no status")
    detail = f"{error.code}: {error}"
    is_journal_gone = isinstance(error, NotFoundError) or error.reason == JOURNAL_GONE
    # Who has let a request in finishes it. No request here is poison: each conviction is false.
    is_sent_away = isinstance(error, OverloadedError) and not has_tokens
    if is_sent_away or (may_miss_journal and is_journal_gone):
        return Finding(Verdict.REFUSED, detail)
    return Finding(Verdict.LOST, detail)
