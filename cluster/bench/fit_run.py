"""Lets an engine compute the steps of a grid, and keeps what each of them took.

The engine decides what a step is, so its shapes are those that serving has; what is asked of it
only makes sure that all kinds of them come.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import NamedTuple

from cluster.bench.engine_drive import greedy_request, random_tokens
from cluster.bench.fit_grid import DECODES_PER_BATCH, MAX_CONTEXT_TOKENS, FitGrid
from cluster.clock import Clock
from cluster.engine.engine import Engine
from cluster.engine.step_time import StepTimeModel
from cluster.errors import SluiceError
from cluster.types import StepShape

_NUM_WARMUPS = 3  # prompts with an answer of some tokens

OnProgress = Callable[[str, int, int], None]
"""Gets what is being done, and how many points of how many are done with."""


class MeasuredStep(NamedTuple):
    """One step of the engine."""

    point: int  # of the grid: what was being asked for
    shape: StepShape
    elapsed_s: float  # in the executor
    overhead_s: float  # of the engine around it

    @property
    def kind(self) -> str:
        """What is in the step: prompt, decode or mixed."""
        if not self.shape.prompt_work:
            return "decode"
        return "mixed" if self.shape.context_tokens else "prompt"


class StepWatch(StepTimeModel):
    """A model of step times that also keeps every step that it is told of."""

    def __init__(self) -> None:
        super().__init__()
        self.observed: list[tuple[StepShape, float]] = []

    def observe(self, shape: StepShape, elapsed_s: float) -> None:
        """Learn from a step and keep it."""
        self.observed.append((shape, elapsed_s))
        super().observe(shape, elapsed_s)


class GridRun:
    """Drives an engine through a grid.

    Args:
        engine: Without work, with a prefix cache; its `step_time` is `watch`.
        watch: Sees every step.
        grid: What is asked of the engine.
        clock: Measures the engine around the executor.
        vocab_size: Of its model.
        seed: Of the prompts.
        on_progress: Told of each point.
    """

    def __init__(
        self,
        engine: Engine,
        watch: StepWatch,
        grid: FitGrid,
        *,
        clock: Clock,
        vocab_size: int,
        seed: int = 0,
        on_progress: OnProgress = lambda *_: None,
    ) -> None:
        self._engine, self._watch, self._grid = engine, watch, grid
        self._clock = clock
        self._vocab_size = vocab_size
        self._seed = seed
        self._on_progress = on_progress
        self._ids = count()
        self._open: dict[str, bool] = {}  # requests under way; whether they have a token
        self._point = 0  # of this round
        self._steps: list[MeasuredStep] = []

    def run(self, num_rounds: int) -> list[MeasuredStep]:
        """Return the steps of so many rounds of the whole grid, those of a warm-up not."""
        self._on_progress("warming up", 0, 1)
        for _ in range(_NUM_WARMUPS):
            self._ask(self._fresh(self._grid.chunks[-1]), DECODES_PER_BATCH)
            self._run_out()
        self._steps.clear()
        for index in range(num_rounds):
            self._point = 0
            label = f"round {index + 1} of {num_rounds}"
            for context in (0, *self._grid.contexts):
                self._prompts(context, label)
            for context in self._grid.contexts:
                self._streams(context, label)
        return self._steps

    def _prompts(self, context: int, label: str) -> None:
        """Compute a chunk of each size after a context that is cached."""
        cached = random_tokens(f"{self._seed}/context", context, self._vocab_size)
        for chunk in self._grid.chunks:
            self._begin_point(label)
            if cached and chunk == self._grid.chunks[0]:
                self._compute(cached)
            self._compute(cached + self._fresh(chunk))

    def _streams(self, context: int, label: str) -> None:
        """Decode with ever fewer streams, without and with prompts beside them."""
        most = self._max_streams(context)
        streams: list[str] = []
        for batch in self._grid.batches:
            self._begin_point(label)
            if batch > most:
                continue
            if not streams:
                streams = self._begin_streams(batch, context)
            for name in streams[batch:]:
                self._engine.abort(name)
            streams = streams[:batch]
            for _ in range(DECODES_PER_BATCH):
                self._step()
            if batch < self._grid.batches[0]:  # a full batch has no place for a prompt
                self._beside()
        for name in streams:
            self._engine.abort(name)
        self._run_out()

    def _begin_streams(self, num_streams: int, context: int) -> list[str]:
        """Return streams that decode: their prompts are computed before any of them begins."""
        prompts = [self._fresh(context) for _ in range(num_streams)]
        for prompt in prompts:
            self._ask(prompt, 1)
        self._run_out()
        streams = [self._ask(prompt, self._grid.stream_tokens) for prompt in prompts]
        while self._has_prompts:
            self._step()
        return streams

    def _beside(self) -> None:
        """Compute prompts while streams decode."""
        for chunk in self._grid.mixed_chunks:
            self._ask(self._fresh(chunk), 1)
            while self._has_prompts:
                self._step()

    def _max_streams(self, context: int) -> int:
        """Return how many streams find blocks, a prompt beside them included."""
        grid = self._grid
        num_each = -(-(context + grid.stream_tokens) // grid.block_size)
        num_beside = -(-(grid.chunks[-1] + 1) // grid.block_size)
        num_free = self._engine.load().num_free_blocks - num_beside
        return max(1, min(num_free // num_each, MAX_CONTEXT_TOKENS // context))

    def _begin_point(self, label: str) -> None:
        self._on_progress(label, self._point, self._grid.num_points)
        self._point += 1

    @property
    def _has_prompts(self) -> bool:
        return not all(self._open.values())

    def _fresh(self, num_tokens: int) -> list[int]:
        """Return tokens that no prompt before has had."""
        return random_tokens(f"{self._seed}/{next(self._ids)}", num_tokens, self._vocab_size)

    def _ask(self, prompt: list[int], num_tokens: int) -> str:
        request = greedy_request(str(next(self._ids)), prompt, num_tokens)
        self._engine.add(request)
        self._open[request.request_id] = False
        return request.request_id

    def _compute(self, prompt: list[int]) -> None:
        self._ask(prompt, 1)
        self._run_out()

    def _run_out(self) -> None:
        while self._engine.has_work:
            self._step()

    def _step(self) -> None:
        num_before = len(self._watch.observed)
        start_s = self._clock.now()
        outputs = self._engine.step()
        wall_s = self._clock.now() - start_s
        for shape, elapsed_s in self._watch.observed[num_before:]:
            overhead_s = max(0.0, wall_s - elapsed_s)
            self._steps.append(MeasuredStep(self._point, shape, elapsed_s, overhead_s))
        for output in outputs:
            if output.error is not None:
                raise SluiceError(f"a request of the grid ended with {output.error}")
            self._open[output.request_id] = True
            if output.finish_reason is not None:
                del self._open[output.request_id]
