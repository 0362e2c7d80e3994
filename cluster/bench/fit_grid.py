"""Which shapes of steps are measured for a fit, within the limits of an engine.

prompts   a chunk of 8, 16, 32, ... tokens after a cached context: none, short, ..., long
decodes   as many streams as there may be, each with blocks of its own, that end by halves:
          some steps with 64 of them, some with 32, ..., some with one; at each context
mixed     between these, prompts of several sizes beside the streams
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cluster.errors import ConfigError

MAX_SEQUENCE_TOKENS = 8192
"""Of a prompt and its answer: a step's time is linear in its contexts, longer ones follow."""

MAX_CONTEXT_TOKENS = 16384
"""Of all streams together: computing their prompts is most of the work."""

_MIN_CHUNK_TOKENS = 8
_MIN_CONTEXT_TOKENS = 32

_STEPS_TO_BEGIN = 8  # in which all streams get their first token, their prompts being cached

DECODES_PER_BATCH = 4
"""Steps without prompts at each size of a batch."""


@dataclass(frozen=True, slots=True)
class FitGrid:
    """Which shapes are asked for."""

    contexts: tuple[int, ...]  # tokens of a stream's prompt, or cached before a chunk; ascending
    chunks: tuple[int, ...]  # tokens of a prompt that are computed; ascending
    batches: tuple[int, ...]  # streams at once; descending to 1
    block_size: int  # tokens per KV block

    @property
    def mixed_chunks(self) -> tuple[int, ...]:
        """Those of the prompts beside streams."""
        return self.chunks[::3]

    @property
    def num_points(self) -> int:
        """A chunk after a context or without one, and a batch at a context, are a point each."""
        num_prompts = len(self.chunks) * (len(self.contexts) + 1)
        return num_prompts + len(self.contexts) * len(self.batches)

    @property
    def stream_tokens(self) -> int:
        """Tokens that a stream generates at the most."""
        # A prompt beside the streams takes two steps where it does not fit into the first.
        per_batch = DECODES_PER_BATCH + 2 * len(self.mixed_chunks)
        return len(self.batches) * per_batch + _STEPS_TO_BEGIN


def make_grid(
    *, max_sequence_tokens: int, max_step_tokens: int, max_num_seqs: int, block_size: int
) -> FitGrid:
    """Return the grid for an engine's limits.

    Args:
        max_sequence_tokens: Of a prompt and its answer.
        max_step_tokens: Of a step.
        max_num_seqs: Of a step.
        block_size: Tokens; contexts are whole blocks, so that they can be cached.

    Raises:
        ConfigError: Sequences are too short for the streams' answers.
    """
    max_tokens = min(max_sequence_tokens, MAX_SEQUENCE_TOKENS)
    chunks = tuple(_doubling(_MIN_CHUNK_TOKENS, min(max_step_tokens, max_tokens // 2)))
    batches = tuple(reversed(list(_doubling(1, max_num_seqs))))
    grid = FitGrid((), chunks, batches, block_size)
    num_after = max(grid.stream_tokens, chunks[-1] + 1)
    longest = max_tokens - num_after
    wanted = (_MIN_CONTEXT_TOKENS, longest // 8, longest // 3, longest)
    contexts = {t // block_size * block_size for t in wanted if block_size <= t <= longest}
    if not contexts:
        raise ConfigError(
            f"sequences of up to {max_sequence_tokens} tokens (the model's context, and its KV "
            f"blocks), at least {num_after + block_size} are needed: allow more, or lower "
            "engine.max_num_seqs",
            field="fit",
        )
    return FitGrid(tuple(sorted(contexts)), chunks, batches, block_size)


def _doubling(first: int, last: int) -> Iterator[int]:
    while first < last:
        yield first
        first *= 2
    yield last
