"""A request as its journal tells of it, in the store, where anybody may have written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from cluster.gateway.journal_entry import (
    MAX_EVENTS,
    EntryKind,
    JournalError,
    TokenColumns,
    expand_runs,
    pack_ids,
    seal,
    unpack_ids,
    unseal,
)
from cluster.gateway.journal_fields import EndFields, HeaderFields, ProgressFields, read_fields
from cluster.router.route import RouteRequest
from cluster.types import (
    NO_SLO,
    SLO,
    EngineRequest,
    FinishReason,
    SampledToken,
    SamplingParams,
    ServiceClass,
)

Mark = tuple[int, int]
"""Number of an event, and of the tokens that a client has with it."""

_DEFAULTS = SamplingParams()


@dataclass(frozen=True, slots=True)
class JournalHeader:
    """What was asked for: enough to go on with it anywhere."""

    request_id: str
    tenant: str  # who began it; empty without authentication
    prompt_token_ids: tuple[int, ...] = field(repr=False)  # at least one
    sampling: SamplingParams = field(repr=False)
    slo: SLO = NO_SLO
    service_class: ServiceClass = ServiceClass.STANDARD
    session: str = ""  # what the router knows its session by
    arrived_unix_s: float = 0.0  # since 1970

    @classmethod
    def of(
        cls, request: EngineRequest, route: RouteRequest, *, arrived_unix_s: float
    ) -> JournalHeader:
        """Return the header of a new request, by the id and session that its route has."""
        return cls(
            request_id=route.request_id,
            tenant=request.tenant,
            prompt_token_ids=request.prompt_token_ids,
            sampling=request.sampling,
            slo=request.slo,
            service_class=request.service_class,
            session=route.session,
            arrived_unix_s=arrived_unix_s,
        )


@dataclass(frozen=True, slots=True)
class JournalState:
    """What had become of a request by the time that its journal was read."""

    header: JournalHeader
    tokens: tuple[SampledToken, ...] = field(default=(), repr=False)
    marks: tuple[Mark, ...] = field(default=(), repr=False)  # of the events, in order
    last_seq: int = -1  # of the last event; -1 is none
    fingerprint: str = ""  # of the model that the tokens are of; empty before the first
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    error: str = ""  # "CODE: message" where it has failed
    queued_s: float = 0.0  # 0 is unknown
    ttft_s: float = 0.0  # 0 is unknown
    num_entries: int = 1  # of the journal: the next one has this number

    @property
    def is_ended(self) -> bool:
        """Whether nothing more becomes of it."""
        return self.finish_reason is not None or bool(self.error)


def encode_header(header: JournalHeader) -> bytes:
    """Return a journal's first entry: 4 bytes per token of the prompt, and some hundred more."""
    values = ((item.name, getattr(header.sampling, item.name)) for item in fields(SamplingParams))
    return seal(
        EntryKind.HEADER,
        0,
        header.request_id,
        header.tenant,
        pack_ids(header.prompt_token_ids),
        {name: value for name, value in values if value != getattr(_DEFAULTS, name)},
        (header.slo.ttft_s, header.slo.tpot_s),
        header.service_class.value,
        header.session,
        header.arrived_unix_s,
    )


def read_state(entries: Sequence[bytes]) -> JournalState:
    """Return what the entries of a journal tell.

    One that was written twice counts once. What stands behind a missing one is passed over: a store
    that failed over may have lost what it had confirmed, and the request goes on from what it has.

    Raises:
        JournalError: An entry is damaged or of another version, or the first is missing.
    """
    reading: _Reading | None = None
    for entry in entries:
        kind, number, values = unseal(entry)
        if reading is None:
            if kind is not EntryKind.HEADER or number:
                raise JournalError("a journal does not begin with its header")
            reading = _Reading(_header(values))
        elif number == reading.num_entries:
            reading.take(kind, values)
    if reading is None:
        raise JournalError("a journal has no entries")
    return reading.state()


def _header(values: tuple[object, ...]) -> JournalHeader:
    entry = read_fields(HeaderFields, values)
    return JournalHeader(
        entry.request_id,
        entry.tenant,
        unpack_ids(entry.prompt),
        SamplingParams(**entry.sampling.model_dump(exclude_unset=True)),
        SLO(*entry.slo),
        entry.service_class,
        entry.session,
        entry.arrived_unix_s,
    )


class _Reading:
    """A journal, read as far as `num_entries`."""

    def __init__(self, header: JournalHeader) -> None:
        self._header = header
        self._tokens: list[SampledToken] = []
        self._marks: list[Mark] = []
        self._latest: dict[str, Any] = {}  # fields of the state, of which the last one counts
        self._end: EndFields | None = None
        self.num_entries = 1

    def take(self, kind: EntryKind, values: tuple[object, ...]) -> None:
        if self._end is not None:
            raise JournalError("an entry follows the last one")
        if kind is EntryKind.PROGRESS:
            self._take_progress(read_fields(ProgressFields, values))
        elif kind is EntryKind.END:
            self._take_end(read_fields(EndFields, values))
        else:
            raise JournalError("a journal has two headers")
        self.num_entries += 1

    def state(self) -> JournalState:
        return JournalState(
            self._header,
            tokens=tuple(self._tokens),
            marks=tuple(self._marks),
            last_seq=self._marks[-1][0] if self._marks else -1,
            finish_reason=self._end.reason if self._end else None,
            error=self._end.error if self._end else "",
            num_entries=self.num_entries,
            **self._latest,
        )

    def _take_progress(self, entry: ProgressFields) -> None:
        columns = TokenColumns(entry.ids, entry.logprob_runs, entry.logprobs, entry.top_ids)
        tokens, nums = columns.unpack(), expand_runs(entry.runs, MAX_EVENTS)
        if len(tokens) != sum(nums):
            raise JournalError(f"an entry has {len(tokens)} tokens, its events {sum(nums)}")
        self._mark(entry.first_seq, nums)
        self._tokens += tokens
        for name in ("fingerprint", "num_cached_tokens", "queued_s", "ttft_s"):
            if value := getattr(entry, name):
                self._latest[name] = value

    def _take_end(self, entry: EndFields) -> None:
        if (entry.reason is None) == (not entry.error) or (entry.seq < 0) == (not entry.error):
            raise JournalError("the last entry tells neither an end nor a failure")
        if entry.seq >= 0:
            self._mark(entry.seq, [0])
        self._end = entry

    def _mark(self, first_seq: int, nums: list[int]) -> None:
        """Put events in the place of those that had their numbers or later ones.

        Args:
            first_seq: Of the first one.
            nums: For each one the tokens that it brings beyond those that are known.
        """
        while self._marks and self._marks[-1][0] >= first_seq:
            self._marks.pop()
        num_tokens = len(self._tokens)
        for seq, num in enumerate(nums, start=first_seq):
            num_tokens += num
            self._marks.append((seq, num_tokens))
