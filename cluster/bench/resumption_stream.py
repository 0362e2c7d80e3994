"""One stream, cut while it runs: what arrived, and how it differs from the unbroken one.

tokens   0  1  2  3 ──────────── 4  5  6 ── finished
                  ▲ kill       ▲ goes on elsewhere, cut_index = 4
                  |--- gap_s --|
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cluster.client import (
    AsyncClient,
    Finished,
    RequestOptions,
    Resumed,
    Running,
    ScoredToken,
    TextDelta,
    Usage,
)
from cluster.errors import SluiceError
from cluster.types import FinishReason, SamplingParams

STREAM_TIMEOUT_S = 60.0
LOGPROB_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Cut:
    """What ends a process while a stream runs."""

    index: int  # tokens that have arrived by then; 0: as soon as the request runs
    kill: Callable[[str], None]  # called with the id of the replica that has the request


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer, as a client has put it together."""

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[ScoredToken, ...]
    finish_reason: FinishReason
    usage: Usage


@dataclass(slots=True)
class Followed:
    """A stream that has ended."""

    answer: Answer | None = None  # None where it failed
    error: str = ""  # why it failed
    replica_ids: list[str] = field(default_factory=list)  # that have had it, in order
    cut_index: int | None = None  # tokens that had arrived when it went on; None: it was not cut
    gap_s: float | None = None  # from the last token before the cut, or the kill, to the next


class _Reader:
    """Takes the events of one stream."""

    def __init__(self, cut: Cut | None) -> None:
        self.followed = Followed()
        self._cut = cut
        self._has_killed = False
        self._last_s = 0.0  # last token, or the kill before the first
        self._token_ids: list[int] = []
        self._pieces: list[str] = []
        self._logprobs: list[ScoredToken] = []

    def take(self, event: object, now_s: float) -> None:
        followed = self.followed
        if isinstance(event, Resumed | Running):
            if isinstance(event, Running):
                followed.replica_ids.append(event.replica_id)
            if self._has_killed and followed.cut_index is None:
                followed.cut_index = len(self._token_ids)
        elif isinstance(event, TextDelta):
            self._take_delta(event, now_s)
        elif isinstance(event, Finished):
            followed.answer = Answer(
                tuple(self._token_ids),
                "".join(self._pieces),
                tuple(self._logprobs),
                event.finish_reason,
                event.usage,
            )
        self._kill_if_due()

    def _take_delta(self, delta: TextDelta, now_s: float) -> None:
        followed = self.followed
        if followed.cut_index is not None and followed.gap_s is None and delta.token_ids:
            followed.gap_s = now_s - self._last_s
        self._token_ids += delta.token_ids
        self._pieces.append(delta.text)
        self._logprobs += delta.logprobs
        self._last_s = now_s

    def _kill_if_due(self) -> None:
        cut, replica_ids = self._cut, self.followed.replica_ids
        if cut is None or self._has_killed or not replica_ids:
            return
        if len(self._token_ids) >= cut.index and self.followed.answer is None:
            self._has_killed = True
            self._last_s = self._last_s or time.monotonic()
            cut.kill(replica_ids[-1])


async def follow(
    client: AsyncClient,
    prompt: str,
    sampling: SamplingParams,
    *,
    cut: Cut | None = None,
    resume_timeout_s: float = 0.0,
    request_id: str = "",
) -> Followed:
    """Stream one request to its end, whatever it is.

    Args:
        client: Of one gateway, or several.
        prompt: Text.
        sampling: How.
        cut: Ends a process meanwhile; None leaves all alone.
        resume_timeout_s: The client resumes for so long; 0: what is resumed is the gateway's work.
        request_id: Empty lets the client choose.
    """
    reader = _Reader(cut)
    options = RequestOptions(
        sampling=sampling,
        timeout_s=STREAM_TIMEOUT_S,
        resume_timeout_s=resume_timeout_s,
        report_resumptions=True,
        request_id=request_id,
    )
    try:
        async for event in client.stream(prompt, **options):
            reader.take(event, time.monotonic())
    except SluiceError as error:
        reader.followed.error = f"{error.code}: {error}"
    return reader.followed


def difference(answer: Answer, reference: Answer, *, num_cached_tokens: int | None = None) -> str:
    """Return the first thing in which an answer is not the unbroken one; empty if it is.

    Args:
        answer: Of a stream that was cut.
        reference: Of the same request, unbroken.
        num_cached_tokens: That its usage should show; None: not looked at, it depends on where the
            first attempt went.
    """
    for name in ("token_ids", "text"):
        got, expected = getattr(answer, name), getattr(reference, name)
        if got != expected:
            place = _first_difference(got, expected)
            return (
                f"{name} differ from {place} on: {got[place:][:8]!r}, not {expected[place:][:8]!r}"
            )
    if answer.finish_reason is not reference.finish_reason:
        return f"finish_reason is {answer.finish_reason}, not {reference.finish_reason}"
    for name in ("prompt_tokens", "completion_tokens"):
        got, expected = getattr(answer.usage, name), getattr(reference.usage, name)
        if got != expected:
            return f"usage.{name} is {got}, not {expected}"
    if num_cached_tokens not in (None, answer.usage.cached_tokens):
        return f"usage.cached_tokens is {answer.usage.cached_tokens}, not {num_cached_tokens}"
    return _logprob_difference(answer.logprobs, reference.logprobs)


def _first_difference(got: Sequence[object], expected: Sequence[object]) -> int:
    pairs = enumerate(zip(got, expected, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(got), len(expected)))


def _logprob_difference(got: Sequence[ScoredToken], expected: Sequence[ScoredToken]) -> str:
    if len(got) != len(expected):
        return f"{len(got)} log probabilities, not {len(expected)}"
    for place, (a, b) in enumerate(zip(got, expected, strict=True)):
        tokens, others = (a, *a.top), (b, *b.top)
        if [token.token_id for token in tokens] != [token.token_id for token in others]:
            return f"the likeliest tokens differ at {place}"
        worst = max(abs(x.logprob - y.logprob) for x, y in zip(tokens, others, strict=True))
        if worst > LOGPROB_TOLERANCE:
            return f"log probabilities differ by {worst:.2g} at {place}"
    return ""
