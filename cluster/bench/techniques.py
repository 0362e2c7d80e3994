"""The ablation: one technique after the other on the same workload, each in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from cluster.bench.techniques_ladder import ALL_TOGETHER, Technique, ladder
from cluster.bench.techniques_row import Row
from cluster.bench.techniques_workload import Workload
from cluster.config import ModelConfig
from cluster.errors import InvalidArgumentError

LOAD_TIMEOUT_S = 240.0
"""For importing, loading, building kernels for the first time, and warming up."""

DRAIN_FACTOR = 4.0
"""A row may take so many times its budget: what began before its end is finished."""

RunRow = Callable[[Row, Technique], dict[str, Any]]


def choose(names: Sequence[str]) -> tuple[Technique, ...]:
    """Return the techniques of these names in the ladder's order; all of them for none.

    Raises:
        InvalidArgumentError: There is no technique of such a name.
    """
    known = {technique.name: technique for technique in ladder()}
    strange = next((name for name in names if name not in known), None)
    if strange is not None:
        raise InvalidArgumentError(
            f"--technique={strange}: unknown; there are {', '.join(known)}", field="technique"
        )
    return tuple(one for one in ladder() if not names or one.name in names)


def run_techniques(
    model: str,
    workload: Workload,
    *,
    threads: int = 0,
    names: Sequence[str] = (),
    on_row: Callable[[str, int, int], None] = lambda *_: None,
    run_row: RunRow | None = None,
) -> dict[str, Any]:
    """Return the figures of every row, with gains; a row that fails says why instead.

    Args:
        model: Folder of a checkpoint, or "demo".
        workload: The same for all.
        threads: Of each process; 0 takes one per core.
        names: Of the techniques; empty for all.
        on_row: Gets a row's title before it begins, its index, and how many rows there are.
        run_row: Measures one row; None starts a process for it.
    """
    techniques = choose(names)
    run = run_row or run_in_process
    answers = []
    for index, technique in enumerate(techniques):
        on_row(technique.title, index, len(techniques))
        answers.append(run(Row(technique.name, model, threads, workload), technique))
    rows = with_gains(techniques, answers)
    return {
        "model": ModelConfig(path=model).served_name,
        "threads": threads or os.cpu_count(),
        "workload": asdict(workload),
        "rows": rows,
        "total": total_gain(rows),
    }


def run_in_process(row: Row, technique: Technique) -> dict[str, Any]:
    """Return a row's figures, or {"error": reason}, from a process of its own."""
    environment = os.environ | {"SLUICE_KERNELS": technique.kernels}
    if not technique.kernels:  # the user's own choice, or the best there are
        environment.pop("SLUICE_KERNELS")
        if "SLUICE_KERNELS" in os.environ:
            environment["SLUICE_KERNELS"] = os.environ["SLUICE_KERNELS"]
    timeout_s = LOAD_TIMEOUT_S + DRAIN_FACTOR * row.workload.budget_s
    try:
        done = subprocess.run(
            [sys.executable, "-m", "cluster.bench.techniques_row"],
            input=row.encode(),
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {timeout_s:g} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": f"the process ended with {done.returncode}: {last}"}
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def with_gains(
    techniques: Sequence[Technique], answers: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the rows of the report: what was measured, and how much it gains in out tokens/s.

    The row before is the last one that could be measured; without a first row there is no gain over
    it.
    """
    rows: list[dict[str, Any]] = []
    before: float | None = None
    first = answers[0].get("out_tokens_per_s") if answers else None
    for technique, answer in zip(techniques, answers, strict=True):
        rate = answer.get("out_tokens_per_s")
        gain = rate / before if rate and before else None
        rows.append(
            {
                "name": technique.name,
                "title": technique.title,
                "switch": technique.switch,
                "error": None,
                **answer,
                "gain_over_previous": gain,
                "gain_over_first": rate / first if rate and first else None,
                "is_gain": gain > 1 if gain else None,
                "literature": asdict(technique.literature) if technique.literature else None,
            }
        )
        before = rate or before
    return rows


def total_gain(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what all techniques together gain over the first row: in the best of the rows."""
    measured = [row for row in rows if row["gain_over_first"]]
    best = max(measured, key=lambda row: row["gain_over_first"], default=None)
    return {
        "first": rows[0]["name"] if rows else None,
        "best": best["name"] if best else None,
        "gain": best["gain_over_first"] if best else None,
        "literature": asdict(ALL_TOGETHER),
    }
