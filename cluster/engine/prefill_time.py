"""How long prompts will take beside what decodes: for the order of prompts, and for the routers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.config import EngineConfig
from cluster.engine.pace import HOPELESS_PROMPT_SHARE
from cluster.engine.sequence import Sequence
from cluster.engine.step_time import StepTimeModel, max_prompt_tokens
from cluster.types import StepShape


@dataclass(frozen=True, slots=True)
class PrefillPace:
    """How fast prompts are computed; all 0 where no step was measured yet."""

    token_s: float = 0.0  # per prompt token, beside the decodes
    prompt_work_s: float = 0.0  # per token x context of prompts
    decode_step_s: float = 0.0  # of a step of the decodes alone

    def seconds(self, sequence: Sequence) -> float:
        """Return the predicted seconds until a sequence's prompt is computed, were it alone."""
        computed = max(sequence.num_computed_tokens, sequence.num_expected_tokens)
        num_tokens = max(1, sequence.num_tokens - computed)
        return num_tokens * (self.token_s + self.prompt_work_s * (computed + num_tokens / 2))


class PrefillTime:
    """Predicts from the fitted cost of steps.

    Args:
        config: Limits of a step, reserve of the TPOT objectives.
        step_time: Predicts steps.
        running: The scheduler's running sequences, as they are when something is asked.
    """

    def __init__(
        self, config: EngineConfig, step_time: StepTimeModel, running: Mapping[int, Sequence]
    ) -> None:
        self._config = config
        self._step_time = step_time
        self._running = running

    def now(self) -> PrefillPace:
        """Return how fast prompts are computed beside the present decodes."""
        cost = self._step_time.cost
        if cost is None:
            return PrefillPace()
        beside, tightest_s = self._decodes()
        decode_step_s = cost.seconds(beside)
        most = max(1, self._config.max_num_batched_tokens - beside.num_tokens)
        num_tokens = most
        if tightest_s < math.inf:
            limit_s = (1 - self._config.tpot_reserve) * tightest_s
            if tightest_s < decode_step_s:  # as in pace.py: nothing can keep it
                limit_s = decode_step_s / (1 - HOPELESS_PROMPT_SHARE)
            num_tokens = max_prompt_tokens(cost, limit_s, beside, num_computed_tokens=0, most=most)
            num_tokens = max(num_tokens, min(self._config.min_prefill_tokens, most))
        plain = StepShape(  # the prompt's own attention is counted by `seconds`
            beside.num_tokens + num_tokens, beside.num_sequences + 1, beside.context_tokens
        )
        token_s = cost.seconds(plain) / num_tokens
        return PrefillPace(token_s, cost.prompt_work_s, decode_step_s)

    def _decodes(self) -> tuple[StepShape, float]:
        """Return the step of all sequences that decode, and the least TPOT objective of them."""
        num, context, tightest_s = 0, 0, math.inf
        for sequence in self._running.values():
            if sequence.is_decoding:
                num += 1
                context += sequence.num_computed_tokens
                tpot_s = sequence.request.slo.tpot_s
                if tpot_s is not None and tpot_s < tightest_s:
                    tightest_s = tpot_s
        return StepShape(num, num, context), tightest_s
