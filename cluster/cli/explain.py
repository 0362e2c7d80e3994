"""`sluice explain`: why a request went where it went."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.cli.connecting import Connection, connecting
from cluster.cli.options import AsJson, print_json
from cluster.errors import NotFoundError

if TYPE_CHECKING:
    from cluster.client import Explanation, RouteCandidate

_MAX_CONNECTIONS = 32  # of eight gateways behind one address, all but one search in 70 ends well
_OUTCOME_STYLES = {"dispatched": "green", "degraded": "yellow", "queued": "yellow"}


@connecting
def explain(
    request_id: Annotated[str, typer.Argument(metavar="REQUEST_ID", help="Of a recent request.")],
    *,
    connection: Connection,
    json: AsJson = False,
) -> None:
    """Print why a request went where it went; ask until the gateway that served it is reached."""
    found = _find(request_id, connection)
    if json:
        print_json(asdict(found))
        return
    console = Console()
    console.print(_outcome_line(found), highlight=False)
    if found.candidates:
        console.print(candidates_table(found))
    console.print(_latency_line(found), highlight=False)


def _find(request_id: str, connection: Connection) -> Explanation:
    """Return what the gateway remembers that served a request.

    Several gateways may stand behind one address: each new connection reaches one of them. Where
    several addresses are known they are asked in turn.

    Raises:
        NotFoundError: None that was reached, in time, remembers it.
    """
    from cluster.rpc.queries import QUERY_TIMEOUT_S

    give_up_s = time.monotonic() + QUERY_TIMEOUT_S
    num_asked = 0
    while True:
        num_asked += 1
        try:
            with connection.open(first=num_asked - 1) as client:
                return client.explain(request_id)
        except NotFoundError:
            if num_asked == _MAX_CONNECTIONS or time.monotonic() >= give_up_s:
                raise


def candidates_table(found: Explanation) -> Table:
    """Return the replicas that were weighed, best first; the chosen one is marked."""
    title = f"the best {len(found.candidates)} of {found.num_candidates} weighed"
    if found.num_excluded:
        title += f", {found.num_excluded} passed over"
    table = Table("", "replica", title=title, title_justify="left")
    for name in ("score", "cached", "to compute", "requests"):
        table.add_column(name, justify="right")
    for name in ("wait", "TTFT p50", "TTFT high", "TPOT"):
        table.add_column(f"{name}, ms", justify="right")
    for candidate in found.candidates:
        is_chosen = candidate == found.chosen
        table.add_row(
            "→" if is_chosen else "",
            escape(candidate.replica_id),
            *_figures(candidate),
            style="bold green" if is_chosen else None,
        )
    return table


def _figures(candidate: RouteCandidate) -> list[str]:
    predicted_s = (
        candidate.wait_s,
        candidate.ttft_p50_s,
        candidate.ttft_high_s,
        candidate.tpot_s,
    )
    return [
        f"{candidate.score:.4g}",
        str(candidate.cached_tokens),
        str(candidate.uncached_tokens),
        str(candidate.num_requests),
        *(f"{value_s * 1e3:.1f}" for value_s in predicted_s),
    ]


def _outcome_line(found: Explanation) -> str:
    style = _OUTCOME_STYLES.get(found.outcome, "red")
    reason = f": {escape(found.reason)}" if found.reason else ""
    return (
        f"{escape(found.request_id)} [{style}]{found.outcome}[/] by policy "
        f"{escape(found.policy)} {found.age_s:.1f} s ago{reason}"
    )


def _latency_line(found: Explanation) -> str:
    """Return the first token's time as it was asked for, predicted and seen."""
    chosen = found.chosen
    predicted_s = chosen.ttft_p50_s or None if chosen else None  # not all policies predict
    parts = {
        "objective": found.ttft_slo_s,
        "predicted at dispatch (p50)": predicted_s,
        "actual from arrival": found.ttft_s,
    }
    shown = [f"{name} {_ms(value_s)}" for name, value_s in parts.items()]
    tpot = "" if found.tpot_slo_s is None else f"; TPOT: objective {_ms(found.tpot_slo_s)}"
    return f"TTFT: {', '.join(shown)}{tpot}"


def _ms(value_s: float | None) -> str:
    return "-" if value_s is None else f"{value_s * 1e3:.1f} ms"
