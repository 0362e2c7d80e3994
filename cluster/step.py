"""The contract between an engine and its workers: what one step computes, in plain numbers.

A plan is complete in itself. Workers keep nothing between steps but weights and the KV cache, so a
preempted, resumed or migrated sequence needs no word to them.

    tokens of a sequence   |<-- num_computed -->|<-- token_ids -->|
    blocks                 |  b0  |  b1  |  b2  |  b3  |            block_table = [b0, b1, b2, b3]

Before it computes, a worker moves blocks between its KV cache and its host tier, offloads first:

    block of the KV cache ──offload──► slot of the host tier ──restore──► block of the KV cache

Between processes a plan travels as msgpack: data, never code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgpack

from cluster.types import SampledToken, TokenLogprob


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """Everything that choosing one token needs besides its logits.

    Fields mean what they mean in `types.SamplingParams`.
    """

    seed: int  # unsigned 64 bit
    position: int  # index in its sequence of the token to be chosen
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    num_logprobs: int
    banned_token_ids: tuple[int, ...] = ()  # may not be chosen (stops, before min_tokens)
    prompt_token_ids: tuple[int, ...] = ()  # only where a penalty is set
    output_token_ids: tuple[int, ...] = ()  # only where a penalty is set


@dataclass(frozen=True, slots=True)
class SequenceStep:
    """The part of a step that belongs to one sequence."""

    seq_id: int
    token_ids: tuple[int, ...]  # to compute now, at positions num_computed_tokens...
    num_computed_tokens: int  # already in the KV cache
    block_table: tuple[int, ...]  # covers num_computed_tokens + len(token_ids)
    sample: SampleSpec | None  # None: a chunk of a prompt whose end is not reached


@dataclass(frozen=True, slots=True)
class BlockMoves:
    """Blocks copied between KV cache and host tier: all offloads, then all restores."""

    offloads: tuple[tuple[int, int], ...] = ()  # (block, slot): the slot gets the block's bytes
    restores: tuple[tuple[int, int], ...] = ()  # (slot, block): the block gets the slot's bytes

    def __bool__(self) -> bool:
        return bool(self.offloads or self.restores)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass over the tokens of several sequences; without any it only moves blocks."""

    step_id: int
    sequences: tuple[SequenceStep, ...]
    moves: BlockMoves = BlockMoves()  # before the sequences

    @property
    def num_tokens(self) -> int:
        """Tokens that this step computes."""
        return sum(len(s.token_ids) for s in self.sequences)

    def encode(self) -> bytes:
        """Return the plan as msgpack."""
        rows = [
            (s.seq_id, s.token_ids, s.num_computed_tokens, s.block_table, _sample_row(s.sample))
            for s in self.sequences
        ]
        moves = (self.moves.offloads, self.moves.restores)
        return bytes(msgpack.packb((self.step_id, rows, moves)))

    @staticmethod
    def decode(data: bytes) -> StepPlan:
        """Return the plan that `encode` wrote."""
        step_id, rows, moves = msgpack.unpackb(data, use_list=False)
        return StepPlan(
            step_id,
            tuple(
                SequenceStep(
                    row[0], row[1], row[2], row[3], SampleSpec(*row[4]) if row[4] else None
                )
                for row in rows
            ),
            BlockMoves(*moves),
        )


def _sample_row(spec: SampleSpec | None) -> tuple[Any, ...] | None:
    if spec is None:
        return None
    return tuple(getattr(spec, name) for name in SampleSpec.__slots__)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the last stage chose: one token per sequence whose plan had a `sample`."""

    step_id: int
    tokens: dict[int, SampledToken]  # seq_id -> token
    elapsed_s: float = 0.0  # from the first stage's start to the last one's end

    def encode(self) -> bytes:
        """Return the result as msgpack."""
        rows = [
            (seq_id, t.token_id, t.logprob, [(x.token_id, x.logprob) for x in t.top])
            for seq_id, t in self.tokens.items()
        ]
        return bytes(msgpack.packb((self.step_id, rows, self.elapsed_s)))

    @staticmethod
    def decode(data: bytes) -> StepResult:
        """Return the result that `encode` wrote."""
        step_id, rows, elapsed_s = msgpack.unpackb(data, use_list=False)
        tokens = {
            seq_id: SampledToken(token_id, logprob, tuple(TokenLogprob(*x) for x in top))
            for seq_id, token_id, logprob, top in rows
        }
        return StepResult(step_id, tokens, elapsed_s)
