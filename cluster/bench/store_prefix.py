"""Throughput of short requests over one static prefix, by what a replica knows of it.

without   no prefix cache: every request computes it
local     the first request computes it, the others find it
store     another replica has written it; this one begins with nothing
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from cluster.bench.engine_drive import greedy_request, random_tokens
from cluster.bench.statistics import LatencyObjective, percentile, summarize
from cluster.bench.store_replica import SharedModel
from cluster.errors import SluiceError
from cluster.types import EngineRequest

WAYS = ("without", "local", "store")


@dataclass(frozen=True, slots=True)
class PrefixLoad:
    """Requests over one prefix, given at once."""

    num_requests: int = 1000
    prefix_tokens: int = 512
    own_tokens: int = 16  # of each prompt, after the prefix
    answer_tokens: int = 8

    @property
    def num_tokens(self) -> int:
        """Of one request, prompt and answer."""
        return self.prefix_tokens + self.own_tokens + self.answer_tokens


class PrefixBench:
    """The rounds of one measurement.

    Args:
        model: Of all replicas.
        load: What each is given.
        seed: Of the prompts.
        on_progress: Told of each request that ended.
    """

    def __init__(
        self,
        model: SharedModel,
        load: PrefixLoad,
        seed: int,
        on_progress: Callable[[str, int, int], None],
    ) -> None:
        self._model = model
        self._load = load
        self._seed = seed
        self._on_progress = on_progress

    def run(self, num_rounds: int) -> dict[str, Any]:
        """Return rates and TTFT by way; a round has its own prefix and all ways.

        Raises:
            SluiceError: The prefix was not found again, or was found without a cache.
        """
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for number in range(num_rounds):
            self._write_prefix(number)
            for way in WAYS[number % len(WAYS) :] + WAYS[: number % len(WAYS)]:
                found[way].append(self._run_way(way, number))
        self._model.close_replica()
        return {"load": asdict(self._load), "ways": ways_figures(found)}

    def _write_prefix(self, number: int) -> None:
        """Let a replica write the prefix, pinned, as registering it does."""
        replica = self._model.replica()
        prefix = self._prefix(number)
        request = replace(greedy_request("prefix", prefix, 1), pins_prefix=True)
        replica.run([request])
        num_blocks = len(prefix) // self._model.config.cache.block_size
        replica.settle(lambda: replica.cache.num_stored_blocks >= num_blocks)

    def _run_way(self, way: str, number: int) -> dict[str, Any]:
        if way == "without":
            replica = self._model.replica(caches=False)
        else:
            replica = self._model.replica(has_tiers=way == "store")
        requests = self._requests(number)
        num_done = 0

        def on_record(_: object) -> None:
            nonlocal num_done
            num_done += 1
            self._on_progress(f"prefix: {way}", num_done, len(requests))

        most = self._model.config.engine.max_num_seqs
        records = replica.run(requests, max_at_once=most, on_record=on_record)
        summary = summarize(records, LatencyObjective())
        if (way == "without") != (summary["cached_token_share"] == 0.0):
            share = summary["cached_token_share"]
            raise SluiceError(f"prefix, {way}: {share:.1%} of the prompts' tokens were found")
        return summary | {"fetched_blocks": replica.cache.num_fetched_blocks}

    def _prefix(self, number: int) -> list[int]:
        name = f"{self._seed}/prefix/{number}"
        return random_tokens(name, self._load.prefix_tokens, self._model.info.vocab_size)

    def _requests(self, number: int) -> list[EngineRequest]:
        prefix, vocab_size = self._prefix(number), self._model.info.vocab_size
        return [
            greedy_request(
                str(index),
                prefix
                + random_tokens(
                    f"{self._seed}/own/{number}/{index}", self._load.own_tokens, vocab_size
                ),
                self._load.answer_tokens,
            )
            for index in range(self._load.num_requests)
        ]


def ways_figures(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return medians over the rounds, and the throughput as a multiple of that without a cache."""
    base = [one["requests_per_s"] for one in found["without"]]
    return {
        way: {
            "requests_per_s": percentile([one["requests_per_s"] for one in rounds], 50),
            "out_tokens_per_s": percentile([one["out_tokens_per_s"] for one in rounds], 50),
            "ttft_p50_s": percentile([one["ttft_s"]["p50"] for one in rounds], 50),
            "cached_token_share": percentile([one["cached_token_share"] for one in rounds], 50),
            "fetched_blocks": percentile([one["fetched_blocks"] for one in rounds], 50),
            "times": percentile(
                [one["requests_per_s"] / rate for one, rate in zip(rounds, base, strict=True)], 50
            ),
        }
        for way, rounds in found.items()
    }
