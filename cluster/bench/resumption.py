"""`sluice bench resumption`: kill -9 at every token index, and what the client saw of it.

    for each case     the unbroken answer, twice
      for each index  stream ─► so many tokens have come ─► kill ─► the rest ─► compare ─► replace

A stream may be a token further by the time that the signal arrives; the index that counts is the
one at which it went on elsewhere, and one that was missed is tried again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

from cluster.bench.resumption_cases import CASES, PROMPT, sampling_of
from cluster.bench.resumption_cluster import Layout, ResumptionCluster
from cluster.bench.resumption_stream import Answer, Cut, Followed, difference, follow
from cluster.bench.statistics import spread
from cluster.client import AsyncClient
from cluster.errors import InvalidArgumentError, UnavailableError
from cluster.types import SamplingParams

Kind = Literal["replica", "gateway"]
OnProgress = Callable[[str, int, int], None]

RESUME_TIMEOUT_S = 30.0  # of the client, where a gateway dies
_MAX_TRIES = 4  # of one index
_LAYOUTS = {"replica": (3, 1), "gateway": (2, 2)}  # leaders, gateways


@dataclass(frozen=True, slots=True)
class ResumptionBench:
    """What to measure."""

    kind: Kind = "replica"  # what is killed
    cases: tuple[str, ...] = CASES
    num_tokens: int = 64  # of an answer, about
    every: int = 1  # of the indexes, and the last one
    dtype: str = "float32"
    min_step_s: float = 0.01  # of an engine: slower than a signal, so that indexes can be met

    def __post_init__(self) -> None:
        unknown = [name for name in self.cases if name not in CASES]
        if unknown or not self.cases:
            raise InvalidArgumentError(
                f"cases={','.join(self.cases)}: choose from {','.join(CASES)}", field="cases"
            )

    @property
    def layout(self) -> Layout:
        """Of the cluster."""
        num_leaders, num_gateways = _LAYOUTS[self.kind]
        overrides = (f"model.dtype={self.dtype}",)
        return Layout(num_leaders, num_gateways, overrides, min_step_s=self.min_step_s)


@dataclass(slots=True)
class CaseResult:
    """What became of the streams of one case."""

    name: str
    num_tokens: int  # of the unbroken answer
    num_streams: int = 0  # that were cut
    num_uncut: int = 0  # that had ended before the signal arrived
    num_identical: int = 0
    indexes: set[int] = field(default_factory=set)  # at which a stream was cut
    missed: list[int] = field(default_factory=list)  # at which none was, try as we might
    failed: list[dict[str, Any]] = field(default_factory=list)  # ended with an error
    different: list[dict[str, Any]] = field(default_factory=list)  # from the unbroken one
    gaps_s: list[float] = field(default_factory=list)
    undisturbed: str = ""  # how two unbroken answers differ; empty: not at all

    @property
    def failed_indexes(self) -> set[int]:
        """That were aimed at, and where a stream failed."""
        return {failure["aimed_index"] for failure in self.failed}

    def count(self, index: int, followed: Followed, found: str) -> None:
        """Count one stream.

        Args:
            index: That was aimed at.
            followed: The stream.
            found: How it differs; empty if it does not.
        """
        if followed.cut_index is None and not followed.error:
            self.num_uncut += 1
        else:
            self.num_streams += 1
        if followed.cut_index is not None:
            self.indexes.add(followed.cut_index)
        if followed.gap_s is not None:
            self.gaps_s.append(followed.gap_s)
        where = {"aimed_index": index, "cut_index": followed.cut_index}
        if followed.error:
            self.failed.append({**where, "error": followed.error})
        elif found:
            self.different.append({**where, "difference": found})
        elif followed.cut_index is not None:
            self.num_identical += 1

    def figures(self) -> dict[str, Any]:
        """Return it as plain data, for JSON."""
        return {
            "name": self.name,
            "num_tokens": self.num_tokens,
            "num_streams": self.num_streams,
            "num_uncut": self.num_uncut,
            "num_identical": self.num_identical,
            "num_indexes": len(self.indexes),
            "missed": self.missed,
            "failed": self.failed,
            "different": self.different,
            "undisturbed_difference": self.undisturbed,
            "gap_s": spread(self.gaps_s),
        }


class Sweep:
    """Cuts streams of one case after the other.

    Args:
        cluster: Is restored after each kill.
        kind: What is killed.
    """

    def __init__(self, cluster: ResumptionCluster, kind: Kind) -> None:
        self._cluster = cluster
        self._kind = kind
        self._caching: set[str] = set()  # replicas that have had the prompt

    async def reference(self, sampling: SamplingParams) -> Answer:
        """Return the unbroken answer.

        Raises:
            UnavailableError: There is none.
        """
        followed = await self._follow(sampling, None)
        if followed.answer is None:
            raise UnavailableError(f"an undisturbed stream failed: {followed.error}")
        return followed.answer

    async def run(
        self,
        name: str,
        sampling: SamplingParams,
        aims: Callable[[int], Sequence[range]],
        on_index: Callable[[int, int], None] = lambda num_done, total: None,
    ) -> CaseResult:
        """Cut streams at each of the aims.

        Args:
            name: Of the case.
            sampling: Its parameters.
            aims: Returns, for an answer of so many tokens, ranges of indexes; each is met by one.
            on_index: Told how many are done.
        """
        reference = await self.reference(sampling)
        result = CaseResult(name, len(reference.token_ids))
        result.undisturbed = difference(await self.reference(sampling), reference)
        wanted = aims(result.num_tokens)
        for num_done, aim in enumerate(wanted):
            on_index(num_done, len(wanted))
            for _ in range(_MAX_TRIES):
                if not result.indexes.isdisjoint(aim) or aim.start in result.failed_indexes:
                    break
                await self._cut(aim.start, sampling, reference, result)
        met = result.indexes | result.failed_indexes
        result.missed = [aim.start for aim in wanted if met.isdisjoint(aim)]
        return result

    async def _cut(
        self, index: int, sampling: SamplingParams, reference: Answer, result: CaseResult
    ) -> None:
        address = self._cluster.addresses[0]  # that a client begins with

        def kill(replica_id: str) -> None:
            if self._kind == "replica":
                self._cluster.kill_leader(replica_id)
            else:
                self._cluster.kill_gateway(address)

        caching = frozenset(self._caching)
        followed = await self._follow(sampling, Cut(index, kill))
        found = ""
        if followed.answer is not None:
            num_cached = self._num_cached(followed, caching, reference.usage.prompt_tokens)
            found = difference(followed.answer, reference, num_cached_tokens=num_cached)
        result.count(index, followed, found)
        await self._cluster.restore()

    def _num_cached(self, followed: Followed, caching: frozenset[str], num: int) -> int | None:
        """Return the cached tokens that a usage has to show; None where that cannot be said.

        They are those of the attempt that brought the first token. Where a gateway dies soon after
        that, its journal may not have them yet.
        """
        if self._kind == "gateway":
            return None
        asked = followed.replica_ids
        first = asked[0] if followed.cut_index else asked[-1]
        return self._cluster.num_cacheable(num) if first in caching else 0

    async def _follow(self, sampling: SamplingParams, cut: Cut | None) -> Followed:
        timeout_s = RESUME_TIMEOUT_S if self._kind == "gateway" else 0.0
        async with AsyncClient(self._cluster.addresses) as client:
            followed = await follow(client, PROMPT, sampling, cut=cut, resume_timeout_s=timeout_s)
        self._caching.update(followed.replica_ids)
        return followed


def aims_of(num_tokens: int, every: int) -> list[range]:
    """Return the ranges of indexes of which each shall be met by a cut; the last index is one.

    Args:
        num_tokens: Of the answer: a cut has at least one token behind it.
        every: Indexes in a range.
    """
    aims = [range(start, min(start + every, num_tokens)) for start in range(0, num_tokens, every)]
    return [*aims, range(num_tokens - 1, num_tokens)] if len(aims[-1]) > 1 else aims


async def run_resumption_bench(bench: ResumptionBench, on_progress: OnProgress) -> dict[str, Any]:
    """Measure; return plain data.

    Args:
        bench: What.
        on_progress: Told what goes on, how much is done, of how much.

    Raises:
        SluiceError: The cluster does not start, or answers nothing undisturbed.
    """
    on_progress("starting the cluster", 0, 1)
    results = []
    async with ResumptionCluster(bench.layout) as cluster:
        sweep = Sweep(cluster, bench.kind)
        for name in bench.cases:
            on_progress(f"{name}: undisturbed", 0, 1)
            sampling = await sampling_of(name, bench.num_tokens, sweep.reference)
            results.append(
                await sweep.run(
                    name,
                    sampling,
                    partial(aims_of, every=bench.every),
                    partial(on_progress, name),
                )
            )
    return {
        "load": asdict(bench),
        "cases": [result.figures() for result in results],
        "gap_s": spread([gap_s for result in results for gap_s in result.gaps_s]),
        "num_streams": sum(result.num_streams for result in results),
        "num_identical": sum(result.num_identical for result in results),
        "num_failed": sum(len(result.failed) for result in results),
        "num_different": sum(len(result.different) for result in results),
        "num_missed": sum(len(result.missed) for result in results),
        "ended": cluster.ended,
    }
