"""The figures of `sluice bench chaos` as tables and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from cluster.bench.canvas import open_pyplot, write_png
from cluster.bench.chaos_memory import MIB
from cluster.bench.report import figure_table

MAX_LINES = 10  # of failures and of leaks; the data has more


def chaos_report(figures: dict[str, Any]) -> RenderableType:
    """Return the tables of one run."""
    streams, faults, leaks = figures["streams"], figures["faults"], figures["leaks"]
    plan = figures["plan"]
    rows = {
        "streams": f"{streams['num_streams']} in {figures['load_s']:.0f} s, seed {plan['seed']}",
        "tokens": f"{streams['num_tokens']}",
        **{name: str(number) for name, number in streams["verdicts"].items()},
        **{f"refused with {code}": str(n) for code, n in streams["refusals"].items()},
        "client library went on": f"{streams['num_resumptions']} times",
        "faults": f"{len(faults['each'])}, {faults['num_waited']} had to wait for a whole "
        f"cluster, {faults['num_never']} never happened",
        "leaks": str(len(leaks["found"])),
        **_memory_rows(leaks["memory"]),
        "answers left out": f"{figures['reference']['num_unstable']}, not the same twice in quiet",
    }
    parts: list[RenderableType] = [figure_table(rows), _gap_table(faults["kinds"])]
    for failure in streams["failures"][:MAX_LINES]:
        line = (
            f"{failure['verdict']}: {failure['ask']}, {failure['manner']}, from "
            f"{failure['begin_s'] - figures['begin_s']:.1f} s on: {failure['detail']}"
        )
        parts.append(escape(line))
    parts += [escape(_not_done(one, figures["begin_s"])) for one in faults["not_done"][:MAX_LINES]]
    parts += [escape(f"leak: {text}") for text in leaks["found"][:MAX_LINES]]
    parts += [escape(f"aim missed: {text}") for text in figures["misses"]]
    parts += [escape(f"not clean: {text}") for text in figures["not_clean"]]
    return Group(*parts)


def _memory_rows(memory: dict[str, dict[str, Any]]) -> dict[str, str]:
    rows = {}
    for kind in ("gateway", "leader"):
        row = memory.get(kind)
        if row is None:
            continue
        lives = f"{row['num_measured']} of {row['num_lives']} lives long enough"
        growth, allowed = row["growth_max_bytes_per_min"], row["allowed_min_bytes_per_min"]
        if growth is not None:
            lives += f", at most {growth / MIB:+.1f} MiB a minute, limit {allowed / MIB:.1f}"
        rows[f"memory of {kind}s"] = lives
        if row["difference_bytes"] is not None:
            rows[f"{kind}s {row['equal_age_s']:.0f} s old, last third of the run"] = (
                f"{row['difference_bytes'] / MIB:+.1f} MiB against the first"
            )
    return rows


def _not_done(fault: dict[str, Any], begin_s: float) -> str:
    at_s = fault["planned_s"] - begin_s
    return f"not brought about: {fault['kind']} of {at_s:.1f} s: {fault['why']}"


def _gap_table(kinds: dict[str, dict[str, Any]]) -> Table:
    columns = ("fault", "times", "victims", "gap p50", "p99", "max", "aim", "whole")
    table = Table(*columns, caption="seconds: longest gap of each stream hit; whole again")
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for name, row in kinds.items():
        gap, not_done = row["gap_s"], row["num_not_done"]
        table.add_row(
            name,
            f"{row['num_faults']}" + (f" ({not_done} failed)" if not_done else ""),
            str(row["num_victims"]),
            *(_seconds(gap[column]) for column in ("p50", "p99", "max")),
            _aim(row),
            _seconds(row["whole_after_p50_s"], 1),
        )
    return table


def _aim(row: dict[str, Any]) -> str:
    aims = (("p50", row["aim_p50_s"]), ("p99", row["aim_p99_s"]))
    return ", ".join(f"{name} {value:g}" for name, value in aims if value is not None)


def _seconds(value: float | None, num_digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{num_digits}f}"


def plot_chaos(figures: dict[str, Any], path: Path) -> None:
    """Write a PNG of the gaps, a histogram per kind of fault.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    pyplot = open_pyplot()
    gaps: dict[str, list[float]] = {name: [] for name in figures["faults"]["kinds"]}
    for fault in figures["faults"]["each"]:
        gaps[fault["kind"]] += fault["gaps_s"]
    names = [name for name, values in gaps.items() if values] or ["no gaps"]
    size = (8, 1 + 1.1 * len(names))
    figure, axes = pyplot.subplots(
        len(names), 1, figsize=size, sharex=True, squeeze=False, layout="constrained"
    )
    highest = max((gap for values in gaps.values() for gap in values), default=1.0)
    bins = np.geomspace(1e-3, max(10.0, 1.1 * highest), 60)
    for axis, name in zip(axes[:, 0], names, strict=True):
        values = np.clip(gaps.get(name, []), bins[0], None)
        axis.hist(values, bins=bins, color="tab:blue")
        if len(values):
            axis.axvline(float(np.median(values)), color="tab:red", linestyle=":")
        axis.set_ylabel(f"{name}\n{len(values)}", rotation=0, ha="right", va="center")
    axes[-1, 0].set(xscale="log", xlabel="longest gap of a victim, seconds (dotted: the median)")
    figure.suptitle(f"Gaps by fault, seed {figures['plan']['seed']}")
    write_png(pyplot, figure, path)
