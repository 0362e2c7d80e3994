"""Clients of a cluster, one for plain and one for asyncio programs.

    with Client("127.0.0.1:9000") as client:
        print(client.generate("def main():", sampling={"max_tokens": 32}).text)

Both raise the errors of `cluster/errors.py`. A request that has failed is not sent again: it may
have run.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack

import grpc

from cluster.rpc import queries
from cluster.rpc.connection import (
    CHANNEL_OPTIONS,
    FilePath,
    Metadata,
    Stub,
    Tls,
    channel_credentials,
    key_metadata,
    our_errors,
)
from cluster.rpc.event_stream import EventStream
from cluster.rpc.public import (
    ClusterState,
    Completion,
    Event,
    Finished,
    ReplicaState,
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
from cluster.rpc.public_route import (
    ClassName,
    Explanation,
    Queued,
    RouteCandidate,
)
from cluster.rpc.queries import GENERATE_TIMEOUT_S, Answer, Query
from cluster.rpc.sluice.v1 import inference_pb2
from cluster.types import CacheLoad, SamplingParams

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

Sampling = SamplingParams | Mapping[str, Any] | None


class RequestOptions(TypedDict, total=False):
    """What may be said of a request beside its prompt."""

    model: str  # name; empty is the only one served
    sampling: Sampling  # all parameters, or some of them by name
    timeout_s: float  # deadline of all of it, seconds
    request_id: str  # empty lets the gateway choose
    prefix: str  # name of a registered prefix that comes before the prompt
    service_class: ClassName | None  # interactive, standard or batch: whose objective it gets
    ttft_s: float | None  # an objective of its own, in place of a class: seconds to the first token
    tpot_s: float | None  # likewise, seconds per further token
    session: str  # requests of one session prefer the same replica; empty is none


class Client:
    """A connection for plain programs; threads may share it.

    Args:
        address: host:port of a gateway.
        ca_file: PEM file that verifies the gateway's certificate; None speaks plain text.
        tls: In place of `ca_file`, where the gateway demands a certificate of the client.
        api_key: Of a tenant, or a token; sent over TLS, or within this machine.
        metadata: Sent with every call.

    Raises:
        ConfigError: A file cannot be read, or the key must not be sent.
    """

    def __init__(
        self,
        address: str,
        *,
        ca_file: FilePath | None = None,
        tls: Tls | None = None,
        api_key: str | None = None,
        metadata: Metadata = (),
    ) -> None:
        credentials = channel_credentials(Tls(ca_file) if ca_file else tls)
        key = key_metadata(api_key, address, is_tls=credentials is not None)
        self._metadata = (*metadata, *key)
        self._channel = (
            grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
            if credentials is None
            else grpc.secure_channel(address, credentials, options=CHANNEL_OPTIONS)
        )
        self._stub = Stub(self._channel)

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
        """Close the connection; calls under way end."""
        self._channel.close()

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
        return self._ask(queries.generate(prompt, token_ids, **options))

    def stream(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        **options: Unpack[RequestOptions],
    ) -> Iterator[Event]:
        """Yield the events of a completion; `Finished` is the last. Arguments as of `generate`.

        Closing the iterator cancels the request.

        Raises:
            UnavailableError: The stream was cut off before `Finished`.
            SluiceError: As the gateway says, or it is out of reach.
        """
        query = queries.generate(prompt, token_ids, **options)
        events = EventStream()
        with our_errors():
            call = self._stub.GenerateStream(
                inference_pb2.GenerateStreamRequest(request=query.request),
                timeout=query.timeout_s,
                metadata=self._metadata,
            )
            try:
                for message in call:
                    if (event := events.read(message)) is not None:
                        yield event
            finally:
                call.cancel()
        events.check_end()

    def tokenize(self, text: str, *, model: str = "") -> list[int]:
        """Return the token ids of a text."""
        return self._ask(queries.tokenize(text, model))

    def list_models(self) -> list[ServedModel]:
        """Return the models that the cluster serves."""
        return self._ask(queries.list_models())

    def status(self) -> ClusterState:
        """Return the replica groups and their load."""
        return self._ask(queries.status())

    def explain(self, request_id: str) -> Explanation:
        """Return why a request went where it went; ask soon, and the gateway that it went to.

        Raises:
            NotFoundError: This gateway does not remember it, or it was another tenant's.
        """
        return self._ask(queries.explain(request_id))

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
        return self._ask(
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
        return self._ask(queries.list_prefixes(tenant))

    def remove_prefix(self, name: str, *, tenant: str | None = None) -> None:
        """Forget a registered prefix.

        Args:
            name: As registered.
            tenant: Whose it is; None: one's own. For administrators: any tenant.

        Raises:
            NotFoundError: There is none of this name.
            PermissionDeniedError: It is another tenant's, and the caller is no administrator.
        """
        self._ask(queries.remove_prefix(name, tenant))

    def cache_stats(self) -> CacheBooks:
        """Return the books of the store and of each replica's tiers; for administrators."""
        return self._ask(queries.cache_stats())

    def flush_cache(self, *, replicas: bool = False, store: bool = False) -> Flushed:
        """Forget what is cached and used by no request; for administrators.

        Args:
            replicas: On devices and in host memory.
            store: In the store, of all tenants.
        """
        return self._ask(queries.flush_cache(replicas=replicas, store=store))

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
        return self._ask(queries.inspect_cache(prompt, token_ids, prefix=prefix, model=model))

    def _ask(self, query: Query[Answer]) -> Answer:
        with our_errors():
            answer = getattr(self._stub, query.method)(
                query.request, timeout=query.timeout_s, metadata=self._metadata
            )
        return query.read(answer)


class AsyncClient:
    """A connection for asyncio programs: `Client`, with coroutines. Made in a running loop."""

    def __init__(
        self,
        address: str,
        *,
        ca_file: FilePath | None = None,
        tls: Tls | None = None,
        api_key: str | None = None,
        metadata: Metadata = (),
    ) -> None:
        credentials = channel_credentials(Tls(ca_file) if ca_file else tls)
        key = key_metadata(api_key, address, is_tls=credentials is not None)
        self._metadata = (*metadata, *key)
        self._channel = (
            grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
            if credentials is None
            else grpc.aio.secure_channel(address, credentials, options=CHANNEL_OPTIONS)
        )
        self._stub = Stub(self._channel)

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
        """Close the connection; calls under way end."""
        await self._channel.close(None)

    async def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        **options: Unpack[RequestOptions],
    ) -> Completion:
        """Return a completion; see `Client.generate`. Cancelling the task cancels the request."""
        return await self._ask(queries.generate(prompt, token_ids, **options))

    async def stream(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        **options: Unpack[RequestOptions],
    ) -> AsyncIterator[Event]:
        """Yield the events of a completion; see `Client.stream`."""
        query = queries.generate(prompt, token_ids, **options)
        events = EventStream()
        with our_errors():
            call = self._stub.GenerateStream(
                inference_pb2.GenerateStreamRequest(request=query.request),
                timeout=query.timeout_s,
                metadata=self._metadata,
            )
            try:
                async for message in call:
                    if (event := events.read(message)) is not None:
                        yield event
            finally:
                call.cancel()
        events.check_end()

    async def tokenize(self, text: str, *, model: str = "") -> list[int]:
        """Return the token ids of a text."""
        return await self._ask(queries.tokenize(text, model))

    async def list_models(self) -> list[ServedModel]:
        """Return the models that the cluster serves."""
        return await self._ask(queries.list_models())

    async def status(self) -> ClusterState:
        """Return the replica groups and their load."""
        return await self._ask(queries.status())

    async def explain(self, request_id: str) -> Explanation:
        """Return why a request went where it went; see `Client.explain`."""
        return await self._ask(queries.explain(request_id))

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
        return await self._ask(
            queries.register_prefix(name, prompt, token_ids, model=model, timeout_s=timeout_s)
        )

    async def list_prefixes(self, *, tenant: str | None = None) -> list[Prefix]:
        """Return registered prefixes, by tenant and name; see `Client.list_prefixes`."""
        return await self._ask(queries.list_prefixes(tenant))

    async def remove_prefix(self, name: str, *, tenant: str | None = None) -> None:
        """Forget a registered prefix; see `Client.remove_prefix`."""
        await self._ask(queries.remove_prefix(name, tenant))

    async def cache_stats(self) -> CacheBooks:
        """Return the books of the store and of each replica's tiers; for administrators."""
        return await self._ask(queries.cache_stats())

    async def flush_cache(self, *, replicas: bool = False, store: bool = False) -> Flushed:
        """Forget what is cached and used by no request; see `Client.flush_cache`."""
        return await self._ask(queries.flush_cache(replicas=replicas, store=store))

    async def inspect_cache(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        prefix: str = "",
        model: str = "",
    ) -> Inspected:
        """Return how much of a prompt is cached where; see `Client.inspect_cache`."""
        return await self._ask(queries.inspect_cache(prompt, token_ids, prefix=prefix, model=model))

    async def _ask(self, query: Query[Answer]) -> Answer:
        with our_errors():
            answer = await getattr(self._stub, query.method)(
                query.request, timeout=query.timeout_s, metadata=self._metadata
            )
        return query.read(answer)
