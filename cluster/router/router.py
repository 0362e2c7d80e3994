"""The global scheduler: filter, score, pick. Pure, over pushed state; microseconds, no I/O.

    all replicas ──filter──► those that take this request ──score──► one figure each ──pick──► one

A policy only scores; what it knows of each replica stands in arrays, one place per replica.
"""

from __future__ import annotations

import random

import numpy as np
import numpy.typing as npt

from cluster.config import RouterConfig
from cluster.router.policy import Policy, make_policy
from cluster.router.prefix_index import PrefixIndex
from cluster.router.replica_table import ReplicaTable
from cluster.router.route import Decision, RouteRequest
from cluster.router.view import View

_Ints = npt.NDArray[np.intp]


class Router:
    """Picks replicas by the policy of `RouterConfig`.

    Args:
        config: Policy and its knobs.
        rng: Breaks ties.
    """

    def __init__(self, config: RouterConfig, rng: random.Random) -> None:
        self._policy: Policy = make_policy(config, rng)
        self._last: tuple[View, int] | None = None  # that was picked, and where to
        self._kinds_version = -1
        self._kinds: list[tuple[tuple[str, int, str], _Ints]] = []  # rows of each kind of replica
        self._all_rows: _Ints = np.zeros(0, np.intp)
        self._slots: _Ints = np.zeros(0, np.intp)  # of the index, by row
        self._slots_version = -1
        self._models: set[str] = set()  # of all replicas
        self._max_prompt_tokens = 0.0  # below this many every replica takes a prompt

    def pick(
        self, request: RouteRequest, table: ReplicaTable, index: PrefixIndex, now_s: float
    ) -> Decision | None:
        """Choose a replica; None if none can take the request.

        Args:
            request: Of which replica's keys are asked once per kind of replica.
            table: The replicas that are connected.
            index: Their cached blocks.
            now_s: By the gateway's clock.
        """
        rows = self._filter(request, table)
        if not len(rows):
            return None
        view = View(request, table, rows, self._cached_tokens(request, table, index, rows), now_s)
        scores = self._policy.score(view)
        order = self._policy.pick(view, scores)
        self._last = (view, order[0])
        return Decision(
            view.candidates(order, scores),
            num_candidates=len(rows),
            num_excluded=len(table) - len(rows),
            meets_slo=view.meets_slo(order[0]),
            is_full=bool(view.is_full.all()),
        )

    def takes(self, request: RouteRequest, table: ReplicaTable) -> bool:
        """Return whether any replica takes such a request, were there room."""
        return len(self._filter(request, table)) > 0

    def take(self) -> None:
        """Tell the policy that the request of the last `pick` goes where it was picked to go."""
        assert self._last is not None, "nothing was picked"
        self._policy.on_pick(*self._last)
        self._last = None

    def set_peers(self, rank: int, num_gateways: int) -> None:
        """Tell the policy which of how many gateways this is."""
        self._policy.set_peers(rank, num_gateways)

    def _filter(self, request: RouteRequest, table: ReplicaTable) -> _Ints:
        """Return the rows of the replicas that take requests of this model and length."""
        self._rows_by_kind(table)
        is_open, longest = table.column("is_open"), table.column("max_model_len")
        if (
            request.num_prompt_tokens < self._max_prompt_tokens
            and not request.excluded
            and not request.fingerprint
            and (not request.model or self._models == {request.model})
            and np.minimum.reduce(is_open) > 0
        ):
            return self._all_rows  # nearly always
        is_fit = (is_open > 0) & (longest > request.num_prompt_tokens)
        if request.model:
            is_fit &= np.array([kind[2] == request.model for kind in table.kinds], bool)
        if request.fingerprint:
            is_fit &= np.array([kind[0] == request.fingerprint for kind in table.kinds], bool)
        for replica_id in request.excluded:
            row = table.row_of(replica_id)
            if row is not None:
                is_fit[row] = False
        return np.flatnonzero(is_fit)

    def _cached_tokens(
        self, request: RouteRequest, table: ReplicaTable, index: PrefixIndex, rows: _Ints
    ) -> npt.NDArray[np.float64]:
        """Return the prompt tokens that each of these replicas has cached."""
        if self._slots_version != table.version:
            self._slots = np.array([index.slot_of(name) for name in table.ids], np.intp)
            self._slots_version = table.version
        cached = np.zeros(len(table))
        for (fingerprint, block_size, _), kind_rows in self._rows_by_kind(table):
            num_blocks = index.match(request.keys(fingerprint, block_size))
            if len(num_blocks):
                slots = self._slots[kind_rows]
                tokens = num_blocks[slots] * float(block_size)
                tokens[slots < 0] = 0.0  # known to the table, and not to the index
                cached[kind_rows] = tokens
        # The last token is always computed: its logits are what the first answer token comes from.
        longest = np.minimum(cached, request.num_prompt_tokens - 1.0)
        return longest if rows is self._all_rows else longest[rows]

    def _rows_by_kind(self, table: ReplicaTable) -> list[tuple[tuple[str, int, str], _Ints]]:
        if self._kinds_version != table.version:
            rows: dict[tuple[str, int, str], list[int]] = {}
            for row, kind in enumerate(table.kinds):
                rows.setdefault(kind, []).append(row)
            self._kinds = [(kind, np.array(of_kind, np.intp)) for kind, of_kind in rows.items()]
            self._all_rows = np.arange(len(table.ids))
            self._models = {kind[2] for kind in rows}
            self._max_prompt_tokens = min(table.column("max_model_len"), default=0.0)
            self._kinds_version = table.version
        return self._kinds
