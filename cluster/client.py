"""Clients of a cluster, one for plain and one for asyncio programs.

    with Client("127.0.0.1:9000") as client:
        print(client.generate("def main():", sampling={"max_tokens": 32}).text)

Both raise the errors of `cluster/errors.py`. A stream that is cut off goes on by itself, at the
next gateway where several are known, and its caller sees the exact stream; `resume_timeout_s=0`
turns that off. What changes something and may have been done is not asked again.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing, closing
from types import TracebackType
from typing import Self, Unpack

from cluster.rpc import queries
from cluster.rpc.aio_gateways import AioGateways
from cluster.rpc.completion import CompletionParts
from cluster.rpc.connection import FilePath, Metadata, Tls, access_of
from cluster.rpc.gateways import Gateways
from cluster.rpc.public import (
    ClusterState,
    Completion,
    Event,
    Finished,
    ReplicaState,
    Resumed,
    Running,
    ScoredToken,
    ServedModel,
    TextDelta,
    Timings,
    Usage,
)
from cluster.rpc.public_cache import (
    CacheBooks,
    CachedOn,
    Flushed,
    Inspected,
    Prefix,
    ReplicaCache,
    StoreBooks,
)
from cluster.rpc.public_route import Explanation, Queued, RouteCandidate
from cluster.rpc.queries import GENERATE_TIMEOUT_S
from cluster.rpc.stream_query import (
    RequestOptions,
    ResumeOptions,
    begin_stream,
    resume_stream,
)
from cluster.types import CacheLoad

__all__ = [
    "AsyncClient",
    "CacheBooks",
    "CacheLoad",
    "CachedOn",
    "Client",
    "ClusterState",
    "Completion",
    "Event",
    "Explanation",
    "Finished",
    "Flushed",
    "Inspected",
    "Prefix",
    "Queued",
    "ReplicaCache",
    "ReplicaState",
    "RequestOptions",
    "ResumeOptions",
    "Resumed",
    "RouteCandidate",
    "Running",
    "ScoredToken",
    "ServedModel",
    "StoreBooks",
    "TextDelta",
    "Timings",
    "Tls",
    "Usage",
]


class Client:
    """A connection for plain programs; threads may share it.

    Args:
        address: host:port of a gateway, or of several: the first that answers is asked first, and
            streams that are cut off go on at the next.
        ca_file: PEM file that verifies the gateway's certificate; None speaks plain text.
        tls: In place of `ca_file`, where the gateway demands a certificate of the client.
        api_key: Of a tenant, or a token; sent over TLS, or within this machine.
        metadata: Sent with every call.

    Raises:
        ConfigError: There is no address, a file cannot be read, or the key must not be sent.
    """

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        ca_file: FilePath | None = None,
        tls: Tls | None = None,
        api_key: str | None = None,
        metadata: Metadata = (),
    ) -> None:
        tls = Tls(ca_file) if ca_file else tls
        self._gateways = Gateways(access_of(address, tls=tls, api_key=api_key, metadata=metadata))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; calls under way end."""
        self._gateways.close()

    def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        **options: Unpack[RequestOptions],
    ) -> Completion:
        """Return the completion of a text, or of token ids.

        Args:
            prompt: Text to continue.
            token_ids: Ids of the model's tokenizer, in place of text.
            **options: See `RequestOptions`.

        Raises:
            OverloadedError: The request was refused; `retry_after_s` says when to try again.
            SluiceError: As the gateway says, or it is out of reach.
        """
        query = begin_stream(prompt, token_ids, **options)
        parts = CompletionParts(query.request_id)
        with closing(self._gateways.stream(query)) as events:
            for event in events:
                parts.add(event)
        return parts.completion()

    def stream(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        **options: Unpack[RequestOptions],
    ) -> Generator[Event, None, None]:
        """Yield the events of a completion; `Finished` is the last. Arguments as of `generate`.

        Closing the iterator cancels the request, unless it is detached.

        Raises:
            UnavailableError: The stream was cut off before `Finished`, and could not go on.
            SluiceError: As the gateway says, or it is out of reach.
        """
        return self._gateways.stream(begin_stream(prompt, token_ids, **options))

    def resume(
        self,
        request_id: str,
        after_seq: int | None = None,
        tokens_received: Sequence[int] = (),
        **options: Unpack[ResumeOptions],
    ) -> Generator[Event, None, None]:
        """Yield the further events of a request that another call, or program, began.

        A call that still carries the request ends with `SupersededError`.

        Args:
            request_id: Of the request; whoever resumes it must be of the tenant that began it.
            after_seq: The last event that came, counted from 0; None: all events from the first.
            tokens_received: Ids of all tokens that came with these events. Without them the
                position has to be in the journal, which is a fraction of a second behind.
            **options: See `ResumeOptions`.

        Raises:
            NotFoundError: The request is unknown, or its journal has expired.
            PermissionDeniedError: Another tenant began it.
            OutOfRangeError: The position is ahead of what is known.
            FailedPreconditionError: The tokens contradict the journal.
            SluiceError: As of `stream`.
        """
        return self._gateways.stream(
            resume_stream(request_id, after_seq, tokens_received, **options)
        )

    def tokenize(self, text: str, *, model: str = "") -> list[int]:
        """Return the token ids of a text."""
        return self._gateways.ask(queries.tokenize(text, model))

    def list_models(self) -> list[ServedModel]:
        """Return the models that the cluster serves."""
        return self._gateways.ask(queries.list_models())

    def status(self) -> ClusterState:
        """Return the replica groups and their load."""
        return self._gateways.ask(queries.status())

    def explain(self, request_id: str) -> Explanation:
        """Return why a request went where it went; ask soon, and the gateway that it went to.

        Raises:
            NotFoundError: This gateway does not remember it, or it was another tenant's.
        """
        return self._gateways.ask(queries.explain(request_id))

    def drain_replica(self, replica_id: str) -> int:
        """Make a replica hand over its requests and end; with tenants, for administrators.

        It returns at once: `status` no longer has the replica when it is gone.

        Args:
            replica_id: As in `status`.

        Returns:
            Requests that it will hand over, of all gateways.

        Raises:
            NotFoundError: There is no such replica.
        """
        return self._gateways.ask(queries.drain_replica(replica_id))

    def register_prefix(
        self,
        name: str,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        model: str = "",
        timeout_s: float = GENERATE_TIMEOUT_S,
    ) -> Prefix:
        """Name a prompt's beginning, have it computed and kept; requests then name it.

        The same name with the same prompt is no error.

        Args:
            name: 1 to 128 letters, digits, dots, dashes and underscores.
            prompt: Text that prompts will begin with.
            token_ids: Ids of the model's tokenizer, in place of text.
            model: Name; empty is the only one served.
            timeout_s: Deadline, computing included, seconds.

        Raises:
            AlreadyExistsError: The name stands for another prompt.
            SluiceError: As the gateway says, or it is out of reach.
        """
        return self._gateways.ask(
            queries.register_prefix(name, prompt, token_ids, model=model, timeout_s=timeout_s)
        )

    def list_prefixes(self, *, tenant: str | None = None) -> list[Prefix]:
        """Return registered prefixes, by tenant and name.

        Args:
            tenant: Whose; None: one's own. For administrators: any tenant, also one that is gone,
                or "*" for all.

        Raises:
            PermissionDeniedError: They are another tenant's, and the caller is no administrator.
        """
        return self._gateways.ask(queries.list_prefixes(tenant))

    def remove_prefix(self, name: str, *, tenant: str | None = None) -> None:
        """Forget a registered prefix.

        Args:
            name: As registered.
            tenant: Whose it is; None: one's own. For administrators: any tenant.

        Raises:
            NotFoundError: There is none of this name.
            PermissionDeniedError: It is another tenant's, and the caller is no administrator.
        """
        self._gateways.ask(queries.remove_prefix(name, tenant))

    def cache_stats(self) -> CacheBooks:
        """Return the books of the store and of each replica's tiers; for administrators."""
        return self._gateways.ask(queries.cache_stats())

    def flush_cache(self, *, replicas: bool = False, store: bool = False) -> Flushed:
        """Forget what is cached and used by no request; for administrators.

        Args:
            replicas: On devices and in host memory.
            store: In the store, of all tenants.
        """
        return self._gateways.ask(queries.flush_cache(replicas=replicas, store=store))

    def inspect_cache(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        prefix: str = "",
        model: str = "",
    ) -> Inspected:
        """Return how much of a prompt is cached where.

        Args:
            prompt: Text; it may be left out where there is a prefix.
            token_ids: Ids of the model's tokenizer, in place of text.
            prefix: Name of a registered prefix that comes before.
            model: Name; empty is the only one served.
        """
        return self._gateways.ask(
            queries.inspect_cache(prompt, token_ids, prefix=prefix, model=model)
        )


class AsyncClient:
    """A connection for asyncio programs: `Client`, with coroutines. Made in a running loop."""

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        ca_file: FilePath | None = None,
        tls: Tls | None = None,
        api_key: str | None = None,
        metadata: Metadata = (),
    ) -> None:
        tls = Tls(ca_file) if ca_file else tls
        self._gateways = AioGateways(
            access_of(address, tls=tls, api_key=api_key, metadata=metadata)
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections; calls under way end."""
        await self._gateways.close()

    async def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        **options: Unpack[RequestOptions],
    ) -> Completion:
        """Return a completion; see `Client.generate`. Cancelling the task cancels the request."""
        query = begin_stream(prompt, token_ids, **options)
        parts = CompletionParts(query.request_id)
        async with aclosing(self._gateways.stream(query)) as events:
            async for event in events:
                parts.add(event)
        return parts.completion()

    def stream(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        **options: Unpack[RequestOptions],
    ) -> AsyncGenerator[Event, None]:
        """Yield the events of a completion; see `Client.stream`."""
        return self._gateways.stream(begin_stream(prompt, token_ids, **options))

    def resume(
        self,
        request_id: str,
        after_seq: int | None = None,
        tokens_received: Sequence[int] = (),
        **options: Unpack[ResumeOptions],
    ) -> AsyncGenerator[Event, None]:
        """Yield the further events of an earlier request; see `Client.resume`."""
        return self._gateways.stream(
            resume_stream(request_id, after_seq, tokens_received, **options)
        )

    async def tokenize(self, text: str, *, model: str = "") -> list[int]:
        """Return the token ids of a text."""
        return await self._gateways.ask(queries.tokenize(text, model))

    async def list_models(self) -> list[ServedModel]:
        """Return the models that the cluster serves."""
        return await self._gateways.ask(queries.list_models())

    async def status(self) -> ClusterState:
        """Return the replica groups and their load."""
        return await self._gateways.ask(queries.status())

    async def explain(self, request_id: str) -> Explanation:
        """Return why a request went where it went; see `Client.explain`."""
        return await self._gateways.ask(queries.explain(request_id))

    async def drain_replica(self, replica_id: str) -> int:
        """Make a replica hand over its requests and end; see `Client.drain_replica`."""
        return await self._gateways.ask(queries.drain_replica(replica_id))

    async def register_prefix(
        self,
        name: str,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        model: str = "",
        timeout_s: float = GENERATE_TIMEOUT_S,
    ) -> Prefix:
        """Name a prompt's beginning, have it computed and kept; see `Client.register_prefix`."""
        return await self._gateways.ask(
            queries.register_prefix(name, prompt, token_ids, model=model, timeout_s=timeout_s)
        )

    async def list_prefixes(self, *, tenant: str | None = None) -> list[Prefix]:
        """Return registered prefixes, by tenant and name; see `Client.list_prefixes`."""
        return await self._gateways.ask(queries.list_prefixes(tenant))

    async def remove_prefix(self, name: str, *, tenant: str | None = None) -> None:
        """Forget a registered prefix; see `Client.remove_prefix`."""
        await self._gateways.ask(queries.remove_prefix(name, tenant))

    async def cache_stats(self) -> CacheBooks:
        """Return the books of the store and of each replica's tiers; for administrators."""
        return await self._gateways.ask(queries.cache_stats())

    async def flush_cache(self, *, replicas: bool = False, store: bool = False) -> Flushed:
        """Forget what is cached and used by no request; see `Client.flush_cache`."""
        return await self._gateways.ask(queries.flush_cache(replicas=replicas, store=store))

    async def inspect_cache(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        prefix: str = "",
        model: str = "",
    ) -> Inspected:
        """Return how much of a prompt is cached where; see `Client.inspect_cache`."""
        return await self._gateways.ask(
            queries.inspect_cache(prompt, token_ids, prefix=prefix, model=model)
        )
