"""`sluice drain`: make a replica hand over its requests and leave."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from cluster.cli.connecting import Connection, connecting
from cluster.cli.options import AsJson, bar_options, print_json
from cluster.errors import DeadlineError

if TYPE_CHECKING:
    from cluster.client import Client, ReplicaState

_POLL_S = 0.2


@connecting
def drain(
    replica: Annotated[str, typer.Argument(help="Id, as `sluice status` shows it.")],
    *,
    wait: Annotated[bool, typer.Option("--wait", help="Until it is gone.")] = False,
    timeout_s: Annotated[
        float, typer.Option(min=0.001, help="Deadline of --wait, seconds.")
    ] = 120.0,
    connection: Connection,
    json: AsJson = False,
) -> None:
    """Make a replica refuse new requests, hand the present ones over, and end."""
    began_s = time.monotonic()
    with connection.open() as client:
        num_requests = client.drain_replica(replica)
        if wait:
            _wait(client, replica, began_s + timeout_s, timeout_s)
    waited_s = time.monotonic() - began_s
    if json:
        gone_s = {"gone_after_s": waited_s} if wait else {}
        print_json({"replica_id": replica, "num_requests": num_requests, **gone_s})
        return
    typer.echo(f"{replica} drains: it hands over {num_requests} requests")
    if wait:
        typer.echo(f"{replica} is gone after {waited_s:.1f} s")


def _wait(client: Client, replica_id: str, give_up_s: float, timeout_s: float) -> None:
    """Return when the gateway no longer knows the replica.

    Raises:
        DeadlineError: It is still there.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, **bar_options()) as progress:
        task = progress.add_task(f"{replica_id} drains", total=None)
        while (state := _find(client, replica_id)) is not None:
            load = f"{state.num_running} running, {state.num_waiting} waiting"
            progress.update(task, description=f"{replica_id} is {state.state}: {load}")
            if time.monotonic() >= give_up_s:
                raise DeadlineError(
                    f"--timeout-s={timeout_s:g}: {replica_id} is still {state.state}, {load}: "
                    "wait longer, or look into its log"
                )
            time.sleep(_POLL_S)


def _find(client: Client, replica_id: str) -> ReplicaState | None:
    replicas = client.status().replicas
    return next((state for state in replicas if state.replica_id == replica_id), None)
