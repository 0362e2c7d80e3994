"""How long a step takes on simulated hardware: measured, given as two rates, or estimated.

    seconds
      │                ⟋  one more token costs its arithmetic
      │            ⟋
      │___________⟋       reading the weights
      └────────────┴───── tokens of a step

Source of the shape: the roofline model (Williams et al., CACM 2009).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from cluster.types import StepCost


@dataclass(frozen=True, slots=True)
class CostModel:
    """What simulated steps cost."""

    step: StepCost
    source: str  # where it comes from, in words
    overhead_s: float = 0.0  # of a step, outside of the executor
    # (tokens, sequences, context, prompt work, seconds), as measured: engines begin with these.
    steps: tuple[tuple[float, ...], ...] = ()


def from_rates(*, prefill_tokens_per_s: float, decode_step_s: float) -> CostModel:
    """Return the cost of a replica that prefills at one rate and decodes at one pace.

    A step takes `decode_step_s` for the weights' sake, in which it computes what the rate allows;
    tokens beyond take their time at the rate.
    """
    token_s = 1 / prefill_tokens_per_s
    free_tokens = int(decode_step_s * prefill_tokens_per_s)
    return CostModel(
        StepCost(decode_step_s, 0.0, ((free_tokens, token_s),), 0.0, 0.0, 0.0),
        f"{prefill_tokens_per_s:g} tokens/s of prefill, {decode_step_s:g} s a step",
    )


@dataclass(frozen=True, slots=True)
class Hardware:
    """One accelerator, by its data sheet."""

    memory_bytes_per_s: float
    matrix_flops: float  # dense bf16
    description: str


HARDWARE = {
    "a100": Hardware(2.039e12, 312e12, "A100 SXM 80 GB"),
    "h100": Hardware(3.35e12, 989e12, "H100 SXM 80 GB"),
    "h200": Hardware(4.8e12, 989e12, "H200 SXM 141 GB"),
    "l40s": Hardware(0.864e12, 362e12, "L40S 48 GB"),
}
"""Peaks that the makers publish."""

EFFICIENCY = 0.6
"""Of the peaks, assumed: an estimate, not a measurement."""


def from_hardware(
    name: str, *, num_parameters: float, kv_bytes_per_token: float, num_devices: int
) -> CostModel:
    """Return an estimate of the cost of a bf16 model's step on tensor-parallel accelerators.

    Args:
        name: Of `HARDWARE`.
        num_parameters: Of the model.
        kv_bytes_per_token: Keys and values of all layers.
        num_devices: That share the model.

    Raises:
        ConfigError: The name is unknown.
    """
    hardware = HARDWARE.get(name)
    if hardware is None:
        raise ConfigError(
            f"hardware={name!r}, known: {', '.join(HARDWARE)}: take one of these, or measure with "
            "`sluice bench engine --fit`",
            field="hardware",
        )
    bandwidth = EFFICIENCY * num_devices * hardware.memory_bytes_per_s
    flops = EFFICIENCY * num_devices * hardware.matrix_flops
    floor_s, token_s = 2 * num_parameters / bandwidth, 2 * num_parameters / flops
    return CostModel(
        StepCost(
            floor_s,
            0.0,
            ((int(floor_s / token_s), token_s),),
            0.0,
            kv_bytes_per_token / bandwidth,
            kv_bytes_per_token / flops,  # two products of a query with the keys and values read
        ),
        f"estimate: {num_devices} x {hardware.description} at {EFFICIENCY:g} of its peaks, "
        f"{num_parameters / 1e9:g} billion parameters",
    )


def read_cost(path: Path) -> CostModel:
    """Return what `sluice bench engine --fit` measured.

    Raises:
        ConfigError: The file cannot be read, or is no such file.
    """
    try:
        tree: dict[str, Any] = json.loads(path.read_text())
        cost = dict(tree["cost"])
        cost["hinges"] = tuple((int(tokens), float(more_s)) for tokens, more_s in cost["hinges"])
        steps = tuple(tuple(float(value) for value in row) for row in tree.get("steps", []))
        _check_numbers(cost, steps)
        step = StepCost(**cost)
        return CostModel(
            step,
            f"measured: {tree.get('model', '?')} on {tree.get('machine', '?')}",
            float(tree.get("overhead_s", 0.0)),
            steps,
        )
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"cost model {path}: {error!r}: give a file that `sluice bench engine --fit` wrote",
            field="cost_model",
        ) from error


def _check_numbers(cost: dict[str, Any], steps: tuple[tuple[float, ...], ...]) -> None:
    """Raise ValueError unless every figure is a number that time can be made of."""
    numbers = [float(value) for name, value in cost.items() if name != "hinges"]
    numbers += [float(value) for pair in cost["hinges"] for value in pair]
    numbers += [value for row in steps for value in row]
    if any(len(row) != 5 for row in steps) or not all(0 <= value < math.inf for value in numbers):
        raise ValueError("a figure is negative or no number, or a step has not five of them")
