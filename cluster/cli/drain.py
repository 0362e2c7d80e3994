"""`sluice drain`: make a replica hand over its requests and leave."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from cluster.cli.connecting import Connection, connecting
from cluster.cli.options import AsJson, bar_options, print_json
from cluster.errors import DeadlineError, SluiceError, UnavailableError

if TYPE_CHECKING:
    from cluster.client import Client, ReplicaState

_POLL_S = 0.2
_GONE_S = 0.5  # between two answers: a gateway that has only lost sight of it finds it again


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
        gone_s = _wait(client, replica, began_s + timeout_s, timeout_s) - began_s if wait else None
    if json:
        waited = {} if gone_s is None else {"gone_after_s": gone_s}
        print_json({"replica_id": replica, "num_requests": num_requests, **waited})
        return
    typer.echo(f"{replica} drains: it hands over {num_requests} requests")
    if gone_s is not None:
        typer.echo(f"{replica} is gone after {gone_s:.1f} s")


def _wait(client: Client, replica_id: str, give_up_s: float, timeout_s: float) -> float:
    """Wait until two answers in a row are without the replica; return when the first one came.

    Where no gateway is in reach they are asked again: one may be leaving as well.

    Raises:
        DeadlineError: It is still there, or was a moment ago.
        UnavailableError: No gateway answers, not even in the end.
    """
    gone_s = math.inf
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, **bar_options()) as progress:
        task = progress.add_task(f"{replica_id} drains", total=None)
        while True:
            asked_s = time.monotonic()
            try:
                state = _find(client, replica_id)
            except UnavailableError as error:
                late: SluiceError = error
            else:
                gone_s = min(gone_s, time.monotonic()) if state is None else math.inf
                if asked_s - gone_s >= _GONE_S:
                    return gone_s
                seen = f"{replica_id} is {_describe(state)}"
                progress.update(task, description=seen)
                late = DeadlineError(
                    f"--timeout-s={timeout_s:g}: {seen}: wait longer, or look into its log"
                )
            if time.monotonic() >= give_up_s:
                raise late
            time.sleep(_POLL_S)


def _describe(state: ReplicaState | None) -> str:
    if state is None:
        return f"not seen, but not yet for {_GONE_S:g} s"
    return f"still {state.state}, {state.num_running} running, {state.num_waiting} waiting"


def _find(client: Client, replica_id: str) -> ReplicaState | None:
    replicas = client.status().replicas
    return next((state for state in replicas if state.replica_id == replica_id), None)
