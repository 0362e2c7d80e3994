"""How replicas are scored: `slo` is ours, the others are what the field uses, for comparison."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Protocol

import numpy as np

from cluster.config import RouterConfig
from cluster.router.replica_table import Floats
from cluster.router.slo_policy import MAX_ORDER, SloPolicy
from cluster.router.view import View


class Policy(Protocol):
    """Scores replicas and picks; may remember what it picked."""

    def score(self, view: View) -> Floats:
        """Return one score per replica, less is better."""
        ...

    def pick(self, view: View, scores: Floats) -> Sequence[int]:
        """Return the places of the best replicas, the chosen one first."""
        ...

    def on_pick(self, view: View, at: int) -> None:
        """Remember where a request went."""
        ...

    def set_peers(self, rank: int, num_gateways: int) -> None:
        """Learn which of how many gateways this is."""
        ...


class _Scored:
    """Picks the least score; ties go to the first in the table, unless a policy knows better."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def pick(self, view: View, scores: Floats) -> Sequence[int]:
        order = np.lexsort((self._noise(len(scores)), scores))
        return [int(at) for at in order[:MAX_ORDER]]

    def on_pick(self, view: View, at: int) -> None:
        del view, at

    def set_peers(self, rank: int, num_gateways: int) -> None:
        del rank, num_gateways

    def _noise(self, num_places: int) -> Floats:
        """Return what breaks ties: who takes the first one would send every tie there."""
        return np.array([self._rng.random() for _ in range(num_places)])


class Random(_Scored):
    """Anywhere."""

    def score(self, view: View) -> Floats:
        """Return noise."""
        return self._noise(len(view))


class RoundRobin(_Scored):
    """Each in turn, in the order of ids."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self._last_id = ""

    def score(self, view: View) -> Floats:
        """Return the distance in turns from the last one."""
        ids = [view.replica_id(at) for at in range(len(view))]
        turns = sorted(ids, key=lambda name: (name <= self._last_id, name))
        turn_of = {name: float(turn) for turn, name in enumerate(turns)}
        return np.array([turn_of[name] for name in ids])

    def on_pick(self, view: View, at: int) -> None:
        """Remember whose turn it was."""
        self._last_id = view.replica_id(at)


class LeastRequests(_Scored):
    """The fewest requests of this gateway under way, as proxies do."""

    def score(self, view: View) -> Floats:
        """Return the requests sent and not ended."""
        return view.column("num_open")


class PowerOfTwo(_Scored):
    """The shorter queue of two at random, as Ray Serve does by default.

    Source: Mitzenmacher, The Power of Two Choices in Randomized Load Balancing (2001).
    """

    def score(self, view: View) -> Floats:
        """Return the length of the queue for two replicas, infinity for the others."""
        scores = np.full(len(view), np.inf)
        chosen = self._rng.sample(range(len(view)), min(2, len(view)))
        scores[chosen] = view.num_requests[chosen]
        return scores


class LeastTokens(_Scored):
    """The fewest prompt tokens queued; what is cached counts as if it were not."""

    def score(self, view: View) -> Floats:
        """Return the tokens queued."""
        return view.column("queued_tokens") + view.column("sent_tokens")


class Prefix(_Scored):
    """The fewest prompt tokens to compute, queued ones and the uncached part of this prompt."""

    def score(self, view: View) -> Floats:
        """Return the tokens until this prompt is computed."""
        queued = view.column("queued_tokens") + view.column("sent_tokens")
        return queued + view.uncached_tokens


class SessionHash(_Scored):
    """One replica per session, or per beginning of the prompt where there is no session.

    Source: Thaler and Ravishankar, rendezvous hashing (1996).
    """

    _NUM_BLOCKS = 2  # of the prompt that stand for a session

    def score(self, view: View) -> Floats:
        """Return a hash of session and replica."""
        head = view.leading_keys(self._NUM_BLOCKS)
        # Prompts shorter than a block have no beginning: they go anywhere, not all to one place.
        beginning = repr(list(head)) if head else view.request.request_id
        key = (view.request.session or beginning).encode()
        return np.array(
            [
                int.from_bytes(blake2b(key + view.replica_id(at).encode(), digest_size=6).digest())
                for at in range(len(view))
            ],
            float,
        )


class PrefixApprox(_Scored):
    """Where this gateway last sent the longest prefix, unless that replica has far more requests.

    It knows of no eviction, no other gateway and no queue of tokens. Source: the cache-aware policy
    of SGLang's router (its defaults: half of the prompt has to match; a replica is out of balance
    with 32 requests more than, and twice as many as, the least busy one).
    """

    MAX_BLOCKS = 2**18  # remembered, the least recently routed ones are forgotten
    _MIN_MATCH = 0.5
    _MAX_MORE, _MAX_TIMES = 32, 2.0

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self._replicas_of: OrderedDict[int, dict[str, None]] = OrderedDict()

    def score(self, view: View) -> Floats:
        """Return the requests, less the match where it counts."""
        requests = view.column("num_open")
        least, most = float(requests.min()), float(requests.max())
        if most - least > self._MAX_MORE and most > self._MAX_TIMES * least:
            return requests
        keys = view.leading_keys(None)
        matched = {view.replica_id(at): 0 for at in range(len(view))}
        for depth, key in enumerate(keys, start=1):
            holders = self._replicas_of.get(key)
            if holders is None:
                break
            for replica_id in holders:
                if matched.get(replica_id) == depth - 1:
                    matched[replica_id] = depth
        shares = np.array([matched[view.replica_id(at)] for at in range(len(view))]) / max(
            1, len(keys)
        )
        if shares.max() < self._MIN_MATCH:
            return requests
        return requests - 1e6 * shares

    def on_pick(self, view: View, at: int) -> None:
        """Remember the prompt's blocks there."""
        replica_id = view.replica_id(at)
        for key in view.leading_keys(None):
            self._replicas_of.setdefault(key, {})[replica_id] = None
            self._replicas_of.move_to_end(key)
        while len(self._replicas_of) > self.MAX_BLOCKS:
            self._replicas_of.popitem(last=False)


def make_policy(config: RouterConfig, rng: random.Random) -> Policy:
    """Return the policy that the configuration names."""
    if config.policy == "slo":
        return SloPolicy(config, rng)
    policies: dict[str, Callable[[random.Random], Policy]] = {
        "prefix": Prefix,
        "prefix_approx": PrefixApprox,
        "least_tokens": LeastTokens,
        "least_requests": LeastRequests,
        "power_of_two": PowerOfTwo,
        "round_robin": RoundRobin,
        "session_hash": SessionHash,
        "random": Random,
    }
    return policies[config.policy](rng)
