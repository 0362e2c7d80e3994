"""The registered prefixes: recorded in the store, known to every gateway.

    register ──► store's records ──► every gateway's memory ──► a request names one
                     ▲    polled once a second, and when a name is not known
                     └──── put back by the gateways where the store has lost them

A record of its own, the epoch, tells a store that was emptied from one in which prefixes were
removed: it is written with the first prefix and never removed.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable

from cluster.config import GatewayConfig
from cluster.errors import (
    AlreadyExistsError,
    NotFoundError,
    OverloadedError,
    SluiceError,
    UnavailableError,
)
from cluster.gateway.identity import Caller
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
_EPOCH = "epoch"  # no record's key: these are hexadecimal digests
_EPOCH_BYTES = 16


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
        self._lock = asyncio.Lock()
        self._loaded_s = -1.0  # when the last look at the store began
        self._load_error: SluiceError | None = None  # how it ended
        self._unreadable: set[str] = set()
        self._task: asyncio.Task[None] | None = None
        self.on_store_back: Callable[[], None] = lambda: None
        """Called when the store answers again, or has turned out to be emptied."""

    @property
    def records(self) -> list[PrefixRecord]:
        """All prefixes of all tenants, ordered by tenant and name."""
        return sorted(self._records.values(), key=lambda record: (record.tenant, record.name))

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
            try:
                await self.refresh()
            except SluiceError as error:
                raise UnavailableError(
                    f"prefix={name[:128]!r} is not known to this gateway, and the store that would "
                    f"know it does not answer ({error}): try again"
                ) from error
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
            OverloadedError: There are as many prefixes as there may be.
            UnavailableError: The store does not answer.
        """
        key = record_key(record.tenant, record.name)
        await self.refresh()
        if (known := self._records.get(key)) is not None:
            return _same(known, record)
        limit = self._config.max_prefixes
        if len(self._records) >= limit:
            raise OverloadedError(
                f"{len(self._records)} prefixes are registered, gateway.max_prefixes={limit}: "
                "remove one first"
            )
        if not self._epoch:
            self._epoch = secrets.token_bytes(_EPOCH_BYTES)
            await self._store.put_record(PREFIX_RECORDS, _EPOCH, self._epoch)
        await self._store.put_record(PREFIX_RECORDS, key, encode_record(record))
        self._records[key] = record
        await self.refresh()  # another gateway may have been asked for the name at the same time
        return _same(self._records.get(key, record), record)

    async def remove(self, tenant: str, name: str) -> PrefixRecord:
        """Forget a prefix; return what it was.

        Raises:
            NotFoundError: The tenant has no such prefix.
            UnavailableError: The store does not answer.
        """
        await self.refresh()
        key = record_key(tenant, name)
        if (record := self._records.get(key)) is None:
            raise NotFoundError(f"prefix={name[:128]!r} is not registered: nothing to remove")
        await self._store.drop_record(PREFIX_RECORDS, key)
        self._records.pop(key, None)
        return record

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
        listed = await self._store.list_records(PREFIX_RECORDS, self._version)
        if listed.values is None:
            return
        values = dict(listed.values)
        epoch = values.pop(_EPOCH, b"")
        if self._records and epoch != self._epoch:
            await self._restore(epoch, values)
            self.on_store_back()
            return
        self._epoch, self._version = epoch, listed.version
        self._records = self._decode(values)

    async def _restore(self, epoch: bytes, values: dict[str, bytes]) -> None:
        """Put back what an emptied store lost; the next look takes whatever is there then."""
        lost = {key: record for key, record in self._records.items() if key not in values}
        if lost:
            logger.warning(
                "the store has lost %d registered prefixes: they are written again", len(lost)
            )
        for key, record in lost.items():
            await self._store.put_record(PREFIX_RECORDS, key, encode_record(record))
        if not epoch:
            epoch = self._epoch
            await self._store.put_record(PREFIX_RECORDS, _EPOCH, epoch)
        self._epoch = epoch

    def _decode(self, values: dict[str, bytes]) -> dict[str, PrefixRecord]:
        records = {}
        for key, value in values.items():
            record = decode_record(key, value)
            if record is not None:
                records[key] = record
            elif key not in self._unreadable:
                logger.warning("a registered prefix cannot be read and is left out: %.40s", key)
        self._unreadable = values.keys() - records.keys()
        return records

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


def _same(known: PrefixRecord, record: PrefixRecord) -> PrefixRecord:
    if (known.model, known.token_ids) != (record.model, record.token_ids):
        raise AlreadyExistsError(
            f"name={record.name!r} stands for another prefix of {len(known.token_ids)} tokens: "
            "remove it first, or choose another name"
        )
    return known
