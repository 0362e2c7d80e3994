"""`sluice cache stats | flush | inspect`: what is cached where."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.cli.connecting import Connection, connecting
from cluster.cli.options import AsJson, print_json, read_prompt
from cluster.cli.status import hit_rate, store_state
from cluster.errors import InvalidArgumentError

if TYPE_CHECKING:
    from cluster.client import CacheBooks, Flushed, Inspected

cache = typer.Typer(help="The caches: books, emptying, a look inside.", no_args_is_help=True)

_MIB = 2**20


@cache.command("stats")
@connecting
def stats(
    *,
    connection: Connection,
    json: AsJson = False,
) -> None:
    """Print the books of the store and of each replica's tiers."""
    with connection.open() as client:
        books = client.cache_stats()
    if json:
        print_json(asdict(books))
        return
    console = Console()
    console.print(_store_line(books), highlight=False)
    console.print(tiers_table(books))


@cache.command("flush")
@connecting
def flush(
    replicas: Annotated[
        bool, typer.Option("--replicas", help="Blocks on devices and in host memory.")
    ] = False,
    store: Annotated[
        bool, typer.Option("--store", help="Blocks in the store, of all tenants.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    *,
    connection: Connection,
    json: AsJson = False,
) -> None:
    """Forget what is cached and used by no request."""
    if not (replicas or store):
        raise InvalidArgumentError("nothing to flush: give --replicas, --store or both")
    what = " and ".join(["all replicas"] * replicas + ["the store"] * store)
    if not yes and not typer.confirm(f"Forget the cached blocks of {what}?", err=True):
        raise typer.Abort
    with connection.open() as client:
        flushed = client.flush_cache(replicas=replicas, store=store)
    if json:
        print_json(asdict(flushed))
    else:
        _print_flushed(flushed)
    if flushed.failed_replica_ids:
        raise typer.Exit(1)


@cache.command("inspect")
@connecting
def inspect(
    text: Annotated[
        str | None, typer.Argument(help="Prompt to look for; - reads standard input.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Read it from a UTF-8 file.")
    ] = None,
    prefix: Annotated[
        str, typer.Option(metavar="NAME", help="Registered prefix that comes before the prompt.")
    ] = "",
    model: Annotated[str, typer.Option(help="Name; empty is the only one served.")] = "",
    *,
    connection: Connection,
    json: AsJson = False,
) -> None:
    """Print how much of a prompt is cached where."""
    prompt = read_prompt(text, file)
    if prompt is None and not prefix:
        raise InvalidArgumentError("nothing to look for: give TEXT, --file or --prefix")
    with connection.open() as client:
        found = client.inspect_cache(prompt, prefix=prefix, model=model)
    if json:
        print_json(asdict(found))
    else:
        Console().print(inspected_table(found))


def tiers_table(books: CacheBooks) -> Table:
    """Return each replica's tiers as a table."""
    table = Table("replica", "store")
    for name in ("hit rate", "host hits", "store hits", "device blocks", "host blocks"):
        table.add_column(name, justify="right")
    for name in ("evicted", "stored", "fetched", "lost", "saved"):
        table.add_column(name, justify="right")
    for replica in books.replicas:
        tiers = replica.tiers
        table.add_row(
            escape(replica.replica_id),
            store_state(tiers),
            hit_rate(replica),
            _share(tiers.num_host_hit_tokens, replica.num_prefix_query_tokens),
            _share(tiers.num_store_hit_tokens, replica.num_prefix_query_tokens),
            f"{replica.num_blocks - replica.num_free_blocks} / {replica.num_blocks}",
            f"{tiers.num_host_blocks} / {tiers.num_host_slots}",
            f"{tiers.num_device_evictions} + {tiers.num_host_evictions}",
            str(tiers.num_stored_blocks),
            str(tiers.num_fetched_blocks),
            str(tiers.num_rejected + tiers.num_late + tiers.num_failed + tiers.num_corrupt),
            f"{tiers.saved_s:.1f} s",
        )
    return table


def inspected_table(found: Inspected) -> Table:
    """Return where a prompt is cached as a table with one row per place."""
    title = f"{found.num_tokens} tokens, {found.num_blocks} full blocks"
    table = Table("where", "leading blocks", title=title, title_justify="left")
    if found.store_error:
        table.add_row("store", f"[yellow]{escape(found.store_error)}[/]")
    else:
        table.add_row("store", f"{found.num_stored_blocks} / {found.num_blocks}")
    for place in found.replicas:
        table.add_row(escape(place.replica_id), f"{place.num_blocks} / {found.num_blocks}")
    return table


def _store_line(books: CacheBooks) -> str:
    if books.store is None:
        return f"store: [yellow]{escape(books.store_error)}[/]"
    store = books.store
    return (
        f"store: {store.used_bytes / _MIB:.1f} of {store.max_bytes / _MIB:.0f} MiB, "
        f"{store.num_blocks} blocks ({store.num_pinned_blocks} pinned), "
        f"{store.num_evicted} evicted"
    )


def _print_flushed(flushed: Flushed) -> None:
    typer.echo(
        f"forgot {flushed.num_replica_blocks} blocks on replicas, "
        f"{flushed.num_store_blocks} in the store"
    )
    if flushed.failed_replica_ids:
        typer.echo(f"not asked: {', '.join(flushed.failed_replica_ids)}", err=True)


def _share(num_tokens: int, num_query_tokens: int) -> str:
    return f"{num_tokens / num_query_tokens:.1%}" if num_query_tokens else "-"
