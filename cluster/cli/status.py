"""`sluice status`: the replica groups and their load, once or again and again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from cluster.cli.connecting import Connection, connecting
from cluster.cli.options import AsJson, print_json

if TYPE_CHECKING:
    from cluster.client import CacheLoad, Client, ClusterState

_REFRESH_S = 1.0
_STATE_STYLES = {"ready": "green", "connecting": "yellow", "draining": "magenta"}
_STORE_STYLES = {"exact": "green", "degraded": "yellow", "off": "dim"}


@connecting
def status(
    *,
    connection: Connection,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Repeat until Ctrl-C.")] = False,
    json: AsJson = False,
) -> None:
    """Print the replica groups: state, layout, blocks, load, prefix hits, the store's state."""
    with connection.open() as client:
        if json:
            for state in _states(client, watch):
                print_json(asdict(state))
        elif watch:
            _watch(client)
        else:
            Console().print(status_table(client.status()))


def _states(client: Client, watch: bool) -> Iterator[ClusterState]:
    yield client.status()
    while watch:
        time.sleep(_REFRESH_S)
        yield client.status()


def _watch(client: Client) -> None:
    # The first answer comes before the screen is taken: an error is then one line.
    states = _states(client, watch=True)
    with Live(status_table(next(states)), auto_refresh=False, screen=False) as live:
        for state in states:
            live.update(status_table(state), refresh=True)


def status_table(state: ClusterState) -> Table:
    """Return the cluster as a table with one row per replica group."""
    title = (
        f"{state.num_inflight} running, {state.num_queued} waiting at gateway {state.gateway_id}"
    )
    table = Table("replica", "state", "model", "tp x pp", title=escape(title), title_justify="left")
    for name in ("blocks used", "running", "waiting", "hit rate", "generated"):
        table.add_column(name, justify="right")
    table.add_column("store")
    for replica in state.replicas:
        style = _STATE_STYLES.get(replica.state, "red")
        table.add_row(
            escape(replica.replica_id),
            f"[{style}]{replica.state}[/]",
            escape(replica.model),
            f"{replica.tp} x {replica.pp}",
            f"{replica.num_blocks - replica.num_free_blocks} / {replica.num_blocks}",
            str(replica.num_running),
            str(replica.num_waiting),
            hit_rate(replica),
            str(replica.num_generated_tokens),
            store_state(replica.cache),
        )
    return table


def store_state(cache: CacheLoad) -> str:
    """Return how the store does as one replica sees it, in colour."""
    return f"[{_STORE_STYLES[cache.store_state]}]{cache.store_state}[/]"


def hit_rate(replica: Any) -> str:
    """Return the share of looked up prompt tokens that were cached, or a dash before the first."""
    if not replica.num_prefix_query_tokens:
        return "-"
    return f"{replica.num_prefix_hit_tokens / replica.num_prefix_query_tokens:.1%}"
