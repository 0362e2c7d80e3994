"""Conversations: every turn repeats the whole history, answers too, and waits for the one before.

turn 1   system | text 1
turn 2   system | text 1 | answer 1 | text 2        think time after the last token of answer 1
turn 3   system | text 1 | answer 1 | text 2 | answer 2 | text 3
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from cluster.errors import InvalidArgumentError
from cluster.simulator.arrival import Arrival, Run
from cluster.simulator.streams import SyntheticSpec, lengths, poisson_times_s
from cluster.simulator.workload import FIRST_ANSWER_TOKEN, MAX_NUM_REQUESTS, Workload


class SessionsSpec(SyntheticSpec):
    """What conversations are like."""

    rate_per_s: float = Field(0.5, gt=0, le=1e5, description="conversations that begin, mean")
    duration_s: float = Field(600.0, gt=0, le=1e6, description="within which they begin")
    turns: float = Field(6.0, ge=1, le=100, description="of a conversation, mean; geometric")
    system_tokens: int = Field(1000, ge=0, le=1_000_000, description="of a system prompt")
    shared: float = Field(
        1.0, ge=0, le=1, description="share of conversations with one and the same system prompt"
    )
    user_tokens: float = Field(200.0, ge=1, le=1e6, description="new text of a turn, mean")
    output_tokens: float = Field(200.0, ge=1, le=1e5, description="of an answer, mean")
    think_s: float = Field(20.0, ge=0, le=1e6, description="from an answer to the next turn, mean")
    max_input_tokens: int = Field(
        128_000, ge=1, le=10_000_000, description="of a prompt; a conversation ends there"
    )


def sessions(spec: SessionsSpec, *, seed: int) -> Workload:
    """Return conversations; a turn `follows` the one before it.

    Raises:
        InvalidArgumentError: There would be no request, or too many.
    """
    rng = np.random.default_rng(seed)
    starts_s = poisson_times_s(rng, spec.rate_per_s, spec.duration_s)
    num_turns = rng.geometric(1 / spec.turns, len(starts_s))
    if num_turns.sum() > MAX_NUM_REQUESTS:
        raise InvalidArgumentError(
            f"turns={spec.turns:g} in {len(starts_s)} conversations are {num_turns.sum()} "
            f"requests, limit={MAX_NUM_REQUESTS}: lower rate_per_s, duration_s or turns",
            field="turns",
        )
    is_shared = rng.random(len(starts_s)) < spec.shared
    arrivals: list[Arrival] = []
    for index, turns in enumerate(num_turns.tolist()):
        gaps_s = [float(starts_s[index]), *rng.exponential(spec.think_s, turns - 1).tolist()]
        texts = lengths(rng, spec.user_tokens, turns)
        answers = lengths(rng, spec.output_tokens, turns)
        # Token 0 is the shared system prompt; then come the sessions' own, then the texts.
        history: list[Run] = [(0 if is_shared[index] else 1 + index, spec.system_tokens)]
        for turn in range(turns):
            number = len(arrivals)
            history.append((1 + len(starts_s) + number, texts[turn]))
            if sum(count for _, count in history) > spec.max_input_tokens:
                break
            arrivals.append(
                Arrival(
                    request_id=f"{index}.{turn}",
                    arrived_s=gaps_s[turn],
                    runs=tuple(run for run in history if run[1]),
                    num_output_tokens=answers[turn],
                    answer_token=FIRST_ANSWER_TOKEN + number,
                    session=str(index),
                    follows=f"{index}.{turn - 1}" if turn else "",
                )
            )
            history.append((FIRST_ANSWER_TOKEN + number, answers[turn]))
    return Workload.in_order(
        "sessions",
        arrivals,
        description=f"{spec.rate_per_s:g} conversations per second of {spec.turns:g} turns",
    )
