"""What one decision sees of the replicas: predicted work and latency, one place per replica."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cluster.router.lazy import lazy
from cluster.router.replica_table import Floats, ReplicaTable
from cluster.router.route import Candidate, RouteRequest

UNKNOWN_TOKEN_S = 1e-4
"""Seconds per prompt token of a replica that has not measured any, where no other one has."""

TPOT_SHARE = 0.85
"""Of a TPOT objective: decode steps that take more of it leave nothing to the prompts beside."""

FULL_WAITING = 256
"""Requests that wait in a replica, or are on their way: more wait better at the gateway."""

_BLOCKED_S = 2.0  # predicted wait where a replica has not a single block of those that it needs


class View:
    """The replicas that can take one request.

    Places count from 0 in the order of `rows`. Everything is computed when it is first asked for,
    so a policy pays for what it reads.

    Args:
        request: To be routed.
        table: All replicas.
        rows: Of the table: those that can take the request.
        cached_tokens: Of the prompt, at each of them.
        now_s: By the gateway's clock.
    """

    def __init__(
        self,
        request: RouteRequest,
        table: ReplicaTable,
        rows: npt.NDArray[np.intp],
        cached_tokens: Floats,
        now_s: float,
    ) -> None:
        self.request = request
        self.table = table
        self.rows = rows
        self.cached_tokens = cached_tokens
        self.now_s = now_s
        # Whether the part of the prompt that some replica has cached is in the store as well.
        self.is_stored = False
        self._is_all = len(rows) == len(table)

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> Floats:
        """Return one figure of the table's; not to be changed."""
        column = self.table.column(name)
        return column if self._is_all else column[self.rows]

    def replica_id(self, at: int) -> str:
        """Return the id of the replica at a place."""
        return str(self.table.ids[self.rows[at]])

    def leading_keys(self, num_blocks: int | None, at: int = 0) -> Sequence[int]:
        """Return the router keys of the prompt's first blocks at a place, None: of all blocks."""
        fingerprint, block_size, _ = self.table.kinds[self.rows[at]]
        keys = self.request.keys(fingerprint, block_size)
        return keys if num_blocks is None else keys[:num_blocks]

    @lazy
    def due_s(self) -> float:
        """When the first token is due, by the gateway's clock; infinite without an objective."""
        ttft_s = self.request.slo.ttft_s
        return math.inf if ttft_s is None else self.request.arrived_s + ttft_s

    @lazy
    def uncached_tokens(self) -> Floats:
        """Prompt tokens to compute, at least 1."""
        return self.request.num_prompt_tokens - self.cached_tokens

    @lazy
    def num_requests(self) -> Floats:
        """Sequences running and waiting, those sent and not reported included."""
        return self.column("num_requests") + self.column("num_sent")

    @lazy
    def token_s(self) -> Floats:
        """Seconds per prompt token; of one that has not measured, the mean of the others."""
        token_s = self.column("prefill_token_s")
        if np.minimum.reduce(token_s) > 0:
            return token_s
        known = token_s > 0
        mean_s = float(token_s[known].mean()) if known.any() else UNKNOWN_TOKEN_S
        return np.where(known, token_s, mean_s)

    @lazy
    def own_s(self) -> Floats:
        """Seconds that the uncached part of the prompt takes, some of it read from the store."""
        return self.computed_s - self._fetched_s if self.is_stored else self.computed_s

    @lazy
    def computed_s(self) -> Floats:
        """Seconds that the uncached part of the prompt takes where nothing is in the store."""
        return self._prefill_s(self.uncached_tokens, self.cached_tokens)

    @lazy
    def _fetched_s(self) -> Floats:
        """Seconds that are won by reading from the store what some replica has cached.

        An engine reads from one end and computes from the other: rates add up.
        """
        shared_s = self.full_s
        num_blocks = (self.cached_tokens.max() - self.cached_tokens) / self.column("block_size")
        fetch_s = num_blocks * self.column("fetch_block_s")
        both_s = shared_s * fetch_s / np.maximum(shared_s + fetch_s, 1e-9)
        return np.where(fetch_s > 0, shared_s - both_s, 0.0)

    @lazy
    def whole_s(self) -> Floats:
        """Seconds that the whole prompt would take, were nothing of it cached."""
        nothing = np.zeros(len(self.rows))
        return self._prefill_s(nothing + self.request.num_prompt_tokens, nothing)

    @lazy
    def full_s(self) -> Floats:
        """Seconds that the part of the prompt takes which some replica has cached."""
        shared = float(self.cached_tokens.max())
        return self._prefill_s(shared - self.cached_tokens, self.cached_tokens)

    def _prefill_s(self, num_tokens: Floats, cached: Floats) -> Floats:
        prefill_s: Floats = num_tokens * self.token_s
        work_s = self.column("prompt_work_s")
        if np.maximum.reduce(work_s) > 0:
            prefill_s = prefill_s + num_tokens * (cached + num_tokens / 2) * work_s
        return prefill_s

    @lazy
    def wait_s(self) -> Floats:
        """Seconds of other prompts before this one, and of waiting for blocks."""
        wait_s = self.table.work_before(self.due_s, self.now_s)
        if not self._is_all:
            wait_s = wait_s[self.rows]
        return wait_s + self._blocked_s

    @lazy
    def backlog_s(self) -> Floats:
        """Seconds of all prompts there, whenever they are due, and of waiting for blocks."""
        backlog_s = self.table.backlog(self.now_s)
        if not self._is_all:
            backlog_s = backlog_s[self.rows]
        return backlog_s + self._blocked_s

    @lazy
    def _blocked_s(self) -> Floats | float:
        free = self.column("free_blocks") - self.column("sent_blocks")
        block_size = np.minimum.reduce(self.column("block_size"))
        if np.minimum.reduce(free) > self.request.num_prompt_tokens / block_size + 2:
            return 0.0  # nearly always: there is room for all of it everywhere
        needed = np.ceil(self.uncached_tokens / self.column("block_size")) + 1
        blocked_s: Floats = _BLOCKED_S * np.clip((needed - free) / needed, 0.0, 1.0)
        return blocked_s

    @lazy
    def is_full(self) -> npt.NDArray[np.bool_]:
        """Where a request could only wait behind others that wait for blocks."""
        if isinstance(self._blocked_s, float):
            return self.column("num_waiting") + self.column("num_sent") >= FULL_WAITING
        num_before = self.column("num_waiting") + self.column("num_sent")
        return ((self._blocked_s > 0) & (num_before > 0)) | (num_before >= FULL_WAITING)

    @lazy
    def predicted_s(self) -> Floats:
        """Seconds from now to the first token, without correction."""
        return self.wait_s + self.own_s + self.column("decode_step_s")

    @lazy
    def ttft_p50_s(self) -> Floats:
        """Seconds from now to the first token; half of all requests take longer."""
        return self.predicted_s * self.column("median")

    @lazy
    def ttft_high_s(self) -> Floats:
        """Seconds from now to the first token; few requests take longer."""
        risks = self.table.risk.risks(self.ttft_p50_s, self.now_s)
        return self.ttft_p50_s * risks

    @lazy
    def tpot_s(self) -> Floats:
        """Seconds per further token, once this sequence decodes too."""
        more_s = self.column("sequence_s")
        more_s = more_s + self.column("context_s") * self.request.num_prompt_tokens
        return self.column("decode_step_s") + more_s

    @lazy
    def is_in_time(self) -> npt.NDArray[np.bool_]:
        """Where the objective is predicted to be kept, and the client's deadline."""
        until_s = min(self.due_s, self.request.expires_s) - self.now_s
        is_in_time = self.ttft_high_s <= until_s
        if self.request.slo.tpot_s is not None:
            is_in_time &= self.tpot_s <= TPOT_SHARE * self.request.slo.tpot_s
        return is_in_time

    def meets_slo(self, at: int) -> bool:
        """Return whether the replica at a place is predicted to keep the objective."""
        return bool(self.is_in_time[at])

    def candidates(self, places: Sequence[int], scores: Floats) -> tuple[Candidate, ...]:
        """Return what is told of the replicas at some places, in their order."""
        order = np.array(places, np.intp)
        columns = (
            scores,
            self.cached_tokens,
            self.uncached_tokens,
            self.wait_s,
            self.ttft_p50_s,
            self.ttft_high_s,
            self.tpot_s,
            self.num_requests,
            self.own_s,
        )
        rows = zip(*[column[order].tolist() for column in columns], strict=True)
        return tuple(
            [
                Candidate(self.replica_id(at), a, int(b), int(c), d, e, f, g, int(h), i)
                for at, (a, b, c, d, e, f, g, h, i) in zip(places, rows, strict=True)
            ]
        )
