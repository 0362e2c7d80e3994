"""A sweep whose points are Ray tasks, on this machine or on a cluster. All Ray calls are here.

A point crosses processes as plain data: its scenario goes there, its report comes back. The files
that a scenario names go along, so that the machines of a cluster need not share a disk.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from cluster.errors import ConfigError, UnavailableError
from cluster.simulator.scenario import Scenario, run_point
from cluster.simulator.sweep import GridPoint, OnPoint, SweepPoint, point_error

_FILE_FIELDS = ("trace", "cost_model")  # of a scenario
MAX_SILENCE_S = 3600.0
"""So long no point may end before a sweep is given up."""


def run_on_ray(
    scenario: Scenario,
    grid: Sequence[GridPoint],
    on_point: OnPoint | None = None,
    *,
    max_silence_s: float = MAX_SILENCE_S,
) -> list[SweepPoint]:
    """Run the points of a grid as Ray tasks; return them in the order of the grid.

    Uses the Ray that this process has joined, else that of the environment (RAY_ADDRESS, or the
    job that this runs in), else one of its own for as long as it takes.

    Args:
        scenario: What all points share.
        grid: What they differ in.
        on_point: Told of points as they end.
        max_silence_s: Give up when no point has ended for so long.

    Raises:
        SluiceError: A point failed, the message names it; or none ended in time.
    """
    with _joined(len(grid)):
        task = ray.remote(num_cpus=1, max_retries=1)(_run_remotely)
        files = ray.put(_read_files(scenario))
        pending = {
            task.remote(asdict(scenario), asdict(point), files): index
            for index, point in enumerate(grid)
        }
        done: dict[int, SweepPoint] = {}
        try:
            while pending:
                ended, _ = ray.wait(list(pending), num_returns=1, timeout=max_silence_s)
                if not ended:
                    raise UnavailableError(
                        f"no simulation ended within {max_silence_s:g} s, {len(pending)} are left, "
                        f"the first is {grid[min(pending.values())]}: simulate fewer requests, or "
                        "see whether Ray has free CPUs"
                    )
                index = pending.pop(ended[0])
                done[index] = _point(grid[index], ended[0])
                if on_point is not None:
                    on_point(done[index], len(done), len(grid))
        finally:
            for reference in pending:
                ray.cancel(reference, force=True)
    return [done[index] for index in range(len(grid))]


def _point(point: GridPoint, reference: Any) -> SweepPoint:
    try:
        report: dict[str, Any] = ray.get(reference)
    except RayTaskError as error:
        raise point_error(point, error.cause) from error
    except RayError as error:
        raise point_error(point, error) from error
    return SweepPoint(point.policy, point.rate_scale, point.seed, report)


def _run_remotely(
    tree: dict[str, Any], point: dict[str, Any], files: dict[str, tuple[str, str]]
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        for field, (name, text) in files.items():
            path = Path(folder) / field / name  # two files may have one name
            path.parent.mkdir()
            path.write_text(text, encoding="utf-8")
            tree = {**tree, field: str(path)}
        report = run_point(Scenario.from_dict(tree), GridPoint(**point))
    report["settings"] |= {field: name for field, (name, _) in files.items()}
    return report


def _read_files(scenario: Scenario) -> dict[str, tuple[str, str]]:
    """Return name and text of the files that a scenario names, by field."""
    files = {}
    for field in _FILE_FIELDS:
        path = getattr(scenario, field)
        if not path:
            continue
        try:
            files[field] = (Path(path).name, Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: {error}: give a text file", field=field) from error
    return files


@contextmanager
def _joined(num_points: int) -> Iterator[None]:
    """Hold a Ray; one that was started for this ends with it."""
    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_ID"):
        ray.init(address="auto", **quiet)
    else:
        num_cpus = min(num_points, os.cpu_count() or 1)
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, **quiet)
    try:
        yield
    finally:
        ray.shutdown()
