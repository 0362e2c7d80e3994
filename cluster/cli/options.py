"""Options that several commands share, and how a command prints data."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from cluster.errors import InvalidArgumentError
from cluster.types import ServiceClass

if TYPE_CHECKING:
    from cluster.client import Tls

DEFAULT_ADDRESS = "127.0.0.1:9000"
API_KEY_VARIABLE = "SLUICE_API_KEY"

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
ApiKeyFile = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help=f"Holds your API key; without it {API_KEY_VARIABLE} is read."
    ),
]
OBJECTIVE = "Latency objective: a class, or times"
OfClass = Annotated[
    ServiceClass | None,
    typer.Option("--class", help="Whose latency objective it gets.", rich_help_panel=OBJECTIVE),
]
TtftS = Annotated[
    float | None,
    typer.Option(help="Own objective: seconds to the first token.", rich_help_panel=OBJECTIVE),
]
TpotS = Annotated[
    float | None,
    typer.Option(help="Own objective: seconds per further token.", rich_help_panel=OBJECTIVE),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def read_api_key(file: str | None) -> str | None:
    """Return the key in a file, else that of the environment, else None.

    It is no argument: every user of the machine can list those.

    Raises:
        InvalidArgumentError: The file cannot be read.
    """
    if file is None:
        return os.environ.get(API_KEY_VARIABLE) or None
    try:
        return Path(file).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise InvalidArgumentError(
            f"--api-key-file={file}: {reason}: give a file that holds the key alone",
            field="api-key-file",
        ) from None


def read_prompt(text: str | None, file: Path | None) -> str | None:
    """Return a prompt given as an argument or as a file; `-` is standard input.

    Raises:
        InvalidArgumentError: It is given twice, or cannot be read as UTF-8.
    """
    if file is not None:
        if text is not None:
            raise InvalidArgumentError("TEXT and --file: give one of the two", field="file")
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else f"not UTF-8: {error}"
            raise InvalidArgumentError(
                f"--file={file}: {reason}: give a text file", field="file"
            ) from error
    if text != "-":
        return text
    try:
        return typer.get_binary_stream("stdin").read().decode()
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(
            f"standard input is not UTF-8: {error}", field="prompt"
        ) from error


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
