"""Time to the first token of a long prompt, by the tier that has its blocks.

    replica A   cold ──► local hit (KV cache) ──► written to the store
                                          └─ other prompts push it out ──► host hit
    replica B   another prompt, cold ──► the first one, which only the store has: store hit

Each round has new prompts, and all four kinds, in this order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cluster.bench.engine_drive import greedy_request, random_tokens
from cluster.bench.statistics import percentile
from cluster.bench.store_replica import Replica, SharedModel
from cluster.engine.mover import MoveResult

ANSWER_TOKENS = 2
KINDS = ("cold", "local", "host", "store")
CACHE_PROMPTS = 1  # that the KV cache holds: any other one pushes the first one out
HOST_PROMPTS = 4  # that the host tier holds


class TtftBench:
    """The rounds of one measurement.

    Args:
        model: Of all replicas.
        num_tokens: Of a prompt.
        seed: Of the prompts.
    """

    def __init__(self, model: SharedModel, num_tokens: int, seed: int) -> None:
        self._model = model
        self._num_tokens = num_tokens
        self._seed = seed
        self._blocks_of_one = blocks_of_prompt(num_tokens, model.config.cache.block_size)
        self._ttft_s: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self._cached: dict[str, list[int]] = {kind: [] for kind in KINDS}
        self._fetches: list[list[MoveResult]] = []
        self._num_different = 0  # answers to the same prompt, of hits

    def run(self, num_rounds: int, on_progress: Callable[[str, int, int], None]) -> dict[str, Any]:
        """Return the figures of `num_rounds` rounds; one more warms up.

        Raises:
            SluiceError: A request failed.
        """
        for number in range(num_rounds + 1):
            on_progress("ttft", number, num_rounds + 1)
            if number == 1:
                self._ttft_s = {kind: [] for kind in KINDS}
                self._cached = {kind: [] for kind in KINDS}
                self._fetches = []
                self._num_different = 0
            self._round(number)
        self._model.close_replica()
        return self._figures()

    def _round(self, number: int) -> None:
        name = f"{number}/prompt"
        first = self._replica()
        cold = self._ask(first, "cold", name)
        local = self._ask(first, "local", name)
        first.settle(lambda: first.cache.num_stored_blocks >= self._num_matchable)
        for index in range(CACHE_PROMPTS):
            self._ask(first, "", f"{number}/other{index}")
        host = self._ask(first, "host", name)
        other = self._replica()
        self._ask(other, "cold", f"{number}/another")
        store = self._ask(other, "store", name)
        if self._model.mover is not None:
            self._fetches.append([r for r in self._model.mover.results if r.num_bytes])
        self._num_different += sum(answer != cold for answer in (local, host, store))

    def _replica(self) -> Replica:
        size = self._blocks_of_one
        return self._model.replica(num_blocks=CACHE_PROMPTS * size, num_slots=HOST_PROMPTS * size)

    @property
    def _num_matchable(self) -> int:
        return (self._num_tokens - 1) // self._model.config.cache.block_size

    def _ask(self, replica: Replica, kind: str, name: str) -> list[int]:
        tokens = random_tokens(
            f"{self._seed}/{name}", self._num_tokens, self._model.info.vocab_size
        )
        replica.outputs.clear()
        (record,) = replica.run([greedy_request("q", tokens, ANSWER_TOKENS)])
        replica.settle()
        assert record.ttft_s is not None, "it ended well"
        if kind:
            self._ttft_s[kind].append(record.ttft_s)
            self._cached[kind].append(record.num_cached_tokens)
        return replica.outputs["q"]

    def _figures(self) -> dict[str, Any]:
        cold_s = percentile(self._ttft_s["cold"], 50)
        assert cold_s, "every round begins with it"
        num_bytes = [sum(r.num_bytes for r in fetch) for fetch in self._fetches]
        longest_s = [max((r.elapsed_s for r in fetch), default=0.0) for fetch in self._fetches]
        return {
            "prompt_tokens": self._num_tokens,
            "block_bytes": self._model.block_nbytes,
            "kinds": {kind: self._kind_figures(kind, cold_s) for kind in KINDS},
            "fetched_bytes": percentile(num_bytes, 50),
            "fetch_s": percentile(longest_s, 50),
            "num_different": self._num_different,
            "num_moves": percentile([len(fetch) for fetch in self._fetches], 50),
        }

    def _kind_figures(self, kind: str, cold_s: float) -> dict[str, Any]:
        """Return a kind's figures; a fetch that was late was computed instead, and counts so."""
        values, cached = self._ttft_s[kind], self._cached[kind]
        ttft_s = percentile(values, 50) or 0.0
        size = self._model.config.cache.block_size
        return {
            "ttft_s": ttft_s,
            "rounds_ttft_s": values,
            "share_of_cold": ttft_s / cold_s,
            "cached_tokens": percentile(cached, 50),
            "whole_hits": sum(n >= self._num_matchable * size for n in cached),
        }


def blocks_of_prompt(num_tokens: int, block_size: int) -> int:
    """Return the blocks that a prompt and its answer take."""
    return -(-(num_tokens + ANSWER_TOKENS) // block_size)
