"""An open load on one replica: requests are due at fixed times, whatever becomes of those before.

    due    | | | | | | | | | | | | | | | |
    phase  |undisturbed|  fault  | recovery |     a stream's TPOT in a phase: of its tokens there

The requests come from a catalogue, each time in another order, so that what each must answer is
known, and that the tiers below the KV cache have something to find.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count

from cluster.bench.engine_drive import greedy_request, random_tokens
from cluster.bench.store_replica import Replica
from cluster.clock import Clock
from cluster.types import EngineOutput, EngineRequest

MIN_GAPS = 8
"""A stream with fewer tokens in a phase has no TPOT there."""

_IDLE_S = 0.001


@dataclass(slots=True)
class Phase:
    """What happened in one stretch of time."""

    name: str
    seconds: float = 0.0
    tpot_s: list[float] = field(default_factory=list)  # of each stream with enough tokens
    ttft_s: list[float] = field(default_factory=list)  # of the requests that had their first token
    gaps_s: list[float] = field(default_factory=list)  # between tokens of a stream
    num_running: list[int] = field(default_factory=list)  # at each step
    num_ended: int = 0  # well
    num_failed: int = 0
    num_different: int = 0  # answers


@dataclass(slots=True)
class _Open:
    index: int  # in the catalogue
    due_s: float
    last_s: float | None = None  # its newest token
    tokens: list[int] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)  # in the present phase


class Catalogue:
    """The requests of a load.

    Args:
        num_requests: In all.
        prompt_tokens: Of each.
        answer_tokens: Of each.
        vocab_size: Of the model.
        seed: Of the prompts and of their order.
    """

    def __init__(
        self,
        num_requests: int,
        *,
        prompt_tokens: int,
        answer_tokens: int,
        vocab_size: int,
        seed: int,
    ) -> None:
        self.requests = [
            greedy_request(
                str(index),
                random_tokens(f"{seed}/{index}", prompt_tokens, vocab_size),
                answer_tokens,
            )
            for index in range(num_requests)
        ]
        self.answers: dict[int, list[int]] = {}  # as computed without a store
        self._random = random.Random(seed)
        self._order: list[int] = []
        self._ids = count()

    def learn(self, outputs: dict[str, list[int]]) -> None:
        """Remember what each request must answer."""
        self.answers = {index: outputs[str(index)] for index in range(len(self.requests))}

    def next(self) -> tuple[int, EngineRequest]:
        """Return the next request, and its index; each once, then each again in another order."""
        if not self._order:
            self._order = list(range(len(self.requests)))
            self._random.shuffle(self._order)
        index = self._order.pop()
        return index, replace(self.requests[index], request_id=f"load{next(self._ids)}")


class OpenLoad:
    """Keeps one replica under load.

    Args:
        replica: Whose steps this runs.
        catalogue: Of the requests.
        rate_per_s: Requests.
        max_at_once: More that are due wait outside of the replica; their TTFT counts from then.
        clock: Of the phases.
    """

    def __init__(
        self,
        replica: Replica,
        catalogue: Catalogue,
        *,
        rate_per_s: float,
        max_at_once: int,
        clock: Clock,
    ) -> None:
        self._replica = replica
        self._catalogue = catalogue
        self._interval_s = 1 / rate_per_s
        self._max_at_once = max_at_once
        self._clock = clock
        self._due_s = clock.now()
        self._open: dict[str, _Open] = {}
        self._phase = Phase("")

    def run(self, name: str, seconds: float, is_over: Callable[[], bool] = lambda: False) -> Phase:
        """Return what ended within `seconds`, or until `is_over`."""
        self._phase = phase = Phase(name)
        began_s = self._clock.now()
        while (now_s := self._clock.now()) < began_s + seconds and not is_over():
            self._begin_due(now_s)
            self._step()
        phase.seconds = self._clock.now() - began_s
        for one in self._open.values():
            self._close(one)
        return phase

    def finish(self) -> Phase:
        """Begin nothing more; return what was open."""
        self._phase = phase = Phase("end")
        while self._open:
            self._step()
        return phase

    def _begin_due(self, now_s: float) -> None:
        while self._due_s <= now_s and len(self._open) < self._max_at_once:
            index, request = self._catalogue.next()
            self._open[request.request_id] = _Open(index, self._due_s)
            self._replica.add(request)
            self._due_s += self._interval_s

    def _step(self) -> None:
        if self._open:
            self._phase.num_running.append(len(self._open))
            self._replica.step(self._take)
        else:  # as a leader's loop does: the tiers may have something to do
            self._replica.engine.step()
            time.sleep(_IDLE_S)
        self._replica.steps.clear()
        self._replica.outputs.clear()

    def _take(self, output: EngineOutput) -> None:
        one, phase = self._open[output.request_id], self._phase
        now_s = self._clock.now()
        for token in output.tokens:
            if one.last_s is None:
                phase.ttft_s.append(now_s - one.due_s)
            else:
                one.gaps_s.append(now_s - one.last_s)
            one.last_s = now_s
            one.tokens.append(token.token_id)
        if output.error is None and output.finish_reason is None:
            return
        del self._open[output.request_id]
        self._close(one)
        if output.error is not None:
            phase.num_failed += 1
            return
        phase.num_ended += 1
        phase.num_different += one.tokens != self._catalogue.answers[one.index]

    def _close(self, one: _Open) -> None:
        """Count what a stream had in the present phase."""
        if len(one.gaps_s) >= MIN_GAPS:
            self._phase.tpot_s.append(sum(one.gaps_s) / len(one.gaps_s))
        self._phase.gaps_s += one.gaps_s
        one.gaps_s = []
