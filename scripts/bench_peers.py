"""Measure Sluice, transformers, vLLM, OpenVINO GenAI and llama.cpp on the same work, in turns.

Run by scripts/bench_peers. Each peer gets an environment of its own in the cache folder, made at
the first call (gigabytes, minutes), and each run a fresh process. A peer that fails has a line
that says why; the others go on. Interrupted, it reports what it has. Exit status 0 only if all
runs gave figures.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from cluster.bench.peers.comparison import Run, compare
from cluster.bench.peers.environments import Environments, default_cache
from cluster.bench.peers.measuring import Measuring
from cluster.bench.peers.peers import PEERS, SLUICE
from cluster.bench.peers.rounds import Estimate, Turn, run_rounds, turns
from cluster.bench.peers.rows import ROWS, Row, Work
from cluster.bench.peers.table import markdown, rich_table
from cluster.bench.provenance import provenance
from cluster.cli.options import bar_options, print_json
from cluster.config import DEMO_MODEL_PATH
from cluster.errors import SluiceError
from cluster.model.random_models import write_random_model

DEFAULT_SHAPE = "llama-0.5b"


def run_all(measuring: Measuring, rows: Sequence[Row], rounds: int, say: Console) -> list[Run]:
    """Run all rounds under a bar that knows how long the rest will take."""
    due, estimate = list(turns(rows, rounds)), Estimate()
    started_s = last_s = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, **bar_options() | {"console": say}) as progress:
        task = progress.add_task("peers", total=estimate.remaining_s(due))

        def on_run(run: Run) -> None:
            nonlocal last_s
            now_s = time.perf_counter()
            estimate.record(run.row, run.peer, now_s - last_s)
            last_s = now_s
            left = _after(due, run)
            _advance(progress, task, now_s - started_s, estimate.remaining_s(left), left)
            say.print(_line(run), highlight=False, markup=False, soft_wrap=True)

        return run_rounds(due, measuring.measure, on_run)


def _after(due: Sequence[Turn], run: Run) -> Sequence[Turn]:
    key = (run.row, run.peer, run.round)
    index = [(turn.row.name, turn.peer, turn.round) for turn in due].index(key)
    return due[index + 1 :]


def _advance(
    progress: Progress, task: TaskID, done_s: float, left_s: float, left: Sequence[Turn]
) -> None:
    name = f"round {left[0].round}, {left[0].row.name}, {left[0].peer}" if left else "done"
    progress.update(task, completed=done_s, total=done_s + left_s, description=name)


def _line(run: Run) -> str:
    start = f"round {run.round} {run.row:>5} {run.peer:>12}: "
    if run.error:
        return f"{start}failed, {run.error}"
    figures = run.figures
    return (
        f"{start}{figures['out_tokens_per_s']:.1f} tok/s, "
        f"one stream {figures['single_stream_tokens_per_s']:.1f} tok/s, "
        f"TTFT {figures['ttft_s'] * 1e3:.0f} ms, {figures['peak_rss_bytes'] / 2**20:.0f} MiB"
    )


def chosen_rows(
    names: Sequence[str], peers: Sequence[str], requests: int, input_len: int, output_len: int
) -> list[Row]:
    """Return the named rows with the named peers; a size of 0 keeps the row's own.

    Raises:
        typer.BadParameter: A name that is not known.
    """
    _check_names(names, [row.name for row in ROWS], "--rows")
    _check_names(peers, [SLUICE, *PEERS], "--peers")
    rows = []
    for row in ROWS:
        present = tuple(peer for peer in row.peers if peer in peers)
        if row.name in names and present:
            sizes = zip((requests, input_len, output_len), astuple(row.work), strict=True)
            work = Work(*(size or usual for size, usual in sizes))
            rows.append(replace(row, work=work, peers=present))
    if not rows:
        raise typer.BadParameter("none of these peers takes part in these rows: choose others")
    return rows


def _check_names(given: Sequence[str], known: Sequence[str], option: str) -> None:
    if unknown := [name for name in given if name not in known]:
        raise typer.BadParameter(
            f"{', '.join(unknown)}: unknown, choose among {', '.join(known)}", param_hint=option
        )


def checkpoint(model: Path | None, cache: Path) -> Path:
    """Return the model's folder; without one, the random-weight model, made where it is missing."""
    if model is not None:
        if not (model / "config.json").is_file():
            raise typer.BadParameter(f"{model} has no config.json", param_hint="--model")
        return model
    folder = cache / "models" / DEFAULT_SHAPE
    if not (folder / "config.json").is_file():
        write_random_model(
            DEFAULT_SHAPE, folder, dtype="bfloat16", seed=0, tokenizer_from=DEMO_MODEL_PATH
        )
    return folder


def report(
    measuring: Measuring, rows: Sequence[Row], runs: Sequence[Run], rounds: int
) -> dict[str, Any]:
    """Return everything that was measured, as plain data."""
    names = dict.fromkeys(peer for row in rows for peer in row.peers if peer != SLUICE)
    origin = provenance()
    for name in names:
        installed = measuring.environments.versions(PEERS[name])
        pinned = [requirement.split("==")[0] for requirement in PEERS[name].requirements]
        found = ", ".join(f"{package} {installed.get(package, 'missing')}" for package in pinned)
        origin["versions"][f"[{name}]"] = found
    return {
        "benchmark": "peers",
        "rounds": rounds,
        "threads": measuring.threads,
        "seed": measuring.seed,
        "model": str(measuring.model),
        "rows": [asdict(row) for row in rows],
        "entries": [asdict(entry) for entry in compare(runs, rows)],
        "runs": [asdict(run) for run in runs],
        "provenance": origin,
    }


def main(
    rows: Annotated[
        str, typer.Option(help="Among bf16, int8, int4, long.")
    ] = "bf16,int8,int4,long",
    peers: Annotated[
        str, typer.Option(help="Among sluice, vllm, openvino, transformers, llama.cpp.")
    ] = ",".join([SLUICE, *PEERS]),
    rounds: Annotated[int, typer.Option(min=1, help="Medians are taken over them.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Cores for each.")] = 2,
    requests: Annotated[int, typer.Option(min=0, help="In place of each row's own.")] = 0,
    input_len: Annotated[int, typer.Option(min=0, help="In place of each row's own.")] = 0,
    output_len: Annotated[int, typer.Option(min=0, help="At least 2; in place of own.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    timeout_s: Annotated[float, typer.Option(min=1, help="Of one run.")] = 1200.0,
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A Llama checkpoint; else a random one.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Of environments and models: gigabytes.")
    ] = None,
    markdown_file: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Write the table here too.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure Sluice and its peers on the same work, in turns; medians and ratios in one table."""
    if output_len == 1:
        raise typer.BadParameter(
            "1: a rate of decoding needs at least 2", param_hint="--output-len"
        )
    chosen = chosen_rows(rows.split(","), peers.split(","), requests, input_len, output_len)
    say = Console(stderr=True)
    folder = (cache or default_cache()).resolve()
    try:
        place = Environments(folder)
        measuring = Measuring(place, checkpoint(model, folder), threads, seed, timeout_s)

    except SluiceError as error:
        raise typer.BadParameter(str(error)) from None
    with say.status("environments and models of the peers"):
        measuring.prepare(chosen, on_step=say.print)
    runs = run_all(measuring, chosen, rounds, say)
    data = report(measuring, chosen, runs, rounds)
    entries = compare(runs, chosen)
    if markdown_file is not None:
        markdown_file.write_text(markdown(entries, chosen, data["provenance"]), encoding="utf-8")
    if json:
        print_json(data)
    else:
        Console().print(rich_table(entries, chosen))
    if any(entry.num_runs < rounds for entry in entries):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
