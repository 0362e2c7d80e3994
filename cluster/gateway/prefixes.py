"""The registered prefixes: recorded in the store, known to every gateway.

    register ──► store's records ──► every gateway's memory ──► a request names one
                     ▲    polled once a second, and when a name is not known
                     └──── put back by the gateways where the store has lost them

A record of its own, the epoch, tells a store that was emptied from one in which prefixes were
removed: it is written with the first prefix and never removed. Another one changes with each flush
of blocks, so that the gateway that keeps them stored hears of it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cluster.config import GatewayConfig
from cluster.errors import (
    AlreadyExistsError,
    NotFoundError,
    SluiceError,
    UnavailableError,
)
from cluster.gateway.identity import Caller
from cluster.gateway.prefix_limits import check_room
from cluster.gateway.prefix_record import (
    PREFIX_RECORDS,
    PrefixRecord,
    decode_record,
    encode_record,
    record_key,
)
from cluster.kvstore.store import Store

logger = logging.getLogger(__name__)

POLL_INTERVAL_S = 1.0
STORE_IS_SILENT = "the store does not answer"  # all that a tenant is told of it
_EPOCH = "epoch"  # no record's key, as the next one: these are hexadecimal digests
_FLUSH = "flush"
_RANDOM_BYTES = 16
_MAX_LISTS = 4  # in one look: each gateway that puts prefixes back at the same time may cost one


class Prefixes:
    """What this gateway knows of the registered prefixes; what is known survives the store.

    Args:
        store: Holds the records; stays the caller's.
        config: Of the gateway: the limits.
        model: Name of the one that is served.
        vocab_size: Its token ids are below this.
    """

    def __init__(self, store: Store, config: GatewayConfig, *, model: str, vocab_size: int) -> None:
        self._store = store
        self._config = config
        self._model = model
        self._vocab_size = vocab_size
        self._records: dict[str, PrefixRecord] = {}  # by key, of all tenants
        self._version = ""
        self._epoch = b""
        self._flush: bytes | None = None  # None: not looked yet
        self._lock = asyncio.Lock()
        self._loaded_s = -1.0  # when the last look at the store began
        self._load_error: SluiceError | None = None  # how it ended
        self._unreadable: set[str] = set()
        self._task: asyncio.Task[None] | None = None
        self.on_store_back: Callable[[], None] = lambda: None
        """Called when the store answers again, was emptied, or its blocks were flushed."""

    @property
    def records(self) -> list[PrefixRecord]:
        """All prefixes of all tenants, ordered by tenant and name."""
        return sorted(self._records.values(), key=lambda record: (record.tenant, record.name))

    def __contains__(self, record: PrefixRecord) -> bool:
        """Return whether this very record is registered still."""
        return self._records.get(record_key(record.tenant, record.name)) == record

    def of_tenant(self, tenant: str) -> list[PrefixRecord]:
        """Return a tenant's prefixes, by name."""
        return [record for record in self.records if record.tenant == tenant]

    def start(self) -> None:
        """Begin to follow the store."""
        self._task = asyncio.create_task(self._poll(), name="prefixes")

    async def stop(self) -> None:
        """Follow it no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def tokens_of(self, caller: Caller, name: str, model: str) -> tuple[int, ...]:
        """Return the tokens of one of the caller's prefixes.

        Args:
            caller: Whose prefix.
            name: Of the prefix.
            model: That goes on after it; empty is the only one served.

        Raises:
            NotFoundError: The caller has no such prefix, or it was registered for another model.
            UnavailableError: It is not known here, and the store cannot be asked.
        """
        return (await self.find(caller.tenant, name, model)).token_ids

    async def find(self, tenant: str, name: str, model: str = "") -> PrefixRecord:
        """Return a tenant's prefix; raises what `tokens_of` does."""
        key = record_key(tenant, name)
        if key not in self._records:
            with _for_client(f"prefix={name[:128]!r} is not known to this gateway, and "):
                await self.refresh()
        record = self._records.get(key)
        if record is None:
            raise NotFoundError(f"prefix={name[:128]!r} is not registered: register it first")
        if record.model != (model or self._model) or not self._is_servable(record):
            raise NotFoundError(
                f"prefix={name[:128]!r} was registered for model {record.model[:100]!r} as it was "
                "then: remove it and register it again"
            )
        return record

    async def put(self, record: PrefixRecord) -> PrefixRecord:
        """Register a prefix; return the record, the older one where it is registered already.

        Raises:
            AlreadyExistsError: The name stands for other tokens.
            OverloadedError: There are as many prefixes or tokens as there may be.
            UnavailableError: The store does not answer.
        """
        with _for_client():
            await self.refresh()
            async with self._lock:  # no look that began before ends after, here as in `remove`
                if await self._write(record):
                    return record
            await self.refresh()  # another gateway was asked for the name at the same time
        known = self._records.get(record_key(record.tenant, record.name))
        if known is None:
            raise UnavailableError(
                f"name={record.name!r} was registered and removed at the same time: try again"
            )
        return _same(known, record)

    async def _write(self, record: PrefixRecord) -> bool:
        """Return whether the record is new, and what is in the store now."""
        key = record_key(record.tenant, record.name)
        if key in self._records:
            return False
        check_room(record, self.records, self._config)
        if not self._epoch:
            epoch = secrets.token_bytes(_RANDOM_BYTES)
            if await self._store.put_record(PREFIX_RECORDS, _EPOCH, epoch, if_absent=True):
                self._epoch = epoch
        # What nobody can read is nobody's: it is replaced.
        is_written = await self._store.put_record(
            PREFIX_RECORDS, key, encode_record(record), if_absent=key not in self._unreadable
        )
        if is_written:
            self._records[key] = record
        return is_written

    async def remove(self, tenant: str, name: str) -> PrefixRecord | None:
        """Forget a prefix; return what it was, None where that cannot be read.

        A known one is dropped without a look at the others, so that one gets out of a registry
        that has become too large to be read.

        Raises:
            NotFoundError: The tenant has no such prefix.
            UnavailableError: The store does not answer.
        """
        key = record_key(tenant, name)
        if key not in self._records:
            try:
                await self.refresh()
            except SluiceError as error:
                logger.info("a prefix is removed unseen: %s", error)
            else:
                if key not in self._records and key not in self._unreadable:
                    raise NotFoundError(
                        f"prefix={name[:128]!r} is not registered: nothing to remove"
                    )
        with _for_client():
            async with self._lock:
                await self._store.drop_record(PREFIX_RECORDS, key)
                return self._records.pop(key, None)

    async def announce_flush(self) -> None:
        """Have every gateway call `on_store_back` soon.

        Raises:
            UnavailableError: The store does not answer.
        """
        flush = secrets.token_bytes(_RANDOM_BYTES)
        await self._store.put_record(PREFIX_RECORDS, _FLUSH, flush)

    async def refresh(self) -> None:
        """Take what the store has now; those who ask at the same time share one answer.

        Raises:
            UnavailableError: The store does not answer; what is known is kept.
        """
        asked_s = time.monotonic()
        async with self._lock:
            if self._loaded_s < asked_s:  # no look has begun and ended since
                await self._look()
            elif self._load_error is not None:
                raise self._load_error

    async def _look(self) -> None:
        begun_s = time.monotonic()
        try:
            await self._load()
        except SluiceError as error:
            self._loaded_s, self._load_error = begun_s, error
            raise
        was_down = self._load_error is not None
        self._loaded_s, self._load_error = begun_s, None
        if was_down:
            self.on_store_back()

    async def _load(self) -> None:
        is_emptied = False
        for _ in range(_MAX_LISTS):
            listed = await self._store.list_records(PREFIX_RECORDS, self._version)
            if listed.values is None:
                return
            epoch = listed.values.get(_EPOCH, b"")
            if not self._records or epoch == self._epoch:
                break
            await self._restore(epoch, listed.values)
            is_emptied = True
        else:
            raise UnavailableError("the store was emptied while prefixes were written back to it")
        await self._take(listed.version, listed.values)
        if is_emptied:
            self.on_store_back()

    async def _take(self, version: str, values: dict[str, bytes]) -> None:
        values = dict(values)
        epoch, flush = values.pop(_EPOCH, b""), values.pop(_FLUSH, b"")
        records = await asyncio.to_thread(_decode, values)
        for key in values.keys() - records.keys() - self._unreadable:
            logger.warning("a registered prefix cannot be read and is left out: %.40s", key)
        is_flushed = bool(flush) and self._flush not in (None, flush)
        self._records, self._unreadable = records, values.keys() - records.keys()
        self._epoch, self._flush, self._version = epoch, flush, version
        if is_flushed:
            self.on_store_back()

    async def _restore(self, epoch: bytes, values: dict[str, bytes]) -> None:
        """Put back what an emptied store lost; what others registered there since stays."""
        lost = {key: record for key, record in self._records.items() if key not in values}
        if lost:
            logger.warning(
                "the store has lost %d registered prefixes: they are written again", len(lost)
            )
        for key, record in lost.items():
            value = encode_record(record)
            await self._store.put_record(PREFIX_RECORDS, key, value, if_absent=True)
        if not epoch:
            epoch = self._epoch
            await self._store.put_record(PREFIX_RECORDS, _EPOCH, epoch, if_absent=True)
        self._epoch = epoch

    def _is_servable(self, record: PrefixRecord) -> bool:
        return record.model == self._model and max(record.token_ids) < self._vocab_size

    async def _poll(self) -> None:
        while True:
            was_up = self._load_error is None
            try:
                await self.refresh()
            except SluiceError as error:
                if was_up:
                    logger.warning("registered prefixes: %s; known ones are kept", error)
            except Exception:
                logger.exception("looking for registered prefixes failed")
            await asyncio.sleep(POLL_INTERVAL_S)


def _decode(values: dict[str, bytes]) -> dict[str, PrefixRecord]:
    decoded = {key: decode_record(key, value) for key, value in values.items()}
    return {key: record for key, record in decoded.items() if record is not None}


@contextmanager
def _for_client(circumstance: str = "") -> Iterator[None]:
    """Keep from clients what a store says of itself: addresses, users, its own errors."""
    try:
        yield
    except UnavailableError as error:
        logger.info("registered prefixes: %s", error)
        raise UnavailableError(f"{circumstance}{STORE_IS_SILENT}: try again") from error


def _same(known: PrefixRecord, record: PrefixRecord) -> PrefixRecord:
    if (known.model, known.packed_tokens) != (record.model, record.packed_tokens):
        raise AlreadyExistsError(
            f"name={record.name!r} stands for another prefix of {known.num_tokens} tokens: "
            "remove it first, or choose another name"
        )
    return known
