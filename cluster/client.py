"""Clients of a cluster, one for plain and one for asyncio programs.

    with Client("127.0.0.1:9000") as client:
        print(client.generate("def main():", sampling={"max_tokens": 32}).text)

Both raise the errors of `cluster/errors.py`. A request that has failed is not sent again: it may
have run.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from cluster.errors import ConfigError, SluiceError, UnavailableError
from cluster.rpc import public
from cluster.rpc.public import (
    ClusterState,
    Completion,
    Event,
    Finished,
    Queued,
    ReplicaState,
    Running,
    ScoredToken,
    ServedModel,
    TextDelta,
    Timings,
    Usage,
)
from cluster.rpc.sluice.v1 import inference_pb2
from cluster.rpc.sluice.v1.inference_pb2_grpc import InferenceStub
from cluster.types import SamplingParams

__all__ = [
    "AsyncClient",
    "Client",
    "ClusterState",
    "Completion",
    "Event",
    "Finished",
    "Queued",
    "ReplicaState",
    "Running",
    "ScoredToken",
    "ServedModel",
    "TextDelta",
    "Timings",
    "Usage",
]

GENERATE_TIMEOUT_S = 600.0
QUERY_TIMEOUT_S = 10.0
_DETAILS_KEY = "grpc-status-details-bin"
_CHANNEL_OPTIONS = (("grpc.max_receive_message_length", 64 * 2**20),)

Sampling = SamplingParams | Mapping[str, Any] | None
Metadata = Sequence[tuple[str, str]]
_Path = str | PathLike[str]


@dataclass(frozen=True, slots=True)
class Tls:
    """Files of a TLS connection."""

    ca_file: _Path  # PEM; of who signed the server's certificate
    cert_file: _Path | None = None  # PEM; where the server demands one of the client
    key_file: _Path | None = None  # PEM; of the client's certificate


class Client:
    """A connection for plain programs; threads may share it.

    Args:
        address: host:port of a gateway.
        ca_file: PEM file that verifies the gateway's certificate; None speaks plain text.
        tls: In place of `ca_file`, where the gateway demands a certificate of the client.
        metadata: Sent with every call.
    """

    def __init__(
        self,
        address: str,
        *,
        ca_file: _Path | None = None,
        tls: Tls | None = None,
        metadata: Metadata = (),
    ) -> None:
        credentials = channel_credentials(Tls(ca_file) if ca_file else tls)
        self._channel = (
            grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
            if credentials is None
            else grpc.secure_channel(address, credentials, options=_CHANNEL_OPTIONS)
        )
        self._stub = InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        self._metadata = tuple(metadata)

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
        model: str = "",
        sampling: Sampling = None,
        timeout_s: float = GENERATE_TIMEOUT_S,
        request_id: str = "",
    ) -> Completion:
        """Return the completion of a text, or of token ids.

        Args:
            prompt: Text to continue.
            token_ids: Ids of the model's tokenizer, in place of text.
            model: Name; empty is the only one served.
            sampling: All parameters, or some of them by name.
            timeout_s: Deadline of all of it, seconds.
            request_id: Empty lets the gateway choose.

        Raises:
            SluiceError: As the gateway says, or it is out of reach.
        """
        request = public.generate_request(
            prompt, token_ids, model=model, sampling=sampling, request_id=request_id
        )
        return public.completion_from_proto(self._call(self._stub.Generate, request, timeout_s))

    def stream(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        model: str = "",
        sampling: Sampling = None,
        timeout_s: float = GENERATE_TIMEOUT_S,
        request_id: str = "",
    ) -> Iterator[Event]:
        """Yield the events of a completion; `Finished` is the last. Arguments as of `generate`.

        Closing the iterator cancels the request.

        Raises:
            UnavailableError: The stream was cut off before `Finished`.
            SluiceError: As the gateway says, or it is out of reach.
        """
        request = public.generate_request(
            prompt, token_ids, model=model, sampling=sampling, request_id=request_id
        )
        events = _Events()
        with _our_errors():
            call = self._stub.GenerateStream(
                inference_pb2.GenerateStreamRequest(request=request),
                timeout=timeout_s,
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
        request = inference_pb2.TokenizeRequest(model=model, text=text)
        return list(self._call(self._stub.Tokenize, request, QUERY_TIMEOUT_S).token_ids)

    def list_models(self) -> list[ServedModel]:
        """Return the models that the cluster serves."""
        request = inference_pb2.ListModelsRequest()
        return public.models_from_proto(self._call(self._stub.ListModels, request, QUERY_TIMEOUT_S))

    def status(self) -> ClusterState:
        """Return the replica groups and their load."""
        request = inference_pb2.ClusterStatusRequest()
        return public.cluster_from_proto(
            self._call(self._stub.ClusterStatus, request, QUERY_TIMEOUT_S)
        )

    def _call(self, method: Any, request: Any, timeout_s: float) -> Any:
        with _our_errors():
            return method(request, timeout=timeout_s, metadata=self._metadata)


class AsyncClient:
    """A connection for asyncio programs: `Client`, with coroutines. Made in a running loop."""

    def __init__(
        self,
        address: str,
        *,
        ca_file: _Path | None = None,
        tls: Tls | None = None,
        metadata: Metadata = (),
    ) -> None:
        credentials = channel_credentials(Tls(ca_file) if ca_file else tls)
        self._channel = (
            grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
            if credentials is None
            else grpc.aio.secure_channel(address, credentials, options=_CHANNEL_OPTIONS)
        )
        self._stub = InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        self._metadata = tuple(metadata)

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
        model: str = "",
        sampling: Sampling = None,
        timeout_s: float = GENERATE_TIMEOUT_S,
        request_id: str = "",
    ) -> Completion:
        """Return a completion; see `Client.generate`. Cancelling the task cancels the request."""
        request = public.generate_request(
            prompt, token_ids, model=model, sampling=sampling, request_id=request_id
        )
        return public.completion_from_proto(
            await self._call(self._stub.Generate, request, timeout_s)
        )

    async def stream(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        model: str = "",
        sampling: Sampling = None,
        timeout_s: float = GENERATE_TIMEOUT_S,
        request_id: str = "",
    ) -> AsyncIterator[Event]:
        """Yield the events of a completion; see `Client.stream`."""
        request = public.generate_request(
            prompt, token_ids, model=model, sampling=sampling, request_id=request_id
        )
        events = _Events()
        with _our_errors():
            call = self._stub.GenerateStream(
                inference_pb2.GenerateStreamRequest(request=request),
                timeout=timeout_s,
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
        request = inference_pb2.TokenizeRequest(model=model, text=text)
        return list((await self._call(self._stub.Tokenize, request, QUERY_TIMEOUT_S)).token_ids)

    async def list_models(self) -> list[ServedModel]:
        """Return the models that the cluster serves."""
        request = inference_pb2.ListModelsRequest()
        return public.models_from_proto(
            await self._call(self._stub.ListModels, request, QUERY_TIMEOUT_S)
        )

    async def status(self) -> ClusterState:
        """Return the replica groups and their load."""
        request = inference_pb2.ClusterStatusRequest()
        return public.cluster_from_proto(
            await self._call(self._stub.ClusterStatus, request, QUERY_TIMEOUT_S)
        )

    async def _call(self, method: Any, request: Any, timeout_s: float) -> Any:
        with _our_errors():
            return await method(request, timeout=timeout_s, metadata=self._metadata)


class _Events:
    """Reads a stream's messages, and notices what is missing."""

    def __init__(self) -> None:
        self._next_seq = 0
        self._is_finished = False

    def read(self, message: inference_pb2.GenerateStreamResponse) -> Event | None:
        if message.seq != self._next_seq:
            raise UnavailableError(
                f"event {self._next_seq} was lost on the way, event {message.seq} came: ask again"
            )
        self._next_seq += 1
        event = public.event_from_proto(message)
        self._is_finished = self._is_finished or isinstance(event, Finished)
        return event

    def check_end(self) -> None:
        if not self._is_finished:
            raise UnavailableError(
                f"the stream was cut off after {self._next_seq} events: ask again"
            )


@contextmanager
def _our_errors() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise _error_of(error) from error


def _error_of(error: Any) -> SluiceError:
    metadata = error.trailing_metadata() or ()
    details = next((value for key, value in metadata if key == _DETAILS_KEY), None)
    return public.error_from_status(error.code().name, error.details() or "", details)


def channel_credentials(tls: Tls | None) -> grpc.ChannelCredentials | None:
    """Return what a channel needs; None is plain text.

    Raises:
        ConfigError: A file cannot be read.
    """
    if tls is None:
        return None
    try:
        return grpc.ssl_channel_credentials(
            Path(tls.ca_file).read_bytes(),
            Path(tls.key_file).read_bytes() if tls.key_file else None,
            Path(tls.cert_file).read_bytes() if tls.cert_file else None,
        )
    except OSError as error:
        raise ConfigError(
            f"{error.filename}: {error.strerror}: give a PEM file", field="tls"
        ) from error
