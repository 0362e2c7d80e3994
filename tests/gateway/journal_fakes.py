"""A store of journals that fails when told to, and requests to journal."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from enum import Enum, auto
from typing import Any

from cluster.clock import VirtualClock
from cluster.config import StoreConfig
from cluster.errors import UnavailableError
from cluster.gateway.journal_record import JournalHeader, JournalState, read_state
from cluster.kvstore.embedded import EmbeddedStore
from cluster.kvstore.store import JournalWrite, JournalWrites
from cluster.types import SampledToken, SamplingParams


class Fault(Enum):
    """What happens to a call of the store."""

    NONE = auto()
    REFUSED = auto()  # nothing happens
    UNANSWERED = auto()  # it happens, and nobody is told
    BROKEN = auto()  # the store has a bug


class JournalStore(EmbeddedStore):
    """Remembers the writes of each call."""

    def __init__(self, **config: Any) -> None:
        self.clock = VirtualClock()
        super().__init__(StoreConfig(**config), clock=self.clock)
        self.fault = Fault.NONE
        self.gate = asyncio.Event()  # calls wait for it
        self.gate.set()
        self.calls: list[list[JournalWrite]] = []
        self.num_inside = 0

    async def write_journals(self, writes: Sequence[JournalWrite]) -> JournalWrites:
        assert not self.num_inside, "two calls of one gateway overlap"
        self.num_inside += 1
        self.calls.append(list(writes))
        try:
            await self.gate.wait()
            if self.fault is Fault.REFUSED:
                raise UnavailableError("the store is away")
            if self.fault is Fault.BROKEN:
                raise RuntimeError("a bug")
            done = await super().write_journals(writes)
            if self.fault is Fault.UNANSWERED:
                raise UnavailableError("the store did not answer in time")
            return done
        finally:
            self.num_inside -= 1

    async def state(self, request_id: str = "r1") -> JournalState:
        journal = await self.read_journal(request_id)
        assert journal is not None
        return read_state(journal.entries)


def header(request_id: str = "r1", tenant: str = "alice", **sampling: Any) -> JournalHeader:
    params = SamplingParams(**({"max_tokens": 64} | sampling))
    return JournalHeader(request_id, tenant, (5, 6, 7), params)


def tokens(*ids: int) -> list[SampledToken]:
    return [SampledToken(token_id) for token_id in ids]


def ids(state: JournalState) -> list[int]:
    return [token.token_id for token in state.tokens]
