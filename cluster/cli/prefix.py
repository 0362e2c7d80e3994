"""`sluice prefix add | list | remove`: prompts' beginnings that requests refer to by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.cli.connecting import Connection, connecting
from cluster.cli.options import AsJson, print_json, read_prompt
from cluster.errors import InvalidArgumentError

if TYPE_CHECKING:
    from cluster.client import Prefix

prefix = typer.Typer(
    help="Prompts' beginnings: computed once, kept, referred to by name.", no_args_is_help=True
)

Name = Annotated[str, typer.Argument(help="Letters, digits, dots, dashes, underscores.")]
Tenant = Annotated[
    str | None,
    typer.Option(metavar="TENANT", help="Whose, for administrators; list takes '*' for all."),
]


@prefix.command("add")
@connecting
def add(
    name: Name,
    text: Annotated[
        str | None, typer.Argument(help="What prompts will begin with; - reads standard input.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Read it from a UTF-8 file.")
    ] = None,
    token_ids: Annotated[
        str | None,
        typer.Option(metavar="ID,ID,...", help="Ids of the model's tokenizer, in place of text."),
    ] = None,
    model: Annotated[str, typer.Option(help="Name; empty is the only one served.")] = "",
    timeout_s: Annotated[float, typer.Option(min=0.001, help="Computing included.")] = 600.0,
    *,
    connection: Connection,
    json: AsJson = False,
) -> None:
    """Register a prefix: it is computed, stored and kept."""
    prompt = read_prompt(text, file)
    if (prompt is None) == (token_ids is None):
        raise InvalidArgumentError(
            "give exactly one of TEXT, --file and --token-ids", field="prompt"
        )
    ids = None if token_ids is None else _ids(token_ids)
    with connection.open() as client:
        added = client.register_prefix(
            name, prompt, token_ids=ids, model=model, timeout_s=timeout_s
        )
    if json:
        print_json(asdict(added))
    else:
        Console().print(prefix_table([added]))


@prefix.command("list")
@connecting
def list_all(
    tenant: Tenant = None,
    *,
    connection: Connection,
    json: AsJson = False,
) -> None:
    """Print your registered prefixes, or those of others."""
    with connection.open() as client:
        prefixes = client.list_prefixes(tenant=tenant)
    if json:
        print_json({"prefixes": [asdict(known) for known in prefixes]})
    else:
        Console().print(prefix_table(prefixes))


@prefix.command("remove")
@connecting
def remove(
    name: Name,
    tenant: Tenant = None,
    *,
    connection: Connection,
    json: AsJson = False,
) -> None:
    """Forget a prefix; its blocks are then kept as long as others."""
    with connection.open() as client:
        client.remove_prefix(name, tenant=tenant)
    if json:
        print_json({"removed": name})
    else:
        typer.echo(f"removed {name}")


def prefix_table(prefixes: Sequence[Prefix]) -> Table:
    """Return prefixes as a table with one row each; whose they are, where there are tenants."""
    has_tenants = any(known.tenant for known in prefixes)
    owner = ("tenant",) if has_tenants else ()
    table = Table(*owner, "prefix", "model", "tokens", "blocks stored", "registered (UTC)")
    for known in prefixes:
        style = "green" if known.num_stored_blocks == known.num_blocks else "yellow"
        when = datetime.fromtimestamp(known.registered_at_s, UTC)
        table.add_row(
            *([escape(known.tenant)] if has_tenants else []),
            escape(known.name),
            escape(known.model),
            str(known.num_tokens),
            f"[{style}]{known.num_stored_blocks} / {known.num_blocks}[/]",
            f"{when:%Y-%m-%d %H:%M:%S}",
        )
    return table


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InvalidArgumentError(
            f"--token-ids={text[:80]}: give numbers with commas between them", field="token-ids"
        ) from error
