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

from cluster.errors import ConfigError, SluiceError
from cluster.rpc import public
from cluster.rpc.sluice.v1.cache_pb2_grpc import CacheStub
from cluster.rpc.sluice.v1.inference_pb2_grpc import InferenceStub

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 64 * 2**20),
    ("grpc.use_local_subchannel_pool", 1),  # a new client is a new connection
)
Metadata = Sequence[tuple[str, str]]
FilePath = str | PathLike[str]

_DETAILS_KEY = "grpc-status-details-bin"
_SCHEMES = ("dns:///", "dns:", "ipv4:", "ipv6:")  # with a server of names, a name can be anybody


@dataclass(frozen=True, slots=True)
class Tls:
    """Files of a TLS connection."""

    ca_file: FilePath  # PEM; of who signed the server's certificate
    cert_file: FilePath | None = None  # PEM; where the server demands one of the client
    key_file: FilePath | None = None  # PEM; of the client's certificate


class Stub(InferenceStub, CacheStub):
    """The methods of both public services; no two have one name."""

    def __init__(self, channel: grpc.Channel | grpc.aio.Channel) -> None:
        InferenceStub.__init__(self, channel)  # type: ignore[no-untyped-call]
        CacheStub.__init__(self, channel)  # type: ignore[no-untyped-call]


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
def our_errors() -> Iterator[None]:
    """Raise gRPC's errors as those of `cluster/errors.py`."""
    try:
        yield
    except grpc.RpcError as error:
        raise _error_of(error) from error


def _error_of(error: Any) -> SluiceError:
    metadata = error.trailing_metadata() or ()
    details = next((value for key, value in metadata if key == _DETAILS_KEY), None)
    return public.error_from_status(error.code().name, error.details() or "", details)
