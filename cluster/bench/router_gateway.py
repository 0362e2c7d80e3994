"""A gateway's scheduler in a benchmark: decisions, and all that happens between them."""

from __future__ import annotations

import random
import time
from collections import deque

from cluster.bench.router_content import Content, make_info, make_load, new_keys
from cluster.config import ClusterConfig
from cluster.router.dispatcher import Dispatcher
from cluster.router.route import RouteRequest
from cluster.types import SLO

_REQUESTS_PER_REPLICA_S = 2.0
_REPORTS_PER_REQUEST = 5  # of all replicas together: each reports ten times a second
_DELTA_BLOCKS = 8  # that come with a report, and as many that go
_TTFT_S = 0.3
_ANSWER_S = 4.0
_SLO = SLO(ttft_s=2.0, tpot_s=0.1)


class BenchGateway:
    """A dispatcher in front of replicas, by its own clock.

    Args:
        content: Of the replicas' caches; changes as they report blocks that come and go.
        rng: Of loads, blocks and ties.
    """

    def __init__(self, content: Content, rng: random.Random) -> None:
        self.dispatcher = Dispatcher(ClusterConfig(), rng=rng)
        self.num_dispatched = 0
        self._content = content
        self._rng = rng
        self._now_s = 0.0
        self._tokens: deque[tuple[float, str]] = deque()  # when the first one comes, of which
        self._ends: deque[tuple[float, str]] = deque()
        self._infos = [make_info(place) for place in range(len(content.caches))]
        self._next_report = 0
        for info, cache in zip(self._infos, content.caches, strict=True):
            self.dispatcher.index.replace(info.replica_id, cache)
            self.dispatcher.table.add(info, make_load(len(cache), rng), now_s=0.0)

    def decide(self, request_id: str, prompt: list[int]) -> float:
        """Have a request dispatched; return the seconds that the decision took."""
        request = RouteRequest(
            request_id=request_id,
            num_prompt_tokens=len(prompt) * self._infos[0].block_size + 1,
            keys=lambda fingerprint, block_size: prompt,
            arrived_s=self._now_s,
            slo=_SLO,
        )
        start_s = time.perf_counter()
        outcome = self.dispatcher.submit(request, self._now_s)
        elapsed_s = time.perf_counter() - start_s
        self.num_dispatched += outcome.is_dispatched
        self._tokens.append((self._now_s + _TTFT_S, request_id))
        self._ends.append((self._now_s + _ANSWER_S, request_id))
        return elapsed_s

    def go_on(self) -> list[float]:
        """Let happen what does until the next request; return the seconds that reports took."""
        self._now_s += 1 / (_REQUESTS_PER_REPLICA_S * len(self._infos))
        while self._tokens and self._tokens[0][0] <= self._now_s:
            self.dispatcher.on_first_token(self._tokens.popleft()[1], self._now_s)
        while self._ends and self._ends[0][0] <= self._now_s:
            self.dispatcher.on_end(self._ends.popleft()[1])
        return [self._report() for _ in range(_REPORTS_PER_REQUEST)]

    def _report(self) -> float:
        """Take the report of the replica whose turn it is."""
        place = self._next_report
        self._next_report = (place + 1) % len(self._infos)
        replica_id, cache = self._infos[place].replica_id, self._content.caches[place]
        load = make_load(len(cache), self._rng)
        num_changed = min(_DELTA_BLOCKS, len(cache))
        start = self._rng.randrange(len(cache) - num_changed + 1)
        changed = slice(start, start + num_changed)
        removed, added = cache[changed], new_keys(self._rng, num_changed)
        cache[changed] = added
        start_s = time.perf_counter()
        self.dispatcher.index.apply(replica_id, added=added, removed=removed)
        self.dispatcher.table.on_load(replica_id, load, now_s=self._now_s)
        return time.perf_counter() - start_s
