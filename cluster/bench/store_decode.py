"""Do the steps of a running batch take longer while blocks move beside it?

    streams   |first tokens|. . . . . . . . . . . . . . . . . . . . . . . . . . . .|
    prompts                |hit|      |new|      |hit|      |new|     one at a time

    without   the prompts are computed; nothing is below the KV cache
    with      a hit's blocks come from the store, and a new one's are written to it, pinned

Streams and prompts are the same. Compared are steps in which all streams decode and nobody else
computes: all of those without, against those with, while a move is under way or blocks are copied.
`again` is a second run without: how far two runs differ on this machine for no reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from cluster.bench.engine_drive import greedy_request, random_tokens
from cluster.bench.statistics import percentile
from cluster.bench.store_replica import Replica, SharedModel, StoreStep
from cluster.errors import SluiceError
from cluster.types import EngineOutput, EngineRequest

WAYS = ("without", "with", "again")
MIN_STEPS = 5  # while blocks move, below which a round says nothing


@dataclass(frozen=True, slots=True)
class DecodeLoad:
    """The work of one run."""

    num_streams: int = 16
    stream_input_tokens: int = 64
    stream_output_tokens: int = 192
    prompt_tokens: int = 512
    pause_steps: int = 6  # between the end of a prompt and the next one

    @property
    def num_prompts(self) -> int:
        """The most that one run can take."""
        return self.stream_output_tokens // self.pause_steps + 1

    @property
    def num_stream_tokens(self) -> int:
        """Of one stream, prompt and answer."""
        return self.stream_input_tokens + self.stream_output_tokens

    def num_blocks(self, block_size: int) -> int:
        """Return KV blocks for the streams and a few prompts."""
        of_streams = self.num_streams * -(-self.num_stream_tokens // block_size)
        return of_streams + 8 * -(-(self.prompt_tokens + 1) // block_size)


class DecodeBench:
    """The rounds of one measurement.

    Args:
        model: Of all replicas.
        load: Of each run.
        seed: Of the prompts.
    """

    def __init__(self, model: SharedModel, load: DecodeLoad, seed: int) -> None:
        self._model = model
        self._load = load
        self._seed = seed

    def run(self, num_rounds: int, on_progress: Callable[[str, int, int], None]) -> dict[str, Any]:
        """Return step times by way, and the ratios, medians over the rounds.

        Raises:
            SluiceError: A request failed, or no blocks moved.
        """
        self._write_hits(on_progress)
        rounds: list[dict[str, Any]] = []
        total = num_rounds * len(WAYS)
        for number in range(num_rounds):
            found: dict[str, list[StoreStep]] = {}
            moved: dict[str, Any] = {}
            for way in WAYS:
                on_progress(f"decode: {way}", len(rounds) * len(WAYS) + len(found), total)
                replica = self._model.replica(has_tiers=way == "with")
                self._drive(replica, number)
                found[way] = self._decodes(replica)
                if way == "with":
                    replica.settle()
                    moved = moved_figures(replica)
            rounds.append(round_figures(found) | {"moved": moved})
        self._model.close_replica()
        return {"load": asdict(self._load)} | figures_of(rounds)

    def _write_hits(self, on_progress: Callable[[str, int, int], None]) -> None:
        """Let a replica write the prompts that are to be hits."""
        replica = self._model.replica()
        size = self._model.config.cache.block_size
        most = 1 + self._load.num_prompts // 2
        for index in range(most):
            on_progress("decode: writing prompts", index, most)
            request = greedy_request("hit", self._prompt(f"hit/{index}"), 1)
            replica.run([replace(request, pins_prefix=True)])
            num_blocks = (index + 1) * (self._load.prompt_tokens // size)
            replica.settle(lambda n=num_blocks: replica.cache.num_stored_blocks >= n)  # type: ignore[misc]

    def _drive(self, replica: Replica, number: int) -> None:
        """Run the streams, and a prompt every now and then."""
        load, prompts = self._load, self._prompts(number)
        num_left, num_begun = load.num_streams, 0
        is_open, pause = False, load.pause_steps

        def take(output: EngineOutput) -> None:
            nonlocal num_left, num_begun, is_open
            if output.error is not None:
                raise SluiceError(f"{output.request_id}: {output.error}")
            is_stream = output.request_id.startswith("stream")
            num_begun += is_stream and len(replica.outputs[output.request_id]) == 1
            if output.finish_reason is not None:
                num_left -= is_stream
                is_open = is_open and is_stream

        for request in self._streams(number):
            replica.add(request)
        while num_left:
            replica.step(take)
            if num_begun < load.num_streams or is_open:
                pause = load.pause_steps
                continue
            pause -= 1
            if pause == 0 and num_left == load.num_streams:
                replica.add(next(prompts))
                is_open = True
        while replica.engine.has_work and is_open:
            replica.step(take)

    def _decodes(self, replica: Replica) -> list[StoreStep]:
        num_streams = self._load.num_streams
        return [s for s in replica.steps if s.is_decode and s.num_sequences == num_streams]

    def _streams(self, number: int) -> list[EngineRequest]:
        load, vocab_size = self._load, self._model.info.vocab_size
        return [
            greedy_request(
                f"stream{index}",
                random_tokens(
                    f"{self._seed}/stream/{number}/{index}", load.stream_input_tokens, vocab_size
                ),
                load.stream_output_tokens,
            )
            for index in range(load.num_streams)
        ]

    def _prompts(self, number: int) -> Iterator[EngineRequest]:
        """Yield prompts that the store has, and new ones that it gets, in turn."""
        for index in range(self._load.num_prompts):
            yield greedy_request(f"hit{index}", self._prompt(f"hit/{index}"), 1)
            new = greedy_request(f"new{index}", self._prompt(f"new/{number}/{index}"), 1)
            yield replace(new, pins_prefix=True)

    def _prompt(self, name: str) -> list[int]:
        num_tokens, vocab_size = self._load.prompt_tokens, self._model.info.vocab_size
        return random_tokens(f"{self._seed}/{name}", num_tokens, vocab_size)


def moved_figures(replica: Replica) -> dict[str, Any]:
    """Return what a run has moved."""
    cache = replica.cache
    return {
        "fetched_bytes": cache.fetched_bytes,
        "stored_bytes": cache.stored_bytes,
        "num_copied_blocks": sum(step.num_copies for step in replica.steps),
        "num_late": cache.num_late,
        "num_failed": cache.num_failed,
    }


def round_figures(found: dict[str, list[StoreStep]]) -> dict[str, Any]:
    """Return step times of one round, seconds.

    Raises:
        SluiceError: Blocks moved during too few steps to say anything.
    """
    moving = [step.wall_s for step in found["with"] if step.is_moving]
    if len(moving) < MIN_STEPS:
        raise SluiceError(
            f"blocks moved during {len(moving)} decode steps, at least {MIN_STEPS} are needed: "
            "take longer answers or shorter pauses"
        )
    times = {way: [step.wall_s for step in steps] for way, steps in found.items()}
    return {way: _times(values) for way, values in (times | {"moving": moving}).items()}


def _times(values_s: list[float]) -> dict[str, Any]:
    p50_s, p99_s = percentile(values_s, 50), percentile(values_s, 99)
    return {"num_steps": len(values_s), "p50_s": p50_s, "p99_s": p99_s}


def figures_of(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians over the rounds of times, and of the ratios within a round."""

    def ratio(way: str, name: str) -> float | None:
        return percentile([one[way][name] / one["without"][name] for one in rounds], 50)

    names = ("p50_s", "p99_s")
    return {
        "rounds": rounds,
        "steps": {
            way: {name: percentile([one[way][name] for one in rounds], 50) for name in names}
            for way in ("without", "with", "moving", "again")
        },
        "p50_ratio_while_moving": ratio("moving", "p50_s"),
        "p99_ratio_while_moving": ratio("moving", "p99_s"),
        "p99_ratio_of_all": ratio("with", "p99_s"),
        "p99_ratio_of_two_without": ratio("again", "p99_s"),
    }
