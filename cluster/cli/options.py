"""Options that several commands share, and how a command prints data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

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
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def bar_options() -> dict[str, Any]:
    """Return how a bar is shown: on standard error, on a terminal only, gone at its end."""
    console = Console(stderr=True)
    return {"console": console, "transient": True, "disable": not console.is_terminal}


def print_json(data: Any) -> None:
    """Print plain data as one line of JSON."""
    typer.echo(json.dumps(data, default=str, allow_nan=False))
