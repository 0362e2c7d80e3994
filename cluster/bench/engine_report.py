"""The figures of `bench engine` as tables for the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from cluster.bench.report import figure_table

_MIB = 2**20


def engine_report(figures: dict[str, Any]) -> RenderableType:
    """Return the tables of one `engine.run_engine_bench` result."""
    load, result, peaks = figures["load"], figures["result"], figures["hardware"]
    engine = figures["engine"]
    throughput = figure_table(
        {
            "model": f"{escape(figures['model'])}, {engine['dtype']}, {engine['quantization']}",
            "runs on": f"{engine['device']}, {engine['threads']} threads, {engine['kernels']}",
            "attention": engine["attention"]
            + (", decode steps in CUDA graphs" if engine["decode_graphs"] else ""),
            "load": f"{load['num_requests']} x ({load['num_input_tokens']} in, "
            f"{load['num_output_tokens']} out)",
            "out tokens/s": f"{result['out_tokens_per_s']:.1f}",
            "total tokens/s": f"{result['total_tokens_per_s']:.1f}",
            "TTFT, one request": f"{result['ttft_s'] * 1e3:.1f} ms",
            "one stream, decoding": f"{result['single_stream_tokens_per_s']:.1f} tokens/s",
            "TTFT p50 / p99, batch": _pair_ms(result["batch_ttft_s"]),
            "TPOT p50 / p99, batch": _pair_ms(result["batch_tpot_s"]),
        }
    )
    limits = figure_table(
        {
            "memory, read": f"{peaks['read_bytes_per_s'] / 1e9:.1f} GB/s measured",
            "reached by one stream": _share(result["memory_bandwidth_share"]),
            f"reached by {result['decode_batch'] or 0:.0f} streams": _share(
                result["batch_memory_bandwidth_share"]
            ),
            f"products, {peaks['matrix_kind']}": (
                f"{peaks['matrix_flop_per_s'] / 1e9:.0f} GFLOP/s measured"
            ),
            "reached by one prompt": _share(result["matrix_peak_share"]),
            "decode step outside of the model": _share(result["engine_overhead_share"]),
            "decode step outside of the executor": _share(result["scheduling_share"]),
            "weights": f"{result['weight_bytes'] / _MIB:.1f} MiB",
            "KV cache": f"{result['kv_cache_bytes'] / _MIB:.1f} MiB",
            "peak RSS": f"{result['peak_rss_bytes'] / _MIB:.1f} MiB",
            "load time": f"{result['load_s']:.1f} s",
        }
    )
    return Group(throughput, limits)


def profile_table(rows: list[dict[str, Any]]) -> Table:
    """Return the table of `engine.profile_round`."""
    table = Table("operation", "calls", "CPU ms", "device ms", "share of the round")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        times = [f"{row[name] * 1e3:.1f}" for name in ("cpu_s", "device_s")]
        table.add_row(escape(row["name"]), str(row["calls"]), *times, f"{row['share']:.1%}")
    return table


def _pair_ms(values_s: dict[str, float | None]) -> str:
    low, high = values_s["p50"], values_s["p99"]
    return "-" if low is None or high is None else f"{low * 1e3:.1f} / {high * 1e3:.1f} ms"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
