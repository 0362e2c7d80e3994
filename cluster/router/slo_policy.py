"""The policy that predicts: cached prefix, queued work by when it is due, hot spots.

    score = own work + weight x backlog     seconds, among those that keep the objective if any does

Own work is what the cluster pays for the choice, the backlog what this request pays. Without an
objective both count alike: the first token comes soonest. With one the backlog counts a quarter: a
queue that keeps the objective costs nobody anything, work that is done twice takes others' place. A
prefix that is hot is worth a copy: its cost is shared by the uses that the copy will serve, so the
replicas without it do not look dear for long, and load decides.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from cluster.config import RouterConfig
from cluster.router.hot_prefixes import HotPrefixes
from cluster.router.replica_table import Floats
from cluster.router.view import View

MAX_ORDER = 5
"""Replicas that are named: the chosen one, then those to try if it fails."""

LATE_S = 1e4
"""Added to the score of a replica that would miss the objective: it comes last."""

BACKLOG_WEIGHT = 0.25
"""Of a second of other prompts, against a second of own work, for a request with an objective."""

FULL_S = 1e5
"""Added to the score of a replica where others wait already: it comes last of all."""

NEAR = 0.002
"""Scores are equal that differ by less than this share of what the whole prompt would cost."""

PEER_SHARE = 0.1
"""Of what the whole prompt would cost: added to the scores of the replicas of other gateways."""


SESSION_SHARE = 0.1
"""Of what the whole prompt would cost: what a session's last replica may be worse than the best."""

MAX_SESSIONS = 2**16
"""Remembered; the least recent ones are forgotten."""

STORED_USES = 1.5
"""Recent uses of a prefix from which on it is taken to be in the store."""


class SloPolicy:
    """Scores by predicted seconds.

    Args:
        config: How long uses of a prefix count as recent.
        rng: Breaks ties.
    """

    def __init__(self, config: RouterConfig, rng: random.Random) -> None:
        self._rng = rng
        self._hot = HotPrefixes(config.hot_window_s)
        self._sessions: OrderedDict[str, str] = OrderedDict()  # session -> its last replica
        self._rank, self._num_gateways = 0, 1
        self._mine: Floats = np.zeros(0)  # by row of the table: 1 is one of this gateway's share
        self._mine_version = -1

    def set_peers(self, rank: int, num_gateways: int) -> None:
        """Learn which of how many gateways this is.

        Each prefers its share of the replicas where others are no better: so those that decide at
        the same moment, on the same state, do not all choose the same.
        """
        self._rank, self._num_gateways = rank, num_gateways
        self._mine_version = -1

    def score(self, view: View) -> Floats:
        """Return the predicted seconds until the prompt is computed, less what copies are worth."""
        num_uses, num_holders = self._heat(view)
        # Replicas write what was used twice to the store, if there is one.
        view.is_stored = num_uses >= STORED_USES
        # A copy serves the uses to come: each one pays its part of it.
        part = min(1.0, (num_holders + 1) / num_uses) ** 2
        own_s = view.own_s
        if part < 1:
            own_s = np.minimum(own_s, view.computed_s - view.full_s * (1.0 - part))
        weight = 1.0 if view.request.slo.ttft_s is None else BACKLOG_WEIGHT
        scores = own_s + weight * view.backlog_s
        if self._num_gateways > 1:
            scores = scores + PEER_SHARE * view.whole_s * (1.0 - self._share(view))
        if view.is_full.any():
            scores = scores + FULL_S * view.is_full
        in_time = view.is_in_time
        num_in_time = np.count_nonzero(in_time)
        if 0 < num_in_time < len(in_time):
            scores = np.where(in_time, scores, scores + LATE_S)
        return scores

    def _heat(self, view: View) -> tuple[float, int]:
        """Return the recent uses of the longest cached prefix, and how many replicas have it."""
        key, shared = self._shared_key(view)
        if key is None:
            return 1.0, 0
        num_uses = self._hot.uses(key, view.now_s) + 1.0  # this one is the last
        return num_uses, int(np.count_nonzero(view.cached_tokens >= shared))

    def _shared_key(self, view: View) -> tuple[int | None, float]:
        """Return the last block of the longest cached prefix, and the tokens up to its end."""
        best = int(view.cached_tokens.argmax())
        shared = float(view.cached_tokens[best])
        keys = view.leading_keys(None, best)
        depth = min(len(keys), int(shared // self._block_size(view, best)))
        return (keys[depth - 1] if depth else None), shared

    def pick(self, view: View, scores: Floats) -> Sequence[int]:
        """Return the best ones; of those as good as the best, the less busy of two at random."""
        if len(scores) <= MAX_ORDER:
            order = scores.argsort(kind="stable")
        else:
            order = scores.argpartition(MAX_ORDER)[:MAX_ORDER]
            order = order[scores[order].argsort(kind="stable")]
        places: list[int] = order.tolist()
        chosen = places[0]
        whole_s = view.request.num_prompt_tokens * view.token_s[chosen]
        limit = scores[chosen] + NEAR * whole_s
        near = (scores <= limit).nonzero()[0]
        last = self._session_place(view)
        if last is not None and scores[last] <= limit + SESSION_SHARE * whole_s:
            chosen = last
        elif len(near) > 1:
            first, second = self._rng.sample(range(len(near)), 2)
            a, b = int(near[first]), int(near[second])
            requests = view.num_requests
            chosen = a if (requests[a], scores[a]) <= (requests[b], scores[b]) else b
        return [chosen, *(at for at in places if at != chosen)][:MAX_ORDER]

    def _session_place(self, view: View) -> int | None:
        """Return the place of the replica that served the request's session before."""
        replica_id = self._sessions.get(view.request.session) if view.request.session else None
        row = view.table.row_of(replica_id) if replica_id is not None else None
        if row is None:
            return None
        places = (view.rows == row).nonzero()[0]
        return int(places[0]) if len(places) else None

    def on_pick(self, view: View, at: int) -> None:
        """Count a use of the prompt's prefix, and remember where the session went."""
        session = view.request.session
        if session:
            self._sessions[session] = view.replica_id(at)
            self._sessions.move_to_end(session)
            if len(self._sessions) > MAX_SESSIONS:
                self._sessions.popitem(last=False)
        key, _ = self._shared_key(view)
        if key is not None:
            self._hot.use(key, view.now_s)

    def _share(self, view: View) -> Floats:
        table = view.table
        if self._mine_version != table.version:
            order = sorted(range(len(table.ids)), key=table.ids.__getitem__)
            self._mine = np.zeros(len(order))
            self._mine[order[self._rank % self._num_gateways :: self._num_gateways]] = 1.0
            self._mine_version = table.version
        return self._mine[view.rows]

    @staticmethod
    def _block_size(view: View, at: int) -> int:
        block_size: int = view.table.kinds[view.rows[at]][1]
        return block_size
