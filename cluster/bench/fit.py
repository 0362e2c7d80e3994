"""`sluice bench engine --fit`: what steps cost on this machine, in a file for the simulator.

Every fourth point of the grid is held out first: a fit that has not seen it predicts its steps,
which says how good such a fit is. The cost in the file is then fitted to all of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.bench.fit_grid import make_grid
from cluster.bench.fit_run import GridRun, MeasuredStep, OnProgress, StepWatch
from cluster.bench.statistics import percentile
from cluster.config import ClusterConfig
from cluster.engine.step_time import StepTimeModel
from cluster.errors import ConfigError
from cluster.types import StepCost

VERSION = 1
HELD_OUT = 4
"""Of so many points in turn one is held out."""


@dataclass(frozen=True, slots=True)
class FitQuality:
    """How far predictions of held out steps were off: |predicted / measured - 1|."""

    num_steps: int  # held out
    error_p50: float | None  # None without steps
    error_p90: float | None


@dataclass(frozen=True, slots=True)
class Fit:
    """What steps cost, and how well that is known."""

    cost: StepCost
    quality: FitQuality
    quality_by_kind: dict[str, FitQuality]  # of prompts, of decodes, and of both in one step
    overhead_s: float  # median of what the engine adds to a step
    steps: list[MeasuredStep]


def fit_steps(steps: list[MeasuredStep]) -> Fit:
    """Return the cost that steps tell of.

    Args:
        steps: Of at least `HELD_OUT` points.
    """
    held_out = [step for step in steps if step.point % HELD_OUT == 0]
    known = learn([step for step in steps if step.point % HELD_OUT])
    overhead_s = percentile([step.overhead_s for step in steps], 50)
    assert overhead_s is not None, "steps were measured"
    kinds = sorted({step.kind for step in steps})
    return Fit(
        learn(steps),
        measure_quality(known, held_out),
        {kind: measure_quality(known, [s for s in held_out if s.kind == kind]) for kind in kinds},
        overhead_s,
        steps,
    )


def learn(steps: Sequence[MeasuredStep]) -> StepCost:
    """Return the cost fitted to steps, at least one."""
    model = StepTimeModel()
    model.restore(as_rows(steps))
    assert model.cost is not None, "it knows steps"
    return model.cost


def measure_quality(cost: StepCost, steps: Sequence[MeasuredStep]) -> FitQuality:
    """Return how well a cost predicts steps."""
    errors = [abs(cost.seconds(step.shape) / step.elapsed_s - 1) for step in steps]
    return FitQuality(len(steps), percentile(errors, 50), percentile(errors, 90))


def as_rows(steps: Sequence[MeasuredStep]) -> list[tuple[float, ...]]:
    """Return steps as `StepTimeModel.restore` takes them: what the shape is made of, seconds."""
    return [
        (
            step.shape.num_tokens,
            step.shape.num_sequences,
            step.shape.context_tokens,
            step.shape.prompt_work,
            step.elapsed_s,
        )
        for step in steps
    ]


def run_fit(
    config: ClusterConfig,
    *,
    num_rounds: int = 2,
    seed: int = 0,
    on_progress: OnProgress = lambda *_: None,
) -> Fit:
    """Measure and fit the steps of the configured model in this process.

    Raises:
        ConfigError: The model or its cache do not fit, or do not run here.
        SluiceError: A request failed.
    """
    from cluster.bench.engine_setup import check_engine, num_threads_of
    from cluster.clock import WallClock
    from cluster.model.runner import num_blocks_for
    from cluster.replica.build import load_whole, make_engine, max_model_len_of
    from cluster.replica.executor import InProcessExecutor

    cache, model = config.cache.model_copy(update={"prefix_caching": True}), config.model
    config = config.model_copy(update={"cache": cache})
    info = check_engine(config, cache.block_size)
    max_model_len = max_model_len_of(config, info)
    num_blocks = num_blocks_for(info, cache, model.dtype, 1, 1, device=model.device)
    grid = make_grid(
        max_sequence_tokens=min(max_model_len, num_blocks * cache.block_size),
        max_step_tokens=config.engine.max_num_batched_tokens,
        max_num_seqs=config.engine.max_num_seqs,
        block_size=cache.block_size,
    )
    on_progress("loading", 0, 1)
    runner = load_whole(
        config,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        num_threads=num_threads_of(config),
    )
    watch, clock = StepWatch(), WallClock()
    run = GridRun(
        make_engine(config, info, InProcessExecutor(runner), clock, watch),
        watch,
        grid,
        clock=clock,
        vocab_size=info.vocab_size,
        seed=seed,
        on_progress=on_progress,
    )
    return fit_steps(run.run(num_rounds))


def fit_figures(fit: Fit, config: ClusterConfig) -> dict[str, Any]:
    """Return what the file has but the steps, as plain data."""
    from cluster.bench.engine_setup import num_threads_of
    from cluster.bench.provenance import provenance

    where = provenance()
    return {
        "version": VERSION,
        "model": config.model.served_name,
        "layout": {"tp": config.parallel.tp, "pp": config.parallel.pp},
        "threads": num_threads_of(config),
        "machine": _device_name(config.model.device, where["machine"]["cpu"]),
        "commit": where["commit"],
        "cost": asdict(fit.cost),
        "overhead_s": fit.overhead_s,
        "quality": asdict(fit.quality),
        "quality_by_kind": {kind: asdict(of) for kind, of in fit.quality_by_kind.items()},
    }


def _device_name(device: str, cpu: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else cpu


def check_writable(path: Path) -> None:
    """Raise unless a file can be written, before minutes are spent on what goes into it.

    Raises:
        ConfigError: It cannot.
    """
    try:
        path.open("a").close()
    except OSError as error:
        raise _not_written(path, error) from error


def write_fit(fit: Fit, figures: dict[str, Any], path: Path) -> None:
    """Write the file that `cluster/simulator/cost_model.py` reads.

    Raises:
        ConfigError: It cannot be written.
    """
    content = figures | {"steps": as_rows(fit.steps)}
    try:
        path.write_text(json.dumps(content, allow_nan=False) + "\n")
    except OSError as error:
        raise _not_written(path, error) from error


def _not_written(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"--fit {path}: {error.strerror}: give another file", field="fit")
