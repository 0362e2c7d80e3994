"""A synthetic mix of clients that hold conversations: every turn repeats the whole history.

How many turns conversations have is found by search, so that the wanted share of blocks recurs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.errors import InvalidArgumentError
from cluster.simulator.arrival import Arrival, Run
from cluster.simulator.mix_draws import MAX_NUM_TURNS, Ints, MixDraws, MixSpec, draw, lead_s
from cluster.simulator.streams import Floats
from cluster.simulator.workload import FIRST_ANSWER_TOKEN, Workload

_MAX_CONTINUATION = 0.97  # probability of a further turn
_TOLERANCE = 0.01  # of the share that recurs
_LENGTH_TOLERANCE = 0.05  # of the mean length, over it
_NUM_HALVINGS = 10  # of the search
_NUM_ROUNDS = 4  # of the iteration in each


@dataclass(frozen=True, slots=True)
class _Plan:
    """Who says what and when."""

    begins_ST: Floats  # seconds
    texts_ST: Ints  # tokens
    prompts_ST: Ints  # tokens, with system prompt and history
    is_sent_ST: NDArray[np.bool_]  # a turn that takes place, and within the time
    recurring: float  # share of blocks
    mean_input_tokens: float


def mix(spec: MixSpec, *, seed: int) -> Workload:
    """Return a mix of clients.

    Raises:
        InvalidArgumentError: There would be no request or too many, or the lengths and the share
            that recurs do not go together.
    """
    draws = draw(spec, np.random.default_rng(seed))
    plan = _search(spec, draws)
    return Workload.in_order(
        "mix",
        _arrivals(draws, plan),
        block_size=spec.block_size,
        description=f"{spec.clients} clients, {spec.recurring:.0%} of prefix blocks recur",
    )


def _search(spec: MixSpec, draws: MixDraws) -> _Plan:
    """Return the plan in which the wanted share recurs: the more turns, the more does."""
    low, high = 0.0, _MAX_CONTINUATION
    least, most = _plan(spec, draws, low), _plan(spec, draws, high)
    if not least.recurring - _TOLERANCE <= spec.recurring <= most.recurring + _TOLERANCE:
        raise InvalidArgumentError(
            f"recurring={spec.recurring:g}, with this seed and these lengths it is "
            f"{least.recurring:.3f} to {most.recurring:.3f}: change it, lengthen duration_s or "
            "shorten think_s",
            field="recurring",
        )
    plan = least
    for _ in range(_NUM_HALVINGS):
        middle = (low + high) / 2
        plan = _plan(spec, draws, middle)
        low, high = (middle, high) if plan.recurring < spec.recurring else (low, middle)
    if abs(plan.mean_input_tokens / spec.input_tokens - 1) > _LENGTH_TOLERANCE:
        raise InvalidArgumentError(
            f"input_tokens={spec.input_tokens:g}, with recurring={spec.recurring:g}, "
            f"output_tokens={spec.output_tokens:g} and prompts up to max_input_tokens="
            f"{spec.max_input_tokens} the mean is {plan.mean_input_tokens:.0f}: change one of them",
            field="input_tokens",
        )
    return plan


def _plan(spec: MixSpec, draws: MixDraws, continuation: float) -> _Plan:
    """Return the plan in which a further turn follows with this probability.

    Rate and lengths depend on which turns take place, and the other way round: found by iteration.
    """
    num_turns_S = np.ones(len(draws.lengths_S))
    if continuation > 0:
        num_turns_S += np.floor(np.log(draws.lengths_S) / np.log(continuation))
    wanted_ST = np.arange(MAX_NUM_TURNS) < num_turns_S[:, None]
    histories_ST = draws.systems_S[:, None] + np.cumsum(draws.answers_ST, 1) - draws.answers_ST
    scale = spec.input_tokens
    for _ in range(_NUM_ROUNDS):
        texts_ST = np.maximum(1, np.rint(scale * draws.texts_ST)).astype(np.int64)
        texts_ST[:, 0] = np.minimum(texts_ST[:, 0], spec.max_input_tokens - draws.systems_S)
        prompts_ST = histories_ST + np.cumsum(texts_ST, 1)
        is_held_ST = wanted_ST & (prompts_ST <= spec.max_input_tokens)
        mean_turns = float(is_held_ST.sum(1).mean())
        starts_S = draws.gap_sums_S * mean_turns / (spec.rate_per_s * draws.shares_S)
        begins_ST = starts_S[:, None] - lead_s(spec) + draws.gaps_ST
        is_sent_ST = is_held_ST & (begins_ST >= 0) & (begins_ST < spec.duration_s)
        if not is_sent_ST.any():
            raise InvalidArgumentError(
                f"rate_per_s={spec.rate_per_s:g} over duration_s={spec.duration_s:g} makes no "
                "request: raise one of them",
                field="rate_per_s",
            )
        mean_tokens = float(prompts_ST[is_sent_ST].mean())
        others_tokens = float(histories_ST[is_sent_ST].mean())
        scale *= max(0.2, (spec.input_tokens - others_tokens) / (mean_tokens - others_tokens))
    return _Plan(
        begins_ST,
        texts_ST,
        prompts_ST,
        is_sent_ST,
        _recurring(spec, draws, prompts_ST, is_sent_ST),
        mean_tokens,
    )


def _recurring(
    spec: MixSpec, draws: MixDraws, prompts_ST: Ints, is_sent_ST: NDArray[np.bool_]
) -> float:
    """Return the share of the prompts' blocks that were in a prompt or an answer before."""
    hits_ST = np.repeat(draws.systems_S[:, None], MAX_NUM_TURNS, axis=1)
    known_ST = (prompts_ST + draws.answers_ST)[:, :-1]
    hits_ST[:, 1:] = np.where(is_sent_ST[:, :-1], known_ST, hits_ST[:, 1:])
    num_hits = (hits_ST[is_sent_ST] // spec.block_size).sum()
    num_blocks = (-(-prompts_ST[is_sent_ST] // spec.block_size)).sum()
    return float(num_hits / num_blocks)


def _arrivals(draws: MixDraws, plan: _Plan) -> Iterator[Arrival]:
    """Yield the requests, by conversation; tokens are numbered by client, conversation and turn."""
    num_clients = int(draws.clients_S[-1]) + 1
    for row in np.flatnonzero(plan.is_sent_ST.any(1)).tolist():
        client = int(draws.clients_S[row])
        history: list[Run] = [(client, int(draws.systems_S[row]))]
        for turn in range(int(np.flatnonzero(plan.is_sent_ST[row])[-1]) + 1):
            index = row * MAX_NUM_TURNS + turn
            history.append((num_clients + index, int(plan.texts_ST[row, turn])))
            num_output_tokens = int(draws.answers_ST[row, turn])
            if plan.is_sent_ST[row, turn]:
                yield Arrival(
                    request_id=f"{row}.{turn}",
                    arrived_s=float(plan.begins_ST[row, turn]),
                    runs=tuple(run for run in history if run[1]),
                    num_output_tokens=num_output_tokens,
                    answer_token=FIRST_ANSWER_TOKEN + index,
                    session=str(row),
                )
            history.append((FIRST_ANSWER_TOKEN + index, num_output_tokens))
