"""The global scheduler: filter, score, pick. Pure, over pushed state; microseconds, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.config import RouterConfig
from cluster.router.prefix_index import PrefixIndex
from cluster.types import ReplicaSnapshot


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica that could take the request."""

    replica_id: str
    score: float  # work before and of the request, in prompt tokens; less is better
    num_cached_blocks: int  # of the prompt, at this replica
    num_uncached_tokens: int  # of the prompt, to be computed by this replica, >= 1
    num_inflight: int  # requests sent there that its load report may not contain


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a request goes, and all that was weighed."""

    candidates: tuple[Candidate, ...]  # at least one; the chosen one first, then the next best

    @property
    def chosen(self) -> Candidate:
        """The replica that gets the request."""
        return self.candidates[0]

    @property
    def replica_id(self) -> str:
        """Id of the replica that gets the request."""
        return self.candidates[0].replica_id

    @property
    def num_cached_blocks(self) -> int:
        """Blocks of the prompt that the chosen replica holds."""
        return self.candidates[0].num_cached_blocks


class Router:
    """Picks replicas by one of the policies of `RouterConfig`.

    The score of a replica is the work that it would have, in prompt tokens: the uncached part of
    this prompt (all of it under `least_tokens`), the prompts queued there, and its running and
    waiting sequences at the configured weights. `round_robin` takes turns in the order of ids.
    """

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self._last_id = ""  # of round_robin

    def pick(
        self,
        keys: Sequence[int],
        num_prompt_tokens: int,
        replicas: Sequence[ReplicaSnapshot],
        index: PrefixIndex,
    ) -> Decision | None:
        """Choose a replica; None if none can take requests.

        Args:
            keys: Router keys of the prompt's full blocks; the replicas share one fingerprint and
                block size, which these follow from.
            num_prompt_tokens: Length of the prompt, tokens.
            replicas: Those that are connected and serve the model; draining ones are passed over.
            index: Cached blocks of the replicas.
        """
        candidates = [
            self._candidate(replica, keys, num_prompt_tokens, index)
            for replica in replicas
            if not replica.load.is_draining
        ]
        if not candidates:
            return None
        if self._config.policy == "round_robin":
            candidates.sort(key=lambda c: (c.replica_id <= self._last_id, c.replica_id))
            self._last_id = candidates[0].replica_id
        else:
            candidates.sort(key=lambda c: (c.score, c.num_inflight, c.replica_id))
        return Decision(tuple(candidates))

    def _candidate(
        self,
        replica: ReplicaSnapshot,
        keys: Sequence[int],
        num_prompt_tokens: int,
        index: PrefixIndex,
    ) -> Candidate:
        info, load = replica.info, replica.load
        num_cached_blocks = index.longest_prefix(info.replica_id, keys)
        # The last token is always computed: its logits are what the first answer token comes from.
        num_uncached = max(1, num_prompt_tokens - num_cached_blocks * info.block_size)
        own = num_uncached if self._config.policy == "prefix" else num_prompt_tokens
        score = (
            own
            + load.num_queued_prefill_tokens
            + replica.num_inflight_prefill_tokens
            + self._config.running_cost_tokens * load.num_running
            + self._config.waiting_cost_tokens * (load.num_waiting + replica.num_inflight)
        )
        return Candidate(
            info.replica_id, score, num_cached_blocks, num_uncached, replica.num_inflight
        )
