"""`sluice serve`: start a cluster, say where it is, run until a signal, leave nothing behind."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from cluster.cli.options import AsJson, ConfigFile, Overrides, print_json, read_api_key
from cluster.cli.status import status_table
from cluster.config import load_config
from cluster.errors import SluiceError

if TYPE_CHECKING:
    from cluster.client import ClusterState
    from cluster.gateway.app import ServingCluster

_SIGNAL_POLL_S = 0.5


def serve(
    config: ConfigFile = None,
    overrides: Overrides = None,
    ray_address: Annotated[
        str | None, typer.Option(help="Join this Ray cluster; without it one is started here.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Start a serving cluster and run until Ctrl-C or SIGTERM."""
    settings = load_config(config, overrides)
    from cluster.gateway import app

    app.check(settings, is_local=ray_address is None)
    signals = _StopSignals()
    signals.install()
    console = Console(stderr=True)
    with console.status("starting") as spinner:

        def show(message: str) -> None:
            spinner.update(escape(message))
            if not console.is_terminal:
                console.print(message, highlight=False, markup=False)

        cluster = app.start(settings, ray_address=ray_address, on_progress=show)
    try:
        signals.is_starting = False
        signals.install()  # Ray took SIGTERM for itself while it started
        _announce(cluster, json)
        while not signals.seen.wait(_SIGNAL_POLL_S):
            pass  # a bounded wait, so that the handler of a signal gets its turn
    finally:
        console.print("stopping", highlight=False)
        # Ray prints to standard output on its own account: there, the answer has to be alone.
        with contextlib.redirect_stdout(sys.stderr):
            cluster.stop()


class _StopSignals:
    """SIGINT and SIGTERM: they interrupt the start once, then only ask for the stop.

    The handler stays to the end, so a second Ctrl-C cannot break the cleanup midway.
    """

    def __init__(self) -> None:
        self.seen = threading.Event()
        self.is_starting = True

    def install(self) -> None:
        """Take both signals."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: object) -> None:
        is_first = not self.seen.is_set()
        self.seen.set()
        if self.is_starting and is_first:
            raise KeyboardInterrupt


def _announce(cluster: ServingCluster, json: bool) -> None:
    state = _ask_state(cluster)
    if json:
        print_json({"address": cluster.address, **(asdict(state) if state else {"replicas": None})})
        return
    console = Console()
    console.print(f"serving on [bold]{cluster.address}[/], Ctrl-C stops")
    if state:
        console.print(status_table(state))


def _ask_state(cluster: ServingCluster) -> ClusterState | None:
    """Return what the gateway says, or None: it may serve others than this process only."""
    from cluster.client import Client

    config = cluster.config
    try:
        api_key = read_api_key(None) if config.auth.tenants_file else None
        ca_file = config.gateway.tls_cert or None
        with Client(cluster.address, ca_file=ca_file, api_key=api_key) as client:
            return client.status()
    except SluiceError:
        return None
