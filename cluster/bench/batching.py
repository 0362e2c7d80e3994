"""`sluice bench batching`: do running streams keep their pace while long prompts are computed?

    streams   |first tokens|. . . . . . . . . . . . . . . . . . . . . . . . .|
    prompts                |== 0 ==|== 2 ==|== 4 ==| ...                     |
                           |== 1 ==|== 3 ==| ...     | prompts done
                           |<----- pace is measured ---->|

The same work in three ways: without objectives, with a TPOT objective on the streams, and with a
small fixed token budget for comparison. Streams and prompts are the same in each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

from cluster.bench.engine_drive import greedy_request, random_tokens
from cluster.bench.statistics import percentile, spread
from cluster.clock import Clock
from cluster.config import EngineConfig
from cluster.engine.engine import Engine
from cluster.engine.executor import Executor
from cluster.engine.step_time import StepTimeModel
from cluster.errors import InvalidArgumentError, UnavailableError
from cluster.step import StepPlan, StepResult
from cluster.types import SLO

MODES = ("unconstrained", "adaptive", "static")

MakeEngine = Callable[[EngineConfig, Executor, StepTimeModel], Engine]
"""Returns a fresh engine, without prefix caching: each run computes everything."""


@dataclass(frozen=True, slots=True)
class BatchingLoad:
    """The work of one run."""

    num_streams: int = 8  # that run all the time
    stream_input_tokens: int = 32
    stream_output_tokens: int = 192
    num_prompts: int = 12  # in all
    prompts_at_once: int = 2  # under way, from when every stream has its first token
    prompt_tokens: int = 768
    seed: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of all prompts and answers."""
        per_stream = self.stream_input_tokens + self.stream_output_tokens
        return self.num_streams * per_stream + self.num_prompts * (self.prompt_tokens + 1)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step as it was."""

    end_s: float  # since the run began
    elapsed_s: float
    num_prompt_tokens: int
    num_decodes: int


@dataclass(slots=True)
class MixedRun:
    """What one run brought; times in seconds since it began."""

    mode: str
    wall_s: float = 0.0
    prompts_from_s: float = 0.0  # every stream has its first token
    prompts_until_s: float = 0.0  # the last prompt is computed
    token_times_s: dict[str, list[float]] = field(default_factory=dict)  # by request
    steps: list[StepRecord] = field(default_factory=list)

    def stream_gaps_s(self) -> list[list[float]]:
        """Return per stream the times between its tokens while prompts were under way."""
        first_s, last_s = self.prompts_from_s, self.prompts_until_s
        return [
            [after - before for before, after in pairwise(times) if first_s <= before < last_s]
            for name, times in self.token_times_s.items()
            if name.startswith("stream")
        ]

    def mixed_steps(self) -> list[StepRecord]:
        """Return the steps that had both prompts and decodes."""
        return [step for step in self.steps if step.num_prompt_tokens and step.num_decodes]


class _Watched:
    """An executor that keeps a record of its steps."""

    def __init__(self, executor: Executor, clock: Clock) -> None:
        self._executor, self._clock = executor, clock
        self._sizes: dict[int, tuple[int, int]] = {}
        self.records: list[StepRecord] = []
        self.max_in_flight, self.num_blocks = executor.max_in_flight, executor.num_blocks

    def submit(self, plan: StepPlan) -> None:
        num_decodes = sum(len(s.token_ids) == 1 and s.sample is not None for s in plan.sequences)
        self._sizes[plan.step_id] = (plan.num_tokens - num_decodes, num_decodes)
        self._executor.submit(plan)

    def collect(self, timeout_s: float) -> StepResult:
        result = self._executor.collect(timeout_s)
        sizes = self._sizes.pop(result.step_id)
        self.records.append(StepRecord(self._clock.now(), result.elapsed_s, *sizes))
        return result

    def shutdown(self) -> None:
        self._executor.shutdown()


@dataclass(frozen=True, slots=True)
class BatchingBench:
    """One measurement."""

    load: BatchingLoad
    config: EngineConfig
    tpot_slo_s: float  # of the streams; 0: a multiple of their undisturbed pace
    slo_factor: float  # that multiple
    static_tokens: int  # budget of the static run's steps
    num_rounds: int  # the modes take turns


class BatchingRunner:
    """Runs the modes in turns on one executor.

    Args:
        bench: What to do.
        make_engine: Of the model that the executor computes.
        executor: Stays the caller's.
        clock: Of the engines.
        vocab_size: Prompts are random tokens below.
    """

    def __init__(
        self,
        bench: BatchingBench,
        *,
        make_engine: MakeEngine,
        executor: Executor,
        clock: Clock,
        vocab_size: int,
    ) -> None:
        self._bench = bench
        self._make_engine = make_engine
        self._executor = executor
        self._clock = clock
        self._vocab_size = vocab_size
        self.step_time = StepTimeModel()  # one for all runs: it knows the machine, not the load
        self.tpot_slo_s = bench.tpot_slo_s

    def run(self, on_run: Callable[[MixedRun], None] = lambda run: None) -> list[MixedRun]:
        """Return all runs, in the order in which they ran; a warm-up is not among them."""
        undisturbed_s = self._warm_up()
        self.tpot_slo_s = self.tpot_slo_s or self._bench.slo_factor * undisturbed_s
        runs = []
        for _ in range(self._bench.num_rounds):
            for mode in MODES:
                runs.append(self._run(mode))
                on_run(runs[-1])
        return runs

    def _warm_up(self) -> float:
        """Let the step model see prompts and decodes; return the undisturbed TPOT, seconds."""
        load = replace(self._bench.load, num_prompts=2, prompts_at_once=1, stream_output_tokens=32)
        run = self._run("unconstrained", load)
        alone = [step.elapsed_s for step in run.steps if not step.num_prompt_tokens]
        return percentile(alone, 50) or 0.0

    def _run(self, mode: str, load: BatchingLoad | None = None) -> MixedRun:
        config = self._bench.config
        if mode == "static":
            config = config.model_copy(update={"max_num_batched_tokens": self._bench.static_tokens})
        watched = _Watched(self._executor, self._clock)
        engine = self._make_engine(config, watched, self.step_time)
        slo = SLO(tpot_s=self.tpot_slo_s) if mode == "adaptive" else SLO()
        began_s = self._clock.now()
        run = _drive(engine, load or self._bench.load, slo, self._clock, self._vocab_size, mode)
        run.steps = [replace(step, end_s=step.end_s - began_s) for step in watched.records]
        return run


def _drive(
    engine: Engine, load: BatchingLoad, slo: SLO, clock: Clock, vocab_size: int, mode: str
) -> MixedRun:
    run = MixedRun(mode)
    began_s = clock.now()
    for index in range(load.num_streams):
        tokens = random_tokens(f"{load.seed}/s{index}", load.stream_input_tokens, vocab_size)
        request = greedy_request(f"stream{index}", tokens, load.stream_output_tokens)
        engine.add(replace(request, slo=slo))
        run.token_times_s[request.request_id] = []
    num_sent = num_done = 0
    while engine.has_work:
        has_begun = all(run.token_times_s.values())
        while (
            has_begun
            and num_sent < load.num_prompts
            and num_sent - num_done < (load.prompts_at_once)
        ):
            run.prompts_from_s = run.prompts_from_s or clock.now() - began_s
            tokens = random_tokens(f"{load.seed}/p{num_sent}", load.prompt_tokens, vocab_size)
            engine.add(greedy_request(f"prompt{num_sent}", tokens, 1))
            num_sent += 1
        outputs = engine.step()
        now_s = clock.now() - began_s
        for output in outputs:
            if output.error is not None:
                raise UnavailableError(f"{output.request_id}: {output.error}")
            if output.request_id.startswith("stream"):
                run.token_times_s[output.request_id] += [now_s] * len(output.tokens)
            else:
                num_done += 1
                run.prompts_until_s = now_s
    run.wall_s = clock.now() - began_s
    return run


def check_load(load: BatchingLoad, max_model_len: int) -> None:
    """Refuse a load that the model cannot take.

    Raises:
        InvalidArgumentError: A stream or a prompt is longer than the model's context.
    """
    longest = {
        "stream-output-tokens": load.stream_input_tokens + load.stream_output_tokens,
        "prompt-tokens": load.prompt_tokens + 1,
    }
    for name, num_tokens in longest.items():
        if num_tokens > max_model_len:
            raise InvalidArgumentError(
                f"{name}: a request has {num_tokens} tokens, limit={max_model_len} of this model: "
                "ask for fewer",
                field=name,
            )


def figures_of(bench: BatchingBench, runs: Iterable[MixedRun], tpot_slo_s: float) -> dict[str, Any]:
    """Return the figures of all modes, as plain data; throughput is the median over the rounds."""
    by_mode = {mode: [run for run in runs if run.mode == mode] for mode in MODES}
    modes = {mode: _mode_figures(bench.load, of, tpot_slo_s) for mode, of in by_mode.items()}
    reference = modes["unconstrained"]["total_tokens_per_s"]
    for figures in modes.values():
        figures["throughput_ratio"] = figures["total_tokens_per_s"] / reference
    return {
        "load": asdict(bench.load),
        "tpot_slo_s": tpot_slo_s,
        "num_rounds": bench.num_rounds,
        "static_tokens": bench.static_tokens,
        "modes": modes,
    }


def _mode_figures(load: BatchingLoad, runs: list[MixedRun], tpot_slo_s: float) -> dict[str, Any]:
    streams = [gaps for run in runs for gaps in run.stream_gaps_s() if gaps]
    gaps = [gap for stream in streams for gap in stream]
    tpots = [sum(stream) / len(stream) for stream in streams]
    mixed = [step for run in runs for step in run.mixed_steps()]
    return {
        "wall_s": percentile([run.wall_s for run in runs], 50),
        "total_tokens_per_s": load.num_tokens / (percentile([r.wall_s for r in runs], 50) or 1.0),
        "tpot_s": spread(tpots),
        "gap_s": spread(gaps),
        "gaps_within_slo": sum(gap <= tpot_slo_s for gap in gaps) / max(1, len(gaps)),
        "prompts_s": percentile([run.prompts_until_s - run.prompts_from_s for run in runs], 50),
        "prompt_tokens_per_mixed_step": spread([s.num_prompt_tokens for s in mixed]),
        "num_mixed_steps": len(mixed),
    }
