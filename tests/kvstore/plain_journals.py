"""Journals as plainly as can be, to hold stores against: a list in the order of the last touch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.kvstore.store import Journal, JournalOutcome, JournalWrite, JournalWrites

JOURNAL_BYTES = 640  # as written in docs/store.md
ENTRY_BYTES = 32


@dataclass
class Row:
    key: str
    scope: str
    owner: str
    entries: list[bytes]
    is_ended: bool
    end_s: float

    @property
    def cost_bytes(self) -> int:
        return JOURNAL_BYTES + sum(len(entry) + ENTRY_BYTES for entry in self.entries)

    @property
    def journal(self) -> Journal:
        return Journal(self.scope, self.owner, list(self.entries), self.is_ended)


class PlainJournals:
    def __init__(self, max_bytes: int, ttl_s: float) -> None:
        self.max_bytes = max_bytes
        self.ttl_s = ttl_s
        self.rows: list[Row] = []  # what was touched longest ago first

    def write(self, writes: Sequence[JournalWrite], now_s: float) -> JournalWrites:
        dropped: list[Row] = []
        outcomes = [self._write(write, now_s, dropped) for write in writes]
        num_finished = sum(row.is_ended for row in dropped)
        return JournalWrites(outcomes, num_finished, len(dropped) - num_finished)

    def read(self, key: str, now_s: float) -> Journal | None:
        row = self._find(key, now_s)
        return row.journal if row else None

    def claim(self, key: str, scope: str, owner: str, now_s: float) -> Journal | None:
        row = self._find(key, now_s)
        if row is not None and row.scope == scope:
            row.owner = owner
            self._touch(row, now_s)
        return row.journal if row else None

    def oldest(self, is_ended: bool) -> str | None:
        return next((row.key for row in self.rows if row.is_ended == is_ended), None)

    def expire(self, key: str) -> None:
        self.rows = [row for row in self.rows if row.key != key]

    def _find(self, key: str, now_s: float) -> Row | None:
        self.rows = [row for row in self.rows if row.end_s > now_s]
        return next((row for row in self.rows if row.key == key), None)

    def _touch(self, row: Row, now_s: float) -> None:
        self.rows = [other for other in self.rows if other.key != row.key]
        row.end_s = now_s + self.ttl_s
        self.rows.append(row)

    def _write(self, write: JournalWrite, now_s: float, dropped: list[Row]) -> JournalOutcome:
        known = self._find(write.key, now_s)
        if known and known.scope != write.scope:
            return JournalOutcome.FOREIGN
        first = list(write.entries[:1])
        is_repeated = known is not None and first and known.entries[:1] == first
        begins = write.begins and not is_repeated
        if not known and not begins:
            return JournalOutcome.GONE
        if known and not begins and known.owner != write.owner:
            return JournalOutcome.LOST
        before = [] if begins or not known else known.entries
        is_ended = write.ends or (not begins and known is not None and known.is_ended)
        after = [*before, *write.entries]
        row = Row(write.key, write.scope, write.owner, after, is_ended, 0.0)
        if row.cost_bytes > self.max_bytes:
            return JournalOutcome.FULL
        others = [other for other in self.rows if other.key != write.key]
        while row.cost_bytes + sum(other.cost_bytes for other in others) > self.max_bytes:
            victim = next((other for other in others if other.is_ended), others[0])
            others.remove(victim)
            dropped.append(victim)
        self.rows = others
        self._touch(row, now_s)
        return JournalOutcome.WRITTEN
