"""How a command reaches the gateways: the options are the same for all of them."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.cli.options import (
    DEFAULT_ADDRESS,
    ApiKeyFile,
    CaFile,
    CertFile,
    KeyFile,
    read_api_key,
    tls_of,
)

if TYPE_CHECKING:
    from cluster.client import Client

Addresses = Annotated[
    list[str] | None,
    typer.Option(
        "--address",
        envvar="SLUICE_ADDRESS",
        metavar="HOST:PORT",
        show_default=DEFAULT_ADDRESS,
        help="Of a gateway; repeated: of several, the first that answers is taken.",
    ),
]


@dataclass(frozen=True, slots=True)
class Connection:
    """What a command was told of the gateways."""

    addresses: tuple[str, ...]  # host:port, at least one
    ca_file: str | None  # PEM
    cert_file: str | None  # PEM
    key_file: str | None  # PEM
    api_key_file: str | None  # None: the key is in the environment, or there is none

    def open(self, *, first: int = 0) -> Client:
        """Return a client; nothing is sent yet.

        Args:
            first: Index of the address to ask first; it wraps round.

        Raises:
            InvalidArgumentError: A file is missing, or the key must not be sent.
        """
        # gRPC's core notes on standard error whenever a gateway leaves; errors come as exceptions.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        from cluster.client import Client

        first %= len(self.addresses)
        return Client(
            self.addresses[first:] + self.addresses[:first],
            tls=tls_of(self.ca_file, self.cert_file, self.key_file),
            api_key=read_api_key(self.api_key_file),
        )


def _options(
    address: Addresses = None,
    ca_file: CaFile = None,
    cert_file: CertFile = None,
    key_file: KeyFile = None,
    api_key_file: ApiKeyFile = None,
) -> Connection:
    addresses = tuple(address or ()) or (DEFAULT_ADDRESS,)
    return Connection(addresses, ca_file, cert_file, key_file, api_key_file)


def connecting(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of a connection, in place of its parameter `connection`."""
    taken = inspect.signature(_options, eval_str=True).parameters
    given = inspect.signature(command, eval_str=True).parameters
    assert given["connection"].annotation is Connection, "a command declares what it is given"

    @functools.wraps(command)
    def run(**values: Any) -> None:
        options = {name: values.pop(name) for name in taken}
        command(connection=_options(**options), **values)

    parameters = [
        shown.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in given.items()
        for shown in (taken.values() if name == "connection" else [parameter])
    ]
    # Typer reads both: the signature for the options, the annotations for their types.
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
