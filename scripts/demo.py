"""Start a cluster on this machine, stream completions side by side, show the figures, stop it.

Run by scripts/demo, which installs what it needs. Exit status 0 only if every stream finished.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cluster.bench.provenance import provenance
from cluster.bench.report import figure_table, latency_table
from cluster.bench.statistics import LatencyObjective, RequestRecord, summarize
from cluster.cli.options import print_json
from cluster.client import (
    AsyncClient,
    Client,
    ClusterState,
    Finished,
    Running,
    TextDelta,
    Usage,
)
from cluster.config import ClusterConfig, load_config
from cluster.errors import SluiceError
from cluster.gateway import app

MODULE = '''"""Words of a text, and how often each of them occurs."""

import os
import re
import sys
from collections import Counter


class WordCounter:
    """Count the words of files."""

    def __init__(self, pattern=None, encoding="utf-8"):
        self.pattern = re.compile(pattern or r"[a-z]+")
        self.encoding = encoding
        self.words = Counter()

    def read(self, path):
        """Count the words of one file."""
        with open(path, encoding=self.encoding) as file:
            for line in file:
                self.words.update(self.pattern.findall(line.lower()))

'''
METHODS = (
    "def most_common(self, number):",
    "def __len__(self):",
    "def __contains__(self, word):",
    "def clear(self):",
    "def save(self, path):",
    "def load(self, path):",
    "def merge(self, other):",
    "def remove(self, word):",
    "def __iter__(self):",
    "def __repr__(self):",
    "def print_report(self, file=None):",
    "def _check(self, path):",
)
BEGINNINGS = (
    "import os\nimport sys\n\ndef main():\n",
    "def quote(string, safe='/', encoding=None, errors=None):\n    ",
    "class Queue:\n    def __init__(self, maxsize=0):\n",
    "def walk(top, topdown=True, onerror=None):\n    ",
    "class TestCase(object):\n    def setUp(self):\n",
    "try:\n    import threading\nexcept ImportError:\n",
    "def parse_args(self, args=None, namespace=None):\n    ",
    "if __name__ == '__main__':\n    ",
    "class Error(Exception):\n    ",
    "async def open_connection(host=None, port=None):\n    ",
    "def read(self, size=-1):\n    if self.closed:\n",
    "for name in sorted(os.listdir(path)):\n    ",
)
TIMEOUT_S = 300.0
REFRESH_PER_S = 8
_STYLES = {"waiting": "dim", "running": "yellow", "done": "green", "failed": "red"}


@dataclass(slots=True)
class Stream:
    """One completion as it grows. Times are seconds since the demo's first request."""

    prompt: str
    state: str = "waiting"
    replica_id: str = ""
    text: str = ""
    num_tokens: int = 0
    sent_s: float = 0.0
    times_s: list[float] = field(default_factory=list)  # of messages that brought tokens
    usage: Usage | None = None  # of a finished one
    end_s: float = 0.0
    error: str = ""
    has_begun: asyncio.Event = field(default_factory=asyncio.Event)  # first token, or the end

    @property
    def label(self) -> str:
        """The prompt's last line that says something."""
        return self.prompt.strip().splitlines()[-1].strip()

    def record(self) -> RequestRecord:
        """Return what the statistics need."""
        status = "OK" if self.state == "done" else "FAILED"
        times_s, usage = tuple(self.times_s), self.usage or Usage(0, 0, 0)
        prompt, cached = usage.prompt_tokens, usage.cached_tokens
        return RequestRecord(
            self.sent_s, self.end_s, status, times_s, self.num_tokens, prompt, cached
        )


def make_streams() -> list[Stream]:
    """Return one stream for each prompt; half of them continue the same module."""
    shared = [Stream(f"{MODULE}    {method}\n        ") for method in METHODS]
    return [stream for pair in zip(shared, map(Stream, BEGINNINGS), strict=True) for stream in pair]


async def follow(client: AsyncClient, stream: Stream, max_tokens: int, start_s: float) -> None:
    """Ask for one completion and note all that comes."""
    sampling = {"max_tokens": max_tokens, "temperature": 0.7, "top_p": 0.95, "seed": 1}
    sampling["ignore_eos"] = True  # every stream brings the same number of tokens
    stream.sent_s = time.perf_counter() - start_s
    try:
        events = client.stream(stream.prompt, sampling=sampling, timeout_s=TIMEOUT_S)
        async for event in events:
            if isinstance(event, Running):
                stream.state, stream.replica_id = "running", event.replica_id
            elif isinstance(event, TextDelta):
                stream.text += event.text
                stream.num_tokens += len(event.token_ids)
                if event.token_ids:
                    stream.times_s.append(time.perf_counter() - start_s)
                    stream.has_begun.set()
            elif isinstance(event, Finished):
                stream.state, stream.usage = "done", event.usage
    except SluiceError as error:
        stream.state, stream.error = "failed", f"{error.code}: {error}"
    stream.end_s = time.perf_counter() - start_s
    stream.has_begun.set()


async def run_streams(
    address: str, streams: list[Stream], max_tokens: int, console: Console
) -> None:
    """Follow all streams at once and show them until the last has ended."""
    start_s = time.perf_counter()
    async with AsyncClient(address) as client, asyncio.TaskGroup() as group:
        # The first prompt of the shared module goes ahead, so that the others find its prefix.
        tasks = [group.create_task(follow(client, streams[0], max_tokens, start_s))]
        await streams[0].has_begun.wait()
        tasks += [group.create_task(follow(client, s, max_tokens, start_s)) for s in streams[1:]]
        if console.is_terminal:
            await show_live(streams, tasks, console)
        else:
            await show_lines(streams, tasks, console)


async def show_live(
    streams: list[Stream], tasks: list[asyncio.Task[None]], console: Console
) -> None:
    """Redraw the text of the first stream and the table of all."""
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            num_lines = max(4, console.height - len(streams) - 5)  # what the table leaves
            panel = text_panel(streams[0], num_lines)
            live.update(Group(panel, streams_table(streams)), refresh=True)
            if all(task.done() for task in tasks):
                break
            await asyncio.sleep(1 / REFRESH_PER_S)
    console.print(text_panel(streams[0]), streams_table(streams))


async def show_lines(
    streams: list[Stream], tasks: list[asyncio.Task[None]], console: Console
) -> None:
    """Print one line as each stream ends, then the text of the first."""
    shown: set[int] = set()
    while len(shown) < len(streams):
        for index, task in enumerate(tasks):
            if task.done() and index not in shown:
                shown.add(index)
                stream = streams[index]
                line = f"{stream.state:>7} {stream.num_tokens:4} tokens  {stream.label}"
                console.print(f"{line} {stream.error}".rstrip(), markup=False, highlight=False)
        await asyncio.sleep(0.05)
    console.print(text_panel(streams[0]))


def text_panel(stream: Stream, num_lines: int = 0) -> Panel:
    """Return prompt, dimmed, and text in a frame: the last lines, or with 0 all of them."""
    text = Text.assemble((stream.prompt, "dim"), stream.text)
    lines = text.split("\n", allow_blank=True)
    return Panel(Text("\n").join(lines[-num_lines:]), title=stream.label)


def streams_table(streams: list[Stream]) -> Table:
    """Return state, tokens and TTFT of every stream."""
    table = Table("prompt", "state", "replica", box=None, pad_edge=False)
    for name in ("tokens", "cached", "TTFT ms"):
        table.add_column(name, justify="right")
    for stream in streams:
        ttft = f"{(stream.times_s[0] - stream.sent_s) * 1e3:.0f}" if stream.times_s else ""
        cached = str(stream.usage.cached_tokens) if stream.usage else ""
        state = Text(stream.state, _STYLES[stream.state])
        label, replica = Text(stream.label, no_wrap=True), Text(stream.replica_id[-8:])
        table.add_row(label, state, replica, str(stream.num_tokens), cached, ttft)
    return table


def prefix_hit_rate(state: ClusterState) -> float:
    """Return the share of the prompts' tokens that replicas found in any tier of their caches."""
    num_queried = sum(replica.num_prefix_query_tokens for replica in state.replicas)
    num_hit = sum(replica.num_prefix_hit_tokens for replica in state.replicas)
    return num_hit / num_queried if num_queried else 0.0


def hits_below_device(state: ClusterState) -> dict[str, int]:
    """Return how many prompt tokens came from the lower tiers, by tier."""
    tiers = [replica.cache for replica in state.replicas]
    return {
        "host": sum(tier.num_host_hit_tokens for tier in tiers),
        "store": sum(tier.num_store_hit_tokens for tier in tiers),
    }


def start_cluster(config: ClusterConfig, console: Console) -> app.ServingCluster:
    """Start the cluster and say what goes on."""
    with console.status("starting") as spinner:

        def tell(message: str) -> None:
            if console.is_terminal:
                spinner.update(message)
            else:
                console.print(message, markup=False, highlight=False)

        return app.start(config, on_progress=tell)


def demo(
    max_tokens: Annotated[int, typer.Option(min=1, max=1024, help="Of each completion.")] = 96,
    replicas: Annotated[int, typer.Option(min=1, help="Groups that serve the model.")] = 2,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON only.")] = False,
) -> None:
    """Stream completions of Python code from a cluster on this machine."""
    console = Console(stderr=json)
    config = load_config(None, ["gateway.port=0", f"replica.num_replicas={replicas}"])
    streams = make_streams()
    # Ray prints to standard output on its own account: there, JSON has to be alone.
    output = contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext()
    try:
        app.check(config)
        with output, start_cluster(config, console) as cluster:
            asyncio.run(run_streams(cluster.address, streams, max_tokens, console))
            with Client(cluster.address) as client:
                state = client.status()
            console.print("stopping the cluster")
    except SluiceError as error:
        console.print(f"demo: {error}", style="red", markup=False)
        raise typer.Exit(1) from error
    result = summarize([stream.record() for stream in streams], LatencyObjective())
    report(result, state, json)
    raise typer.Exit(exit_status(streams))


def exit_status(streams: list[Stream]) -> int:
    """Return 0 where every stream finished, else 1."""
    return int(any(stream.state != "done" for stream in streams))


def report(result: dict[str, Any], state: ClusterState, json: bool) -> None:
    """Print the figures."""
    hit_rate, lower = prefix_hit_rate(state), hits_below_device(state)
    if json:
        hits = {"prefix_hit_rate": hit_rate, "tier_hit_tokens": lower}
        print_json({"result": result, **hits, "provenance": provenance()})
        return
    rates = {
        "streams finished": f"{result['num_ok']} of {result['num_requests']}",
        "tokens/s": f"{result['out_tokens_per_s']:.0f}",
        "prefix-cache hit rate": f"{hit_rate:.0%} of prompt tokens",
        "of these from lower tiers": f"{lower['host']} tokens (host), {lower['store']} (store)",
    }
    Console().print(latency_table(result), figure_table(rates))


if __name__ == "__main__":
    typer.run(demo)
