"""The workload that all techniques are measured on: one static prefix, answers of mixed length."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.bench.engine_drive import greedy_request, random_tokens
from cluster.types import EngineRequest

_GOLDEN_RATIO = (1 + math.sqrt(5)) / 2
_SQRT_2 = math.sqrt(2)


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests of one distribution: as instructions that go before every user's question.

    prompt = the same `num_prefix_tokens` for all + own tokens. The same seed gives the same
    requests, in the same order, to every technique. Own and answer lengths are uniform in their
    ranges, and nearly so in any run of requests: a technique that gets through ten of them has had
    work like one that gets through a thousand.
    """

    num_requests: int = 1000  # at the most
    num_prefix_tokens: int = 480  # static, shared by all
    own_tokens: tuple[int, int] = (16, 48)  # of a prompt: least, most
    output_tokens: tuple[int, int] = (4, 28)  # of an answer: least, most; >= 2
    num_users: int = 32  # each asks again when it has its answer
    budget_s: float = 40.0  # of one technique: no request begins later
    seed: int = 0

    @property
    def max_prompt_tokens(self) -> int:
        """Tokens of the longest prompt."""
        return self.num_prefix_tokens + self.own_tokens[1]

    @property
    def max_sequence_tokens(self) -> int:
        """Tokens of the longest request, prompt and answer."""
        return self.max_prompt_tokens + self.output_tokens[1]

    def requests(self, vocab_size: int) -> list[EngineRequest]:
        """Return the requests that are measured."""
        return self._draw("measured", self.num_requests, vocab_size)

    def warmup(self, num_requests: int, vocab_size: int) -> list[EngineRequest]:
        """Return others: neither prefix nor own tokens are those of the measured ones."""
        return self._draw("warmup", num_requests, vocab_size)

    def _draw(self, name: str, num_requests: int, vocab_size: int) -> list[EngineRequest]:
        prefix = random_tokens(f"{self.seed}/{name}/prefix", self.num_prefix_tokens, vocab_size)
        found = []
        for index in range(num_requests):
            num_own = _spread_evenly(index, _SQRT_2, self.own_tokens)
            own = random_tokens(f"{self.seed}/{name}/{index}", num_own, vocab_size)
            num_out = _spread_evenly(index, _GOLDEN_RATIO, self.output_tokens)
            found.append(greedy_request(f"{name}-{index}", prefix + own, num_out))
        return found


def _spread_evenly(index: int, irrational: float, bounds: tuple[int, int]) -> int:
    """Return the index-th number of a sequence that fills a range without clusters or gaps.

    Source: Weyl's equidistribution theorem: the multiples of an irrational number, modulo one.
    """
    least, most = bounds
    return least + math.floor((0.5 + index * irrational) % 1.0 * (most - least + 1))


QUICK = Workload(
    num_requests=6,
    num_prefix_tokens=48,
    own_tokens=(4, 12),
    output_tokens=(2, 6),
    num_users=3,
    budget_s=5.0,
)
"""Shows that everything works; its figures say nothing."""
