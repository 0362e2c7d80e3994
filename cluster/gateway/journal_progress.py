"""From the events of a request to entries of its journal, as few as may be.

    events     5: 1 token   6: 1 token   7: none   8: 2 tokens
    entry      first event 5, events in runs (2, 1) (1, 0) (1, 2), 4 token ids

An entry holds events without a gap between their numbers. One whose first event is not behind the
last one of the entry before takes the place of what is journalled from there on: the client went
back to it, and saw other events then. The tokens stay, an answer has the same ones whenever it is
sent: an event that repeats some brings those of the journal.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from cluster.gateway.journal_entry import (
    MAX_EVENTS,
    EntryKind,
    add_run,
    pack_floats,
    pack_ids,
    seal,
)
from cluster.types import SampledToken

MAX_DRAFT_BYTES = 2**18
"""No event is added to an entry that has as many, or `MAX_EVENTS`."""

_FIXED_BYTES = 64  # of an entry, without what grows with its events
_WORD_BYTES = 4  # of a token id, and of a log probability
_RUN_BYTES = 4  # of a pair, on average at the most
_NUM_NEEDED = 2  # fields of an entry that are never left out


class ProgressDraft:
    """An entry that more events can be added to.

    Args:
        first_seq: Of its first event.
    """

    def __init__(self, first_seq: int) -> None:
        self._first_seq = first_seq
        self._runs: list[int] = []  # for each event its number of tokens
        self._num_events = 0
        self._ids = array("I")
        self._logprob_runs: list[int] = []
        self._logprobs = array("f")
        self._top_ids = array("I")
        self.num_cached_tokens = 0
        self.fingerprint = ""
        self.queued_s = 0.0
        self.ttft_s = 0.0

    @property
    def next_seq(self) -> int:
        """Of an event that can be added."""
        return self._first_seq + self._num_events

    @property
    def size_bytes(self) -> int:
        """About its bytes."""
        num_words = len(self._ids) + len(self._logprobs) + len(self._top_ids)
        num_runs = (len(self._runs) + len(self._logprob_runs)) // 2
        return _FIXED_BYTES + _WORD_BYTES * num_words + _RUN_BYTES * num_runs

    @property
    def is_full(self) -> bool:
        """Whether the next event belongs to another entry."""
        return self.size_bytes >= MAX_DRAFT_BYTES or self._num_events >= MAX_EVENTS

    def add(self, tokens: Sequence[SampledToken]) -> None:
        """Add an event."""
        add_run(self._runs, len(tokens))
        self._num_events += 1
        for token in tokens:
            self._ids.append(token.token_id)
            if token.logprob is None:
                add_run(self._logprob_runs, -1)
                continue
            add_run(self._logprob_runs, len(token.top))
            self._logprobs.append(token.logprob)
            for item in token.top:
                self._top_ids.append(item.token_id)
                self._logprobs.append(item.logprob)

    def encode(self, number: int) -> bytes:
        """Return its bytes; what comes last and has its default is left out."""
        fields = [
            self._first_seq,
            self._runs,
            pack_ids(self._ids),
            self._logprob_runs if self._logprobs else (),
            pack_floats(self._logprobs),
            pack_ids(self._top_ids),
            self.num_cached_tokens,
            self.fingerprint,
            self.queued_s,
            self.ttft_s,
        ]
        while len(fields) > _NUM_NEEDED and not fields[-1]:
            fields.pop()
        return seal(EntryKind.PROGRESS, number, *fields)


class ProgressWriter:
    """Gathers events, and cuts them into entries when asked.

    Args:
        num_entries: Of the journal so far.
        last_seq: Of its last event; -1 is none.
    """

    def __init__(self, num_entries: int, last_seq: int) -> None:
        self._num_entries = num_entries
        self._next_seq = last_seq + 1
        self._complete: list[ProgressDraft] = []
        self._draft: ProgressDraft | None = None

    @property
    def size_bytes(self) -> int:
        """About the bytes of what was not taken yet."""
        drafts = (*self._complete, self._draft) if self._draft else self._complete
        return sum(draft.size_bytes for draft in drafts)

    def note(
        self, seq: int, tokens: Sequence[SampledToken], fingerprint: str, num_cached_tokens: int
    ) -> None:
        """Add an event: see `RequestJournal.note`."""
        draft = self._draft
        if draft is None or seq != self._next_seq or draft.is_full:
            draft = self._open(seq)
        draft.add(tokens)
        self._next_seq = seq + 1
        draft.fingerprint = fingerprint or draft.fingerprint
        draft.num_cached_tokens = num_cached_tokens or draft.num_cached_tokens

    def timings(self, queued_s: float, ttft_s: float) -> None:
        """Add what is known of them."""
        draft = self._draft or self._open(self._next_seq)
        draft.queued_s, draft.ttft_s = queued_s, ttft_s

    def take(self) -> list[bytes]:
        """Return entries of what has come since the last time; they never change."""
        drafts, self._complete = self._complete, []
        if self._draft is not None:
            drafts.append(self._draft)
            self._draft = None
        return [draft.encode(self._number()) for draft in drafts]

    def end(self, seq: int, reason: str | None, error: str) -> bytes:
        """Return the last entry; what is before it has been taken.

        Args:
            seq: Of the last event; -1 where it has failed.
            reason: Why the answer ended.
            error: "CODE: message" of the failure.
        """
        return seal(EntryKind.END, self._number(), seq, reason, error)

    def _open(self, seq: int) -> ProgressDraft:
        if self._draft is not None:
            self._complete.append(self._draft)
        self._draft = ProgressDraft(seq)
        return self._draft

    def _number(self) -> int:
        self._num_entries += 1
        return self._num_entries - 1
