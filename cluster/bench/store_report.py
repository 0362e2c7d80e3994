"""The figures of `bench store` as tables for the terminal, and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from cluster.bench.canvas import open_pyplot, write_png
from cluster.bench.report import figure_table

ASKED = {
    "get": 0.7,  # of raw redis-py, at the least
    "store": 0.35,  # of the cold TTFT, at the most
    "local": 0.08,  # likewise
    "decode": 1.05,  # p99 of a decode step while blocks move
    "hit_rate": 0.95,  # of a hot set
    "used": 1.02,  # of the budget
    "growth": 0.1,  # of p99 TPOT during a fault
    "recovery_s": 5.0,
}


def store_report(figures: dict[str, Any]) -> RenderableType:
    """Return the tables of one `store.run_store_bench` result."""
    result = figures["result"]
    tables = {
        "raw": _raw_table,
        "budget": _budget_table,
        "ttft": _ttft_table,
        "decode": _decode_table,
        "prefix": _prefix_table,
    }
    return Group(*(make(result[part]) for part, make in tables.items() if part in result))


def _table(title: str, *columns: str) -> Table:
    table = Table(*columns, title=title, title_justify="left")
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _raw_table(raw: dict[str, Any]) -> Table:
    table = _table(
        f"Blocks to and from Redis; asked: get at least {ASKED['get']:g} of redis-py",
        *("block, KiB", "", "redis-py GB/s", "blocks GB/s", "ratio", "mover GB/s", "ratio"),
        *("p50, ms", "p99, ms"),
    )
    for size in raw["sizes"]:
        for kind in ("put", "get"):
            ways = size[kind]
            cells = [f"{ways['redis_py']['bytes_per_s'] / 1e9:.2f}"]
            for way in ("blocks", "mover"):
                cells += [f"{ways[way]['bytes_per_s'] / 1e9:.2f}", f"{ways[way]['ratio']:.2f}"]
            cells += [_ms(ways["blocks"]["p50_s"]), _ms(ways["blocks"]["p99_s"])]
            table.add_row(f"{size['block_bytes'] // 1024}", kind, *cells)
    return table


def _budget_table(budget: dict[str, Any]) -> Table:
    table = _table(
        f"{budget['times']} x a budget of {budget['budget_bytes'] // 2**20} MiB written; asked: "
        f"used at most {ASKED['used']:g}, hits at least {ASKED['hit_rate']:g}, none rejected",
        *("block, KiB", "used, books", "used, server", "rejected", "evicted", "hot set hit"),
    )
    for row in budget["sizes"]:
        table.add_row(
            f"{row['block_bytes'] // 1024}",
            f"{row['used_share']:.3f}",
            f"{row['memory_share']:.3f}",
            str(row["num_rejected"]),
            str(row["num_evicted"]),
            f"{row['hot_hit_rate']:.3f}",
        )
    return table


def _ttft_table(ttft: dict[str, Any]) -> Table:
    table = _table(
        f"TTFT of {ttft['prompt_tokens']} tokens; asked: store at most {ASKED['store']:g} of cold, "
        f"local {ASKED['local']:g}",
        *("blocks are", "TTFT, ms", "of cold", "found whole"),
    )
    names = {"cold": "nowhere", "local": "in the KV cache", "host": "in the host tier"}
    for kind, row in ttft["kinds"].items():
        whole = "" if kind == "cold" else f"{row['whole_hits']} of {len(row['rounds_ttft_s'])}"
        name = names.get(kind, "in the store")
        table.add_row(name, _ms(row["ttft_s"]), f"{row['share_of_cold']:.3f}", whole)
    return table


def _decode_table(decode: dict[str, Any]) -> Table:
    table = _table(
        f"Decode steps of {decode['load']['num_streams']} streams; asked: p99 while blocks move at "
        f"most {ASKED['decode']:g} of that without a store",
        *("", "p50, ms", "p99, ms", "p99 ratio"),
    )
    steps = decode["steps"]
    rows = (
        ("without a store", "without", None),
        ("with, while blocks move", "moving", decode["p99_ratio_while_moving"]),
        ("with, all steps", "with", decode["p99_ratio_of_all"]),
        ("without, once more", "again", decode["p99_ratio_of_two_without"]),
    )
    for name, way, ratio in rows:
        cells = (_ms(steps[way]["p50_s"]), _ms(steps[way]["p99_s"]))
        table.add_row(name, *cells, "" if ratio is None else f"{ratio:.2f}")
    return table


def _prefix_table(prefix: dict[str, Any]) -> Table:
    load = prefix["load"]
    table = _table(
        f"{load['num_requests']} requests of {load['own_tokens']} tokens over a prefix of "
        f"{load['prefix_tokens']}",
        *("the prefix is", "requests/s", "times", "TTFT p50, ms", "found", "blocks fetched"),
    )
    names = {"without": "computed each time", "local": "found in the KV cache"}
    for way, row in prefix["ways"].items():
        table.add_row(
            names.get(way, "in the store at first"),
            f"{row['requests_per_s']:.1f}",
            f"{row['times']:.2f}",
            _ms(row["ttft_p50_s"]),
            f"{row['cached_token_share']:.1%}",
            f"{row['fetched_blocks']:.0f}",
        )
    return table


def fault_report(figures: dict[str, Any]) -> RenderableType:
    """Return the tables of one `store.run_store_faults` result."""
    result = figures["result"]
    load, without = result["load"], result["without_store"]
    rss = result["rss_bytes"]  # before, and after each time through all faults
    table = _table(
        f"{escape(figures['model'])}, {result['rate_per_s']:.2f} requests/s; asked: p99 TPOT grows "
        f"by at most {ASKED['growth']:.0%}, recovery within {ASKED['recovery_s']:g} s",
        *("", "requests", "streams", "TPOT p50, ms", "p99, ms", "growth", "recovery, s", "failed"),
        "different",
    )
    rows = [
        {"name": "without a store", **without},
        {"name": "undisturbed", **result["undisturbed"]},
        *result["faults"],
    ]
    for row in rows:
        grown, recovery_s = row.get("tpot_p99_growth"), row.get("recovery_s")
        is_lost = row.get("num_not_recovered", 0) > 0
        table.add_row(
            row["name"],
            str(row["num_requests"]),
            "-" if row["streams_p50"] is None else f"{row['streams_p50']:.0f}",
            _ms(row["tpot_p50_s"]),
            _ms(row["tpot_p99_s"]),
            "" if grown is None else f"{grown:+.1%}",
            "not" if is_lost else "" if recovery_s is None else f"{recovery_s:.1f}",
            str(row["num_failed"]),
            str(row["num_different"]),
        )
    sums = {
        "answers of": f"{load['prompt_tokens']} in, {load['answer_tokens']} out",
        "failed, in all": str(result["num_failed"]),
        "other than the reference": f"{result['num_different']} of {result['num_requests']}",
        "other without a store": f"{without['num_different']} of {without['num_requests']}",
        **{
            f"RSS of the {name}, MiB": " to ".join(f"{one[name] / 2**20:.1f}" for one in rss)
            for name in rss[0]
        },
    }
    return Group(table, figure_table(sums))


def plot_store(figures: dict[str, Any], path: Path) -> None:
    """Write a PNG of what `bench store` measured: reads by block size, TTFT by tier.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    pyplot, result = open_pyplot(), figures["result"]
    figure, (rates, ttft) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    figure.suptitle(f"The store, {figures['model']}")
    for way in ("redis_py", "blocks", "mover") if "raw" in result else ():
        sizes = result["raw"]["sizes"]
        values = [size["get"][way]["bytes_per_s"] / 1e9 for size in sizes]
        rates.plot([size["block_bytes"] / 1024 for size in sizes], values, "o-", label=way)
        rates.legend()
    rates.set(xlabel="block, KiB", ylabel="read, GB/s", xscale="log")
    for kind, row in result["ttft"]["kinds"].items() if "ttft" in result else ():
        ttft.bar(kind, row["ttft_s"])
        ttft.text(kind, row["ttft_s"], f"{row['share_of_cold']:.3f}", ha="center", va="bottom")
        ttft.set(ylabel="TTFT, seconds", yscale="log")
    write_png(pyplot, figure, path)


def plot_faults(figures: dict[str, Any], path: Path) -> None:
    """Write a PNG of p99 TPOT by fault, beside the undisturbed one and what is allowed.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    pyplot, result = open_pyplot(), figures["result"]
    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    axes.barh(
        [fault["name"] for fault in result["faults"]],
        [(fault["tpot_p99_s"] or 0.0) * 1e3 for fault in result["faults"]],
    )
    asked_ms = [
        (fault["undisturbed_tpot_p99_s"] or 0.0) * (1 + ASKED["growth"]) * 1e3
        for fault in result["faults"]
    ]
    axes.plot(asked_ms, range(len(asked_ms)), "r|", markersize=24, label="allowed")
    axes.set(xlabel="p99 TPOT, ms", title=figures["model"])
    axes.legend()
    write_png(pyplot, figure, path)


def _ms(value_s: float | None) -> str:
    return "-" if value_s is None else f"{value_s * 1e3:.1f}"
