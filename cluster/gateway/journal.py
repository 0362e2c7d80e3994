"""Writes what becomes of the requests of one gateway to their journals, off the path of tokens.

    note() ──► RequestJournal ──┐
    note() ──► RequestJournal ──┼─ every interval ─► entries ─► one call of the store at a time
    note() ──► RequestJournal ──┘

What is noted while a call is on its way goes with the next one. Entries that the store did not
take are kept, as they were sent: whether it has them after all is not known, and a reader counts
an entry once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Sequence

from cluster.errors import SluiceError
from cluster.gateway.journal_progress import ProgressWriter
from cluster.gateway.journal_record import JournalHeader, JournalState, encode_header
from cluster.kvstore.store import JournalOutcome, JournalWrite, Store
from cluster.metrics import Metrics
from cluster.types import FinishReason, SampledToken

logger = logging.getLogger(__name__)

MAX_CALL_BYTES = 2**20
"""Of entries in one call of the store; a longer entry goes alone."""

MAX_CALL_JOURNALS = 256
"""Likewise: the streams of a gateway wait while so many are made into entries, 2 ms."""

MAX_PENDING_BYTES = 2**24
"""Of all journals of a gateway, while the store takes nothing."""


_JOURNAL_BYTES = 2**11  # of what a journal is here, beside its entries


class RequestJournal:
    """What one call does to the journal of its request; costs it an append per event.

    Args:
        header: Of the request.
        owner: Who writes: this call.
        progress: Continues the journal.
        on_superseded: Called once, if another owner takes over while this one is open.
        begins: The journal is made anew.
    """

    def __init__(
        self,
        header: JournalHeader,
        owner: str,
        progress: ProgressWriter,
        on_superseded: Callable[[], None],
        *,
        begins: bool,
    ) -> None:
        self.request_id = header.request_id
        self.on_superseded = on_superseded
        self.is_open = True  # takes notes
        self.is_urgent = True  # its first write does not wait for the interval
        self._scope = header.tenant
        self._owner = owner
        self._progress = progress
        self._notes: list[tuple[int, Sequence[SampledToken], str, int]] = []
        self._entries = [encode_header(header)] if begins else []
        self._begins = begins
        self._ends = False
        self._num_sent = 0  # entries that the store has, or not: they must not change

    @property
    def pending_bytes(self) -> int:
        """About the bytes of what the store does not have, but for the latest notes."""
        size_bytes = sum(map(len, self._entries)) + self._progress.size_bytes
        return size_bytes and size_bytes + _JOURNAL_BYTES

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to write, now or later."""
        return not (self.is_open or self._entries or self._progress.size_bytes)

    def note(
        self,
        seq: int,
        tokens: Sequence[SampledToken] = (),
        *,
        fingerprint: str = "",
        num_cached_tokens: int = 0,
    ) -> None:
        """Note an event that was sent.

        Args:
            seq: Its number. One that is not behind the last one takes its place, and that of all
                events behind it.
            tokens: That it brings and the journal does not have, not to be changed afterwards.
                With this event the client has all tokens of the journal: what is repeated for a
                client that has lost some is one event.
            fingerprint: Of the model that they are of, where it is new.
            num_cached_tokens: Of the prompt, where it is new.
        """
        if self.is_open:
            self._notes.append((seq, tokens, fingerprint, num_cached_tokens))

    def timings(self, queued_s: float, ttft_s: float) -> None:
        """Note how long it waited, and for how long its first token did; seconds."""
        if self.is_open:
            self.gather()
            self._progress.timings(queued_s, ttft_s)

    def finish(self, seq: int, finish_reason: FinishReason) -> None:
        """Note the last event: the answer is complete."""
        self._end(seq, finish_reason.value, "")

    def fail(self, error: SluiceError) -> None:
        """Note that there will be no more events, and why."""
        self._end(-1, None, f"{error.code}: {error}")

    def close(self) -> None:
        """Note nothing more, what was noted is still written: another call may go on with it."""
        self.gather()
        self.is_open = False
        self.on_superseded = _do_nothing  # what is kept for the store keeps no request

    def drop(self) -> None:
        """Write nothing more, not even what was noted."""
        self.close()
        self._entries.clear()
        self._progress.take()

    def gather(self) -> None:
        """Make entries of the notes."""
        notes, self._notes = self._notes, []
        for note in notes:
            self._progress.note(*note)

    def next_write(self, room_bytes: int) -> JournalWrite | None:
        """Return what to write of what was gathered; None where that is nothing.

        Args:
            room_bytes: Its entries have no more, but for the first one.
        """
        if not self._num_sent:  # while the store takes nothing, what is noted stays one entry
            self._entries.extend(self._progress.take())
        entries: list[bytes] = []
        for entry in self._entries:
            room_bytes -= len(entry)
            if entries and room_bytes < 0:
                break
            entries.append(entry)
        if not entries:
            return None
        self._num_sent, self.is_urgent = len(entries), False
        is_last = self._ends and len(entries) == len(self._entries)
        return JournalWrite(
            self.request_id,
            self._scope,
            self._owner,
            tuple(entries),
            begins=self._begins,
            ends=is_last,
        )

    def written(self) -> None:
        """Take note that the store has what `next_write` returned."""
        self._begins = False
        del self._entries[: self._num_sent]
        self._num_sent = 0

    def _end(self, seq: int, reason: str | None, error: str) -> None:
        if self.is_open:
            self.close()
            self._entries.extend(self._progress.take())
            self._entries.append(self._progress.end(seq, reason, error))
            self._ends = True


class Journals:
    """The journals that one gateway writes.

    Args:
        store: Stays the caller's.
        metrics: Of the gateway.
        interval_s: Between two writes.
        max_pending_bytes: Kept while the store takes nothing; beyond it the oldest journals are
            given up.
    """

    def __init__(
        self,
        store: Store,
        metrics: Metrics,
        *,
        interval_s: float,
        max_pending_bytes: int = MAX_PENDING_BYTES,
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._interval_s = interval_s
        self._max_pending_bytes = max_pending_bytes
        self._journals: dict[RequestJournal, None] = {}  # open, or not all written; oldest first
        self._lock = asyncio.Lock()  # of calls of the store
        self._wake = asyncio.Event()
        self._is_failing = False
        self._is_stopping = False
        self._task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._journals)

    def has(self, request_id: str) -> bool:
        """Return whether something of a request may not be written yet."""
        return any(journal.request_id == request_id for journal in self._journals)

    @staticmethod
    def new_owner() -> str:
        """Return a name that nobody else has."""
        return secrets.token_hex(16)

    def start(self) -> None:
        """Begin to write."""
        self._task = asyncio.create_task(self._run(), name="journals")

    async def stop(self) -> None:
        """Write what is pending, and end; what the store does not take now is lost."""
        self._is_stopping = True
        self._wake.set()
        if self._task is not None:
            await asyncio.wait([self._task])
        await self.flush()

    def begin(self, header: JournalHeader, *, on_superseded: Callable[[], None]) -> RequestJournal:
        """Begin the journal of a request: it is written at once, beside what follows.

        Args:
            header: Of the request.
            on_superseded: Called once if another call takes the request over.
        """
        progress = ProgressWriter(num_entries=1, last_seq=-1)
        journal = RequestJournal(header, self.new_owner(), progress, on_superseded, begins=True)
        return self._add(journal)

    def go_on(
        self,
        state: JournalState,
        owner: str,
        *,
        on_superseded: Callable[[], None],
    ) -> RequestJournal:
        """Go on with the journal of a request that another call has begun.

        Args:
            state: As it was read when it was claimed.
            owner: Who claimed it.
            on_superseded: Called once if another call takes the request over.

        Returns:
            It takes no notes if the journal has ended: nothing follows the end.
        """
        progress = ProgressWriter(state.num_entries, state.last_seq)
        journal = RequestJournal(state.header, owner, progress, on_superseded, begins=False)
        if state.is_ended:
            journal.close()
            return journal
        return self._add(journal)

    async def flush(self) -> None:
        """Return when all that was noted before is written, or the store does not take it."""
        async with self._lock:
            await self._write(list(self._journals))

    def _add(self, journal: RequestJournal) -> RequestJournal:
        self._journals[journal] = None
        self._wake.set()
        return journal

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        while not self._is_stopping:
            self._wake.clear()
            is_due = loop.time() >= due_s
            if is_due:
                due_s = loop.time() + self._interval_s
            try:
                async with self._lock:
                    await self._write([item for item in self._journals if is_due or item.is_urgent])
            except Exception:
                logger.exception("writing journals failed")
            wait_s = max(0.0, due_s - loop.time()) if self._journals else None
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), wait_s)

    async def _write(self, journals: Sequence[RequestJournal]) -> None:
        """Write what is noted in these, until the store does not take it."""
        is_taken = True
        for start in range(0, len(journals), MAX_CALL_JOURNALS):
            some = journals[start : start + MAX_CALL_JOURNALS]
            for journal in some:
                journal.gather()
            while is_taken and (batch := _next_batch(some)):
                is_taken = await self._call(batch)
        if not is_taken:
            self._make_room()
        for journal in journals:
            if journal.is_over:
                self._journals.pop(journal, None)

    async def _call(self, batch: dict[RequestJournal, JournalWrite]) -> bool:
        """Make one call; return whether the store has answered."""
        try:
            done = await self._store.write_journals(list(batch.values()))
        except SluiceError as error:
            if not self._is_failing:
                logger.warning("journals are kept here, the store does not take them: %s", error)
        except Exception:
            logger.exception("the store failed to take journals")
        else:
            self._is_failing = False
            dropped = self._metrics.journals_dropped
            dropped.labels("finished").inc(done.num_dropped_finished)
            dropped.labels("live").inc(done.num_dropped_live)
            for journal, outcome in zip(batch, done.outcomes, strict=True):
                self._settle(journal, outcome)
            return True
        self._is_failing = True
        self._metrics.journal_errors.inc(len(batch))
        return False

    def _settle(self, journal: RequestJournal, outcome: JournalOutcome) -> None:
        if outcome is JournalOutcome.WRITTEN:
            journal.written()
        elif outcome is JournalOutcome.LOST:
            asyncio.get_running_loop().call_soon(journal.on_superseded)
            journal.drop()
        else:
            self._give_up(journal, outcome.value)

    def _make_room(self) -> None:
        """Give up the oldest of the journals that are not written, as far as there are too many."""
        sizes = [(journal, journal.pending_bytes) for journal in self._journals]
        excess_bytes = sum(size for _, size in sizes) - self._max_pending_bytes
        for journal, size_bytes in sizes:
            if excess_bytes > 0 and size_bytes > 0:
                excess_bytes -= size_bytes
                self._give_up(journal, "pending")

    def _give_up(self, journal: RequestJournal, state: str) -> None:
        journal.drop()
        self._metrics.journals_dropped.labels(state).inc()
        logger.info("request %s cannot be resumed any more: %s", journal.request_id, state)


def _do_nothing() -> None: ...


def _next_batch(journals: Sequence[RequestJournal]) -> dict[RequestJournal, JournalWrite]:
    """Return what goes into the next call; empty where nothing is left."""
    batch: dict[RequestJournal, JournalWrite] = {}
    room_bytes = MAX_CALL_BYTES
    for journal in journals:
        write = journal.next_write(room_bytes)
        if write is None:
            continue
        size_bytes = sum(map(len, write.entries))
        if batch and size_bytes > room_bytes:
            break  # one long entry: it goes with the next call
        batch[journal] = write
        room_bytes -= size_bytes
    return batch
