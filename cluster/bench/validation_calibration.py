"""What small experiments on a real cluster tell the simulator of its steps. Pure functions.

What a step costs is measured from outside, in the same process layout: the gap between the tokens
of streams that only decode is one turn of the engine, whatever it consists of.

    replica A   ▒▒▒▒████████▒▒▒▒        a step takes longer while the other replica has one, too:
    replica B       ████████            they share a machine
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.engine.step_time import StepTimeModel
from cluster.types import StepCost


@dataclass(frozen=True, slots=True)
class DecodeRun:
    """Streams of one replica that only decode."""

    num_streams: int
    context_tokens: float  # of a stream, mean
    gap_s: float  # between two tokens of a stream, mean
    spread: float = 0.0  # of the gaps: standard deviation of their logarithm


@dataclass(frozen=True, slots=True)
class PromptRun:
    """Prompts of one length, each alone on its replica."""

    num_tokens: int
    ttft_s: float  # median


@dataclass(frozen=True, slots=True)
class Measured:
    """What the experiments of one calibration brought."""

    alone_decode: DecodeRun  # one stream: the other replicas have nothing
    alone_prompts: Sequence[PromptRun]  # likewise one prompt; at least two lengths
    decodes: Sequence[DecodeRun]  # with others on the other replicas
    prompts: Sequence[PromptRun]  # on all replicas, those lengths for which that could be had
    requests_per_s: float  # of a burst of the workload


@dataclass(frozen=True, slots=True)
class Calibration:
    """What is known of the real cluster."""

    cost: StepCost  # of a turn of the engine, while all replicas have work
    alone_factor: float  # on it while the others have none, at most 1
    way_s: float  # from client to engine and back, without the step
    jitter: float  # of a step's time: standard deviation of its logarithm
    requests_per_s: float  # of the workload that the cluster finishes at most

    def cost_at(self, busy_share: float) -> StepCost:
        """Return the cost of a step where the others have work for so much of the time."""
        # Jitter alone makes the mean longer.
        factor = math.exp(-(self.jitter**2) / 2)
        return self.cost.scaled(factor * (busy_share + (1 - busy_share) * self.alone_factor))


def calibrate(measurements: Sequence[Measured]) -> Calibration:
    """Return what measurements say together.

    Args:
        measurements: At least one; the mean of all is what counts.
    """
    rows: list[tuple[float, ...]] = []
    ways_s = [_way_s(measured.alone_prompts, measured.alone_decode) for measured in measurements]
    timed = list(zip(measurements, ways_s, strict=True))
    factors = [factor for measured, way_s in timed for factor in _alone_factors(measured, way_s)]
    factor = min(1.0, float(np.median(factors)))
    for measured, way_s in timed:
        one = measured.alone_decode
        for run in measured.decodes:
            n = run.num_streams
            rows.append((n, n, n * run.context_tokens, 0.0, run.gap_s))
        for prompt in measured.alone_prompts:
            n = prompt.num_tokens
            rows.append((n, 1, 0, n * n / 2, max(one.gap_s, prompt.ttft_s - way_s) / factor))
    return Calibration(
        fit_rows(rows),
        factor,
        float(np.mean(ways_s)),
        float(np.median([run.spread for measured in measurements for run in measured.decodes])),
        float(np.mean([measured.requests_per_s for measured in measurements])),
    )


def _alone_factors(measured: Measured, way_s: float) -> list[float]:
    """Return how long steps take alone, relative to those beside another replica's."""
    alone_s = {prompt.num_tokens: prompt.ttft_s - way_s for prompt in measured.alone_prompts}
    factors = [alone_s[both.num_tokens] / (both.ttft_s - way_s) for both in measured.prompts]
    ones = [run.gap_s for run in measured.decodes if run.num_streams == 1]
    return factors + [measured.alone_decode.gap_s / gap_s for gap_s in ones]


def _way_s(prompts: Sequence[PromptRun], one: DecodeRun) -> float:
    """Return what a first token takes beside its step: TTFT of no prompt, less a step of none."""
    lengths = np.array([prompt.num_tokens for prompt in prompts], dtype=float)
    ttfts_s = np.array([prompt.ttft_s for prompt in prompts])
    slope, intercept_s = np.polyfit(lengths, ttfts_s, 1)
    return float(max(0.0, intercept_s - (one.gap_s - slope)))


def fit_rows(rows: Sequence[tuple[float, ...]]) -> StepCost:
    """Return the cost that steps tell of: tokens, sequences, context, prompt work, seconds."""
    model = StepTimeModel()
    model.restore(rows)
    assert model.cost is not None, "it knows steps"
    return model.cost
