"""What a busy cluster's router knows: caches that share documents, loads, prompts that go on.

    document heads      ┌── own blocks of a conversation       one chain of a replica's cache
    ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ □ □ □ □ □ □ □ □ □ □ □ □ □ □ □ □
    └── the same in other chains and other replicas

A prompt follows a chain of some replica up to some block, then is new.
"""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass
from typing import TypeAlias

from cluster.types import MAX_DUE_WORKS, DueWork, ReplicaInfo, ReplicaLoad, StepCost

BLOCK_SIZE = 16
FINGERPRINT = "07" * 16

_NUM_DOCUMENTS = 256
_SPARE_BLOCKS = 1024
_COST = StepCost(
    floor_s=0.006,
    token_s=2e-5,
    hinges=((64, 1e-5), (256, 4e-5)),
    sequence_s=2e-5,
    context_s=2e-8,
    prompt_work_s=1e-9,
    num_steps=10_000,
)

Keys: TypeAlias = "array[int]"
"""Router keys, 8 bytes each."""


@dataclass(frozen=True, slots=True)
class Content:
    """The caches of all replicas."""

    caches: list[Keys]  # of each replica: chains of `chain_blocks`, one after the other
    chain_blocks: int

    def prompt(self, rng: random.Random) -> list[int]:
        """Return the keys of a prompt of `chain_blocks` blocks."""
        cache = rng.choice(self.caches)
        start = rng.randrange(len(cache) // self.chain_blocks) * self.chain_blocks
        known = rng.randrange(self.chain_blocks + 1)
        return [*cache[start : start + known], *new_keys(rng, self.chain_blocks - known)]


def make_content(
    num_replicas: int, num_blocks: int, chain_blocks: int, rng: random.Random
) -> Content:
    """Return caches with so many blocks all together, at least a chain for each replica.

    Args:
        num_replicas: That share the documents.
        num_blocks: The same block on two replicas counts twice.
        chain_blocks: Of each chain; its document is a third of it on average.
        rng: Of keys and lengths.
    """
    documents = [new_keys(rng, chain_blocks) for _ in range(_NUM_DOCUMENTS)]
    caches = []
    for _ in range(num_replicas):
        cache = array("Q")
        for _ in range(max(1, num_blocks // num_replicas // chain_blocks)):
            shared = rng.randrange(2 * chain_blocks // 3 + 1)
            cache.extend(rng.choice(documents)[:shared])
            cache.extend(new_keys(rng, chain_blocks - shared))
        caches.append(cache)
    return Content(caches, chain_blocks)


def new_keys(rng: random.Random, num_keys: int) -> Keys:
    """Return keys that no block has yet."""
    return array("Q", rng.randbytes(8 * num_keys))


def make_info(index: int) -> ReplicaInfo:
    """Return who a replica is; all serve one model."""
    return ReplicaInfo(
        replica_id=f"replica-{index:04}",
        address="",
        model="benchmark",
        fingerprint=FINGERPRINT,
        tp=1,
        pp=1,
        block_size=BLOCK_SIZE,
        max_model_len=2**17,
    )


def make_load(num_blocks: int, rng: random.Random) -> ReplicaLoad:
    """Return a report of a replica that is busy, with all that a report can have.

    Args:
        num_blocks: That it has cached; it has room for more.
        rng: Of all figures.
    """
    due = sorted(rng.uniform(-0.2, 2.0) for _ in range(MAX_DUE_WORKS))
    return ReplicaLoad(
        num_running=rng.randrange(8, 48),
        num_waiting=rng.randrange(4),
        num_queued_prefill_tokens=rng.randrange(4000),
        num_free_blocks=num_blocks // 2 + _SPARE_BLOCKS,
        num_blocks=num_blocks + _SPARE_BLOCKS,
        step_cost=_COST.scaled(rng.uniform(0.8, 1.25)),
        due=tuple([DueWork(due_s, rng.uniform(0.0, 0.01)) for due_s in due]),
        late_s=rng.uniform(0.0, 0.1),
        prefill_token_s=5e-5,
        decode_step_s=0.02,
        fetch_block_s=2e-4,
    )
