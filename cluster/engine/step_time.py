"""How long a step takes, learned from the steps that were measured.

    seconds
      │                    ⟋   each hinge can only make it steeper
      │                ⟋
      │           __⟋          arithmetic
      │__________⟋             reading the weights
      └────┴────┴────┴────┴── tokens
           8   16   32   64

The curve is a sum of features with coefficients that are not negative: a constant, tokens, tokens
beyond each of some hinges, sequences, context. So it is convex and never falls, and its fit is a
small linear problem.

A step is remembered with its kind (its sizes, roughly), and each kind has places
of its own. Minutes of decoding thus overwrite what was known of decoding, and nothing of what
prefills have taught: without that the fit would forget them.

What changes at once, another process on the cores or a clock that drops, changes all steps by about
one factor: the drift, a running mean of measured over fitted time. Steps are remembered without it,
so that those of a slow minute and those of a quick one tell of the same curve.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable

import numpy as np

from cluster.engine.least_squares import Array, solve_non_negative
from cluster.types import StepCost, StepShape

HINGES = (8, 16, 32, 64, 128, 256, 512)
"""Tokens at which the curve may become steeper."""

MAX_KINDS = 96
STEPS_PER_KIND = 12
STRIDE = 4
"""So many steps in turn share one place of a kind that is full: its memory reaches further back."""

_MAX_STEPS_PER_FIT = 256
_DRIFT_STEPS = 8  # the drift's mean is over about so many
_MAX_DRIFT_ERROR = 0.2  # of one step, as a logarithm: one that stalled moves the drift by 2.5 %
_DRIFT_FROM = 32  # steps; before, fits are frequent and a drift would only mistake their errors
_MAX_DRIFT = math.log(4)
_PRIOR_STRENGTH = 0.02  # in measured steps, per feature
# The shape that is believed before steps say better, in units of one token's arithmetic: a step
# costs what some tokens cost, attention is cheap. Also how large each feature typically is.
_PRIOR = (20.0, 0.0, 0.0, 1.0, *[0.0] * (len(HINGES) - 2), 0.1, 1e-4, 1e-4)
_TYPICAL = (1.0, 64.0, 56.0, 48.0, *[32.0] * (len(HINGES) - 2), 16.0, 4096.0, 16384.0)


class StepTimeModel:
    """Learns from measured steps; `cost` predicts others."""

    def __init__(self) -> None:
        # tokens, sequences, context, prompt work, seconds without drift; 0 s marks a free place.
        self._steps = np.zeros((MAX_KINDS * STEPS_PER_KIND, 5))
        self._kinds: OrderedDict[tuple[int, ...], _Kind] = OrderedDict()  # least recent first
        self._num_unfitted = 0
        self._num_steps = 0
        self._fitted: StepCost | None = None
        self._drift = 0.0  # logarithm of measured over fitted time
        self._cost: StepCost | None = None  # the fit with the drift, where it is made already

    @property
    def cost(self) -> StepCost | None:
        """What a step costs at present; None before the first step."""
        if self._cost is None and self._fitted is not None:
            self._cost = self._fitted.scaled(math.exp(self._drift))
        return self._cost

    @property
    def num_steps(self) -> int:
        """Steps that were observed, restored ones included."""
        return self._num_steps

    def observe(self, shape: StepShape, elapsed_s: float) -> None:
        """Learn from a step.

        Args:
            shape: Of the step.
            elapsed_s: What it took; not positive means that nobody measured it.
        """
        if not 0 < elapsed_s < math.inf:
            return
        if self._fitted is not None and self._num_steps > _DRIFT_FROM:
            fitted_s = self._fitted.seconds(shape)
            if fitted_s > 0:  # a fit of few kinds of steps may know nothing of this one
                self._follow(math.log(elapsed_s / fitted_s))
        self._remember(shape, elapsed_s * math.exp(-self._drift))
        self._num_steps += 1
        self._num_unfitted += 1
        # Every step at first; later a fit costs more than one step can teach.
        if self._num_unfitted >= min(_MAX_STEPS_PER_FIT, 1 + self._num_steps // 8):
            self._fitted = self._fit()
        self._cost = None

    def snapshot(self) -> list[tuple[float, ...]]:
        """Return the remembered steps, for `restore`: shape and seconds, at the present speed."""
        steps = self._steps[self._steps[:, 4] > 0]  # a copy
        steps[:, 4] *= math.exp(self._drift)
        return [tuple(row) for row in steps.tolist()]

    def restore(self, steps: Iterable[tuple[float, ...]]) -> None:
        """Remember the steps that an earlier model's `snapshot` returned."""
        for tokens, sequences, context, work, elapsed_s in steps:
            shape = StepShape(int(tokens), int(sequences), int(context), work)
            self._remember(shape, elapsed_s)
            self._num_steps += 1
        if self._num_steps:
            self._fitted = self._fit()

    def _remember(self, shape: StepShape, elapsed_s: float) -> None:
        key = _kind_key(shape)
        kind = self._kinds.get(key)
        if kind is None:
            if len(self._kinds) < MAX_KINDS:
                kind = _Kind(len(self._kinds) * STEPS_PER_KIND)
            else:
                kind = _Kind(self._kinds.popitem(last=False)[1].start)
                self._steps[kind.start : kind.start + STEPS_PER_KIND] = 0.0
            self._kinds[key] = kind
        self._kinds.move_to_end(key)
        self._steps[kind.next_place()] = (
            shape.num_tokens,
            shape.num_sequences,
            shape.context_tokens,
            shape.prompt_work,
            elapsed_s,
        )

    def _follow(self, log_ratio: float) -> None:
        error = log_ratio - self._drift
        error = min(_MAX_DRIFT_ERROR, max(-_MAX_DRIFT_ERROR, error))
        drift = self._drift + error / _DRIFT_STEPS
        self._drift = min(_MAX_DRIFT, max(-_MAX_DRIFT, drift))

    def _fit(self) -> StepCost:
        self._num_unfitted = 0
        steps = self._steps[self._steps[:, 4] > 0]
        elapsed_N = steps[:, 4]
        features_NF = _features(steps)
        typical_F, prior_F = np.array(_TYPICAL), np.array(_PRIOR)
        prior_F *= np.median(elapsed_N / (features_NF @ prior_F))
        # A weak pull to the prior decides what no step has shown yet.
        pull_FF = np.diag(_PRIOR_STRENGTH * (typical_F / np.median(elapsed_N)) ** 2)
        # Relative errors: short steps count as much as long ones, and a step that stalled, however
        # long, pulls less the longer it was.
        relative_NF = features_NF / elapsed_N[:, None]
        coefficients_F = solve_non_negative(
            relative_NF.T @ relative_NF + pull_FF, relative_NF.sum(0) + pull_FF @ prior_F
        )
        return _as_cost(coefficients_F, self._num_steps)


class _Kind:
    """The places of one kind of step: a ring."""

    __slots__ = ("num_seen", "start")

    def __init__(self, start: int) -> None:
        self.start = start  # the first place
        self.num_seen = 0

    def next_place(self) -> int:
        """Return where the next step goes."""
        index, self.num_seen = self.num_seen, self.num_seen + 1
        if index >= STEPS_PER_KIND:
            index = index // STRIDE % STEPS_PER_KIND
        return self.start + index


def _kind_key(shape: StepShape) -> tuple[int, ...]:
    return (
        shape.num_tokens.bit_length(),
        shape.num_sequences.bit_length() // 2,
        shape.context_tokens.bit_length() // 3,
        int(shape.prompt_work).bit_length() // 4,
    )


def _features(steps_N5: Array) -> Array:
    tokens_N1 = steps_N5[:, :1]
    return np.hstack(
        [
            np.ones_like(tokens_N1),
            tokens_N1,
            np.maximum(tokens_N1 - np.array(HINGES), 0.0),
            steps_N5[:, 1:4],
        ]
    )


def _as_cost(coefficients_F: Array, num_steps: int) -> StepCost:
    floor_s, token_s, *slopes, sequence_s, context_s, prompt_work_s = coefficients_F.tolist()
    hinges = tuple((t, slope) for t, slope in zip(HINGES, slopes, strict=True) if slope > 0)
    return StepCost(floor_s, token_s, hinges, sequence_s, context_s, prompt_work_s, num_steps)


def max_prompt_tokens(
    cost: StepCost, limit_s: float, beside: StepShape, *, num_computed_tokens: int, most: int
) -> int:
    """Return how many tokens of a prompt fit into a step, 0 where not one does.

    Args:
        cost: Of a step.
        limit_s: The step may take so long, seconds.
        beside: What else is in the step.
        num_computed_tokens: Of the prompt, in the KV cache.
        most: Not more than these.
    """
    low, high = 0, most  # low fits, beyond high nothing does: the cost never falls
    while low < high:
        middle = (low + high + 1) // 2
        if cost.seconds(beside.with_chunk(middle, num_computed_tokens)) <= limit_s:
            low = middle
        else:
            high = middle - 1
    return low
