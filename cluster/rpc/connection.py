"""How a client reaches a gateway: TLS, credentials, and errors as they come back."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import grpc

from cluster.errors import ConfigError, UnavailableError
from cluster.rpc.addresses import Addresses
from cluster.rpc.failure import CallFailure, failure_from_status
from cluster.rpc.queries import Query
from cluster.rpc.sluice.v1.cache_pb2_grpc import CacheStub
from cluster.rpc.sluice.v1.inference_pb2_grpc import InferenceStub

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 64 * 2**20),
    ("grpc.use_local_subchannel_pool", 1),  # a new client is a new connection
    # A gateway that comes back is found within a second or two, and one whose machine is gone is
    # given up after five; by default these are minutes, and twenty seconds.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # it also bounds one attempt to connect
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # A connection that is silently gone is noticed while a stream waits for its next token.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # else a ping may stay unanswered for a minute
    ("grpc.http2.max_pings_without_data", 0),  # else the third ping of a long stream waits
)
Metadata = Sequence[tuple[str, str]]
FilePath = str | PathLike[str]

# How gRPC's core begins to say that a call was never sent. It is no contract: if the words change,
# calls that change something stay at the first address.
_NOT_CONNECTED = ("failed to connect to all addresses", "DNS resolution failed")
_DETAILS_KEY = "grpc-status-details-bin"
_SCHEMES = ("dns:///", "dns:", "ipv4:", "ipv6:")  # with a server of names, a name can be anybody


@dataclass(frozen=True, slots=True)
class Tls:
    """Files of a TLS connection."""

    ca_file: FilePath  # PEM; of who signed the server's certificate
    cert_file: FilePath | None = None  # PEM; where the server demands one of the client
    key_file: FilePath | None = None  # PEM; of the client's certificate


@dataclass(frozen=True, slots=True)
class Access:
    """How a client reaches its gateways."""

    addresses: Addresses
    credentials: grpc.ChannelCredentials | None  # None is plain text
    metadata: Metadata  # sent with every call


class Stub(InferenceStub, CacheStub):
    """The methods of both public services; no two have one name."""

    def __init__(self, channel: grpc.Channel | grpc.aio.Channel) -> None:
        InferenceStub.__init__(self, channel)  # type: ignore[no-untyped-call]
        CacheStub.__init__(self, channel)  # type: ignore[no-untyped-call]


def access_of(
    address: str | Sequence[str],
    *,
    tls: Tls | None,
    api_key: str | None,
    metadata: Metadata,
) -> Access:
    """Return how to reach gateways.

    Args:
        address: One, or several.
        tls: For all of them; None is plain text.
        api_key: Of a tenant, or a token; None: none.
        metadata: Sent with every call.

    Raises:
        ConfigError: There is no address, a file cannot be read, or the key must not be sent to one
            of them.
    """
    addresses = Addresses(address)
    credentials = channel_credentials(tls)
    keys = [
        key_metadata(api_key, addresses[index], is_tls=credentials is not None)
        for index in addresses.in_turn()
    ]
    return Access(addresses, credentials, (*metadata, *keys[0]))


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


def key_metadata(api_key: str | None, address: str, *, is_tls: bool) -> Metadata:
    """Return the metadata that shows an API key, or a token; none for None.

    Args:
        api_key: Secret: it is in no error.
        address: Where it would be sent.
        is_tls: Whether the connection is encrypted.

    Raises:
        ConfigError: The key cannot be one, or it would cross a network as plain text.
    """
    if api_key is None:
        return ()
    if not api_key or not all("!" <= character <= "~" for character in api_key):
        raise ConfigError(
            f"api_key has {len(api_key)} characters, and not all are printable ASCII without "
            "blanks: give the key alone",
            field="api_key",
        )
    if not (is_tls or is_loopback(address)):
        raise ConfigError(
            f"api_key for {address} without TLS: everybody on the way could read it; give the "
            "authority's file (ca_file), or connect on this machine",
            field="api_key",
        )
    return (("authorization", f"Bearer {api_key}"),)


def is_loopback(address: str) -> bool:
    """Return whether an address, as gRPC takes it, can only be on this machine."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    for scheme in _SCHEMES:
        if address.startswith(scheme):
            address = unquote(address.removeprefix(scheme))
            break
    host, _, port = address.rpartition(":")
    if not port.isdigit() or (":" in host and not host.startswith("[")):
        host = address  # without a port
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


@contextmanager
def call_failures() -> Iterator[None]:
    """Raise gRPC's errors as `CallFailure`."""
    try:
        yield
    except grpc.RpcError as error:
        raise _failure_of(error) from error


def _failure_of(error: Any) -> CallFailure:
    metadata = error.trailing_metadata() or ()
    details = next((value for key, value in metadata if key == _DETAILS_KEY), None)
    return failure_from_status(error.code().name, error.details() or "", details)


def may_ask_next(failure: CallFailure, query: Query[Any]) -> bool:
    """Return whether a unary call that has failed may be made at another gateway.

    One that changes something must not have run: then no connection came about.
    """
    if failure.code != UnavailableError.code:
        return False
    return query.is_read or (not failure.is_ours and str(failure).startswith(_NOT_CONNECTED))
