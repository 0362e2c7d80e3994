"""The six methods of sluice.v1.Cache."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import AbstractAsyncContextManager
from typing import Any

import grpc

from cluster.errors import InvalidArgumentError, PermissionDeniedError, SluiceError
from cluster.gateway.cache_intake import read_inspected, read_prefix
from cluster.gateway.identity import Caller, caller_of
from cluster.gateway.parts import GatewayParts
from cluster.gateway.prefix_keeper import PrefixKeeper
from cluster.gateway.prefix_record import PrefixRecord
from cluster.gateway.prefixes import STORE_IS_SILENT
from cluster.gateway.servicer import remaining_of
from cluster.gateway.status import ending
from cluster.gateway.stored_blocks import Layout, Prompt, StoredBlocks
from cluster.gateway.tiers import tiers_to_proto
from cluster.kvstore.block_hash import router_key
from cluster.rpc.sluice.v1 import cache_pb2

logger = logging.getLogger(__name__)

_FLUSH_TIMEOUT_S = 5.0  # of one leader
_STORED_TIMEOUT_S = 2.0  # for blocks that were computed to be in the store
_STORED_POLL_S = 0.05
_ALL = "*"  # tenants; no name of one
_NO_STORE = "store.kv_url=off: no blocks are stored"

_Context = grpc.aio.ServicerContext[Any, Any]


class CacheServicer:
    """Serves clients; every method authenticates, and ends with an answer or a status.

    Args:
        parts: Of the gateway.
        keeper: Computes prefixes and looks after them.
        blocks: Of the store.
    """

    def __init__(self, parts: GatewayParts, keeper: PrefixKeeper, blocks: StoredBlocks) -> None:
        self._parts = parts
        self._keeper = keeper
        self._blocks = blocks

    async def RegisterPrefix(
        self, request: cache_pb2.RegisterPrefixRequest, context: _Context
    ) -> cache_pb2.RegisterPrefixResponse:
        """Record a prefix, have it computed, and wait a moment for its blocks to be stored.

        Where computing fails the call does, but the prefix stays registered: it is computed later,
        and the same call may be made again. What a limit refuses is not registered.
        """
        async with self._ending(context):
            caller = self._caller(context)
            record = await read_prefix(self._parts, request, caller)
            is_kept, limiter = False, self._parts.rate_limiter
            # What is kept is computed, by this call or by the keeper, so from then on it counts.
            async with limiter.admit(caller, record.num_tokens, 1, lambda: int(is_kept)):
                record = await self._parts.prefixes.put(record)
                is_kept = True
                await self._keeper.compute(record, caller.salt, remaining_of(context))
            prompt = Prompt(record.token_ids, caller.salt)
            num_stored = await self._await_stored(prompt, remaining_of(context)())
        return cache_pb2.RegisterPrefixResponse(prefix=self._prefix(record, num_stored))

    async def ListPrefixes(
        self, request: cache_pb2.ListPrefixesRequest, context: _Context
    ) -> cache_pb2.ListPrefixesResponse:
        """Answer with the prefixes asked for; of a store that does not answer none has blocks."""
        async with self._ending(context):
            tenant = self._owner(request, context)
            prefixes = self._parts.prefixes
            records = prefixes.records if tenant == _ALL else prefixes.of_tenant(tenant)
            response, is_up = cache_pb2.ListPrefixesResponse(), True
            for record in records:
                num_stored, salt = 0, self._parts.authenticator.salt_of(record.tenant)
                if is_up and salt is not None:
                    num_stored, reason = await self._count(Prompt(record.token_ids, salt))
                    is_up = not reason
                response.prefixes.append(self._prefix(record, num_stored))
        return response

    async def RemovePrefix(
        self, request: cache_pb2.RemovePrefixRequest, context: _Context
    ) -> cache_pb2.RemovePrefixResponse:
        """Forget a name, and pin its blocks no more."""
        async with self._ending(context):
            tenant = self._owner(request, context)
            removed = await self._parts.prefixes.remove(tenant, request.name)
            if removed is not None:
                await self._keeper.release(removed)
        return cache_pb2.RemovePrefixResponse()

    async def CacheStats(
        self, request: cache_pb2.CacheStatsRequest, context: _Context
    ) -> cache_pb2.CacheStatsResponse:
        """Answer with the store's books and each replica's tiers."""
        async with self._ending(context):
            self._admin(context)
            response = cache_pb2.CacheStatsResponse(replicas=self._replica_caches())
            if self._blocks.store is None:
                response.store_error = _NO_STORE
                return response
            try:
                stats = await self._blocks.store.stats()
            except SluiceError as error:
                response.store_error = str(error)
                return response
            response.store.used_bytes, response.store.max_bytes = stats.used_bytes, stats.max_bytes
            response.store.num_blocks = stats.num_blocks
            response.store.num_pinned_blocks = stats.num_pinned
            response.store.num_evicted = stats.num_evicted
        return response

    async def FlushCache(
        self, request: cache_pb2.FlushCacheRequest, context: _Context
    ) -> cache_pb2.FlushCacheResponse:
        """Empty what is asked for; registered prefixes are computed again soon."""
        async with self._ending(context):
            self._admin(context)
            if not (request.replicas or request.store):
                raise InvalidArgumentError(
                    "nothing to flush: set replicas, store, or both", field="replicas"
                )
            if request.store and self._blocks.store is None:
                raise InvalidArgumentError(f"{_NO_STORE}: flush replicas only", field="store")
            response = cache_pb2.FlushCacheResponse()
            if request.replicas:
                await self._flush_replicas(response)
            if request.store and self._blocks.store is not None:
                response.num_store_blocks = await self._blocks.store.flush()
            await self._keeper.wake_all()
        return response

    async def InspectCache(
        self, request: cache_pb2.InspectCacheRequest, context: _Context
    ) -> cache_pb2.InspectCacheResponse:
        """Answer with how much of a prompt is where, for the caller's tenant."""
        async with self._ending(context):
            caller = self._caller(context)
            prompt = Prompt(await read_inspected(self._parts, request, caller), caller.salt)
            num_stored, store_error = await self._count(prompt)
            if store_error and not caller.is_admin and self._blocks.store is not None:
                store_error = STORE_IS_SILENT  # the reason may name hosts and users
            return cache_pb2.InspectCacheResponse(
                num_tokens=len(prompt.token_ids),
                num_blocks=self._num_blocks(len(prompt.token_ids)),
                num_stored_blocks=num_stored,
                store_error=store_error,
                replicas=self._cached_on(prompt),
            )

    async def _await_stored(self, prompt: Prompt, remaining_s: float | None) -> int:
        """Return how many blocks are stored, as soon as all are, or after a moment."""
        wait_s = _STORED_TIMEOUT_S
        if self._blocks.store is None or not self._parts.config.writes_blocks:
            wait_s = 0.0
        elif remaining_s is not None:
            wait_s = min(wait_s, remaining_s / 2)
        give_up_s = time.monotonic() + wait_s
        num_stored, reason = await self._count(prompt)
        while not reason and num_stored < self._num_blocks(len(prompt.token_ids)):
            if time.monotonic() >= give_up_s:
                break
            await asyncio.sleep(_STORED_POLL_S)
            num_stored, reason = await self._count(prompt)
        return num_stored

    async def _count(self, prompt: Prompt) -> tuple[int, str]:
        """Return how many leading blocks are stored, and why the store could not be asked."""
        if self._blocks.store is None:
            return 0, _NO_STORE
        try:
            return await self._blocks.count(prompt), ""
        except SluiceError as error:
            logger.info("stored blocks are not counted: %s", error)
            return 0, str(error)

    async def _flush_replicas(self, response: cache_pb2.FlushCacheResponse) -> None:
        links = self._parts.fleet.links
        results = await asyncio.gather(
            *(link.flush_cache(_FLUSH_TIMEOUT_S) for link in links), return_exceptions=True
        )
        for link, result in zip(links, results, strict=True):
            if isinstance(result, SluiceError):
                response.failed_replica_ids.append(link.info.replica_id)
            elif isinstance(result, BaseException):
                raise result
            else:
                response.num_replica_blocks += result

    def _replica_caches(self) -> list[cache_pb2.ReplicaCache]:
        return [
            cache_pb2.ReplicaCache(
                replica_id=replica.info.replica_id,
                num_blocks=replica.load.num_blocks,
                num_free_blocks=replica.load.num_free_blocks,
                num_prefix_query_tokens=replica.load.num_prefix_query_tokens,
                num_prefix_hit_tokens=replica.load.num_prefix_hit_tokens,
                tiers=tiers_to_proto(replica.load.cache),
            )
            for replica in self._parts.fleet.table.snapshots()
        ]

    def _cached_on(self, prompt: Prompt) -> list[cache_pb2.CachedOn]:
        keys: dict[Layout, list[int]] = {}
        found = []
        for replica in self._parts.fleet.table.snapshots():
            layout = Layout.of(replica.info)
            if layout not in keys:
                hashes = layout.hashes(prompt.token_ids, prompt.salt)
                keys[layout] = [router_key(block_hash) for block_hash in hashes]
            replica_id = replica.info.replica_id
            num_blocks = self._parts.fleet.index.longest_prefix(replica_id, keys[layout])
            found.append(cache_pb2.CachedOn(replica_id=replica_id, num_blocks=num_blocks))
        return found

    def _prefix(self, record: PrefixRecord, num_stored_blocks: int) -> cache_pb2.Prefix:
        return cache_pb2.Prefix(
            name=record.name,
            model=record.model,
            num_tokens=record.num_tokens,
            num_blocks=self._num_blocks(record.num_tokens),
            num_stored_blocks=num_stored_blocks,
            registered_at_s=record.registered_at_s,
            tenant=record.tenant,
        )

    def _num_blocks(self, num_tokens: int) -> int:
        return num_tokens // self._parts.config.cache.block_size

    def _caller(self, context: _Context) -> Caller:
        return caller_of(self._parts.authenticator, context)

    def _owner(
        self,
        request: cache_pb2.ListPrefixesRequest | cache_pb2.RemovePrefixRequest,
        context: _Context,
    ) -> str:
        """Return whose prefixes a request is about.

        Raises:
            PermissionDeniedError: They are another tenant's, and the caller is no administrator.
        """
        caller = self._caller(context)
        if not request.HasField("tenant") or request.tenant == caller.tenant:
            return caller.tenant
        self._check_admin(caller)
        return request.tenant

    def _admin(self, context: _Context) -> None:
        self._check_admin(self._caller(context))

    def _check_admin(self, caller: Caller) -> None:
        """Raise unless the caller may see and touch what belongs to others.

        Raises:
            PermissionDeniedError: It may not.
        """
        if not caller.is_admin:
            raise PermissionDeniedError(
                f"tenant {caller.tenant!r} is no administrator: ask one, or have `admin: true` set "
                "in the tenants file"
            )

    def _ending(self, context: _Context) -> AbstractAsyncContextManager[None]:
        count = self._parts.metrics.requests
        return ending(context, "-", lambda code: count.labels(code).inc())
