"""Options that several commands share, and how a command prints data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from cluster.errors import InvalidArgumentError

if TYPE_CHECKING:
    from cluster.client import Tls

DEFAULT_ADDRESS = "127.0.0.1:9000"

ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="YAML file; see `sluice config`.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="Change one knob; may be repeated."),
]
Address = Annotated[
    str, typer.Option(envvar="SLUICE_ADDRESS", metavar="HOST:PORT", help="Of the gateway.")
]
CaFile = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="PEM file of the authority that signed the gateway's TLS."),
]
CertFile = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="PEM file, where the gateway demands a certificate of you."),
]
KeyFile = Annotated[
    str | None, typer.Option(metavar="FILE", help="PEM file of the key of --cert-file.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def tls_of(ca_file: str | None, cert_file: str | None, key_file: str | None) -> Tls | None:
    """Return the files of a connection; None speaks plain text.

    Raises:
        InvalidArgumentError: One of the files is missing beside the others.
    """
    from cluster.client import Tls

    if (cert_file is None) != (key_file is None):
        raise InvalidArgumentError(
            f"--cert-file={cert_file} --key-file={key_file}: give both or neither",
            field="cert-file",
        )
    if ca_file is None:
        if cert_file is not None:
            raise InvalidArgumentError(
                f"--cert-file={cert_file} without --ca-file: plain text shows no certificate; "
                "give --ca-file too",
                field="ca-file",
            )
        return None
    return Tls(ca_file, cert_file, key_file)


def bar_options() -> dict[str, Any]:
    """Return how a bar is shown: on standard error, on a terminal only, gone at its end."""
    console = Console(stderr=True)
    return {"console": console, "transient": True, "disable": not console.is_terminal}


def print_json(data: Any) -> None:
    """Print plain data as one line of JSON."""
    typer.echo(json.dumps(data, default=str, allow_nan=False))
