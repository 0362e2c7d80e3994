"""Keeps the blocks of registered prefixes in the store: computed once, pinned, renewed.

One gateway does it for all: of those that hold a lease of the kind `prefix-keeper`, the one with
the first id. Nothing waits for it. A pin ends after `store.kv_ttl_s`, so what no round renews any
more is evicted like other blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

from cluster.errors import SluiceError
from cluster.gateway.generation import Generation
from cluster.gateway.parts import ClientCall, GatewayParts
from cluster.gateway.prefix_record import PrefixRecord, record_key
from cluster.gateway.stored_blocks import Prompt, StoredBlocks
from cluster.kvstore.store import Store
from cluster.rpc.sluice.v1 import inference_pb2
from cluster.types import EngineRequest, SamplingParams

logger = logging.getLogger(__name__)

KEEPER_LEASES = "prefix-keeper"
_MAX_INTERVAL_S = 30.0  # between two rounds
_ROUNDS_PER_TTL = 3  # so often within the time that the store keeps an unused block
_RETRY_S = 2.0  # after a round that the store has cut short
_JITTER = 0.2  # share of the interval
_COMPUTE_TIMEOUT_S = 300.0
_MAX_BACKOFF = 5  # a prefix that never stays is computed in one round of 2 ** this


class PrefixKeeper:
    """Computes registered prefixes, and looks after their blocks in rounds.

    Args:
        parts: Of the gateway.
        store: Of the leases; stays the caller's.
        blocks: Of the store.
    """

    def __init__(self, parts: GatewayParts, store: Store, blocks: StoredBlocks) -> None:
        self._parts = parts
        self._store = store
        self._blocks = blocks
        self._interval_s = min(_MAX_INTERVAL_S, parts.config.store.kv_ttl_s / _ROUNDS_PER_TTL)
        self._wake = asyncio.Event()
        self._num_rounds = 0
        self._num_tries: dict[str, int] = {}  # computed in vain, by record
        self._is_failing = False
        self._task: asyncio.Task[None] | None = None
        parts.prefixes.on_store_back = self.wake

    def start(self) -> None:
        """Begin the rounds."""
        self._task = asyncio.create_task(self._run(), name="prefix-keeper")

    async def stop(self) -> None:
        """End them; another gateway goes on at once."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.wait([self._task])
        with contextlib.suppress(SluiceError):
            await self._store.drop_lease(KEEPER_LEASES, self._parts.gateway_id)

    def wake(self) -> None:
        """Look after all prefixes now: the store may have lost them."""
        self._num_tries.clear()
        self._wake.set()

    async def wake_all(self) -> None:
        """Have whichever gateway it is that keeps the prefixes look after them soon."""
        self.wake()
        try:
            await self._parts.prefixes.announce_flush()
        except SluiceError as error:
            logger.warning("only this gateway knows that blocks were flushed: %s", error)

    async def compute(
        self, record: PrefixRecord, salt: bytes, remaining_s: Callable[[], float | None]
    ) -> None:
        """Have a replica compute a prefix, and write it to the store, pinned.

        Args:
            record: Of the prefix.
            salt: Of its tenant.
            remaining_s: Seconds to the deadline; None is no bound.

        Raises:
            SluiceError: As any request.
        """
        request_id = f"prefix.{record.name}.{self._parts.rng.getrandbits(128):032x}"
        sampling = SamplingParams(max_tokens=1, temperature=0.0)
        request = EngineRequest(
            request_id,
            record.token_ids,
            sampling,
            salt=salt,
            pins_prefix=True,
            tenant=record.tenant,
            tenant_weight=self._parts.authenticator.weight_of(record.tenant),
        )
        with self._parts.admission.admit(request_id):
            call = ClientCall(request_id, remaining_s, _discard)
            await Generation(self._parts, call, request).run()

    async def release(self, record: PrefixRecord) -> None:
        """Let the blocks of a removed prefix be evicted, but for those that others need.

        What is not reached here, as blocks of a replica that is gone or of a store that does not
        answer, loses its pin by itself: a pin lasts `store.kv_ttl_s` and is renewed in rounds only.
        """
        prompt = self._prompt(record)
        if prompt is None:
            return
        records = self._parts.prefixes.records
        others = [other for other in map(self._prompt, records) if other is not None]
        try:
            await self._blocks.unpin(prompt, others)
        except SluiceError as error:
            logger.warning("blocks of a removed prefix stay until their pins end: %s", error)

    async def keep_all(self) -> None:
        """Do one round: renew and pin what is stored, compute what is not.

        Raises:
            UnavailableError: The store does not answer.
        """
        parts, records = self._parts, self._parts.prefixes.records
        if self._blocks.store is None or not parts.config.writes_blocks:
            return  # what is computed would not be stored
        if not records or not len(parts.fleet.table) or not await self._is_keeper():
            return
        self._num_rounds += 1
        for record in records:
            # Computing takes long: meanwhile the prefix may have been removed, and another gateway
            # may have become the keeper.
            if not await self._is_keeper():
                return
            await parts.prefixes.refresh()
            if record in parts.prefixes:
                await self._keep(record)

    async def _keep(self, record: PrefixRecord) -> None:
        prompt = self._prompt(record)
        if prompt is None or record.model != self._parts.config.model.served_name:
            return  # its tenant, or its model, is not served any more
        try:
            if await self._blocks.pin(prompt):
                self._num_tries.pop(record_key(record.tenant, record.name), None)
            else:
                await self._recompute(record, prompt)
        except SluiceError:
            raise
        except Exception:  # the others are looked after all the same
            logger.exception("looking after prefix %s failed", record.name)

    async def _recompute(self, record: PrefixRecord, prompt: Prompt) -> None:
        """Compute what the store has lost; what never stays there, ever more rarely."""
        key = record_key(record.tenant, record.name)
        num_tries = self._num_tries.get(key, 0)
        if self._num_rounds % 2**num_tries:
            return
        self._num_tries[key] = min(num_tries + 1, _MAX_BACKOFF)
        try:
            async with asyncio.timeout(_COMPUTE_TIMEOUT_S), self._lease_kept():
                await self.compute(record, prompt.salt, lambda: _COMPUTE_TIMEOUT_S)
        except (SluiceError, TimeoutError) as error:
            logger.info("prefix %s was not computed, tried again later: %s", record.name, error)

    async def _is_keeper(self) -> bool:
        own = self._parts.gateway_id
        await self._renew_lease()
        return min(await self._store.list_leases(KEEPER_LEASES), default=own) == own

    async def _renew_lease(self) -> None:
        ttl_s = _ROUNDS_PER_TTL * self._interval_s
        await self._store.put_lease(KEEPER_LEASES, self._parts.gateway_id, b"", ttl_s)

    @contextlib.asynccontextmanager
    async def _lease_kept(self) -> AsyncIterator[None]:
        """Renew the lease for as long as this takes."""

        async def renew() -> None:
            while True:
                await asyncio.sleep(self._interval_s)
                with contextlib.suppress(SluiceError):
                    await self._renew_lease()

        task = asyncio.create_task(renew(), name="prefix-keeper-lease")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])  # so that it comes before a lease that is dropped

    def _prompt(self, record: PrefixRecord) -> Prompt | None:
        salt = self._parts.authenticator.salt_of(record.tenant)
        return None if salt is None else Prompt(record.token_ids, salt)

    async def _run(self) -> None:
        while True:
            wait_s = self._interval_s * self._parts.rng.uniform(1 - _JITTER, 1 + _JITTER)
            try:
                await self.keep_all()
                self._is_failing = False
            except SluiceError as error:
                if not self._is_failing:
                    logger.warning("registered prefixes are not looked after now: %s", error)
                self._is_failing, wait_s = True, min(wait_s, _RETRY_S)
            except Exception:
                logger.exception("looking after registered prefixes failed")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), wait_s)
            self._wake.clear()


async def _discard(event: inference_pb2.GenerateStreamResponse) -> None:
    """Take an event that nobody waits for."""
