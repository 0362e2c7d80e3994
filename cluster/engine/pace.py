"""How long a step may take so that the running streams keep their TPOT objectives.

A stream's tokens are due at equal distances from its first one:

    first token    due         due         due         due          one tpot_s apart
        |-----------|-----------|-----------|-----------|
        1           2       3            4↑  now                    its tokens so far
                                          |← lead →|

A step is planned to end a little (the reserve) before one tpot_s is over, so a stream that nothing
disturbs gains a lead. Where something did disturb it (a step that was longer than predicted, a
preemption), the lead pays for it; beyond that, the next steps are shorter until it is made up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from cluster.engine.sequence import Sequence

HOPELESS_PROMPT_SHARE = 0.3
"""Of a step's time, left to prompts beside a stream whose objective is below any step's time."""


def step_limit_s(
    decoding: Iterable[Sequence], now_s: float, *, reserve: float, fastest_s: float
) -> float:
    """Return how long a step that begins now may take; infinite without objectives.

    Args:
        decoding: Every one has got its first token, here or elsewhere.
        now_s: By the engine's clock.
        reserve: Share of a TPOT objective that is left free, in [0, 1).
        fastest_s: Predicted time of a step without prompts.
    """
    limit_s = math.inf
    for sequence in decoding:
        tpot_s = sequence.request.slo.tpot_s
        if tpot_s is None:
            continue
        lead_s = 0.0  # of an answer that was begun elsewhere and has got no token here
        if sequence.first_token_s is not None:
            due_s = sequence.first_token_s + (sequence.num_chosen_tokens - 1) * tpot_s
            lead_s = due_s - now_s
        if tpot_s < fastest_s:  # nothing can keep it: prompts need not stop for it either
            limit_s = min(limit_s, fastest_s / (1 - HOPELESS_PROMPT_SHARE))
            continue
        wanted_s = (1 - reserve) * tpot_s
        num_left = sequence.max_num_tokens - sequence.num_tokens
        if lead_s < 0 and lead_s + num_left * (tpot_s - fastest_s) >= 0:
            wanted_s += lead_s  # what nothing can make up any more is not chased
        limit_s = min(limit_s, wanted_s)
    return limit_s
