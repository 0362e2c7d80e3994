"""One request on its way through the engine.

    tokens   |<-------- prompt -------->|<-- output -->|
             |<-- num_computed_tokens -->|<-- to do -->|
    blocks   |  b0  |  b1  |  b2  |  b3  |  b4  |

A step lets `num_computed_tokens` catch up with `num_tokens`. Where it does, the next token is
chosen and the sequence is one token behind again. A long prompt, a cached prefix, a preempted
sequence that starts anew, an answer that was begun elsewhere: they differ in how far it is behind,
and in nothing else.

    WAITING ──admitted──► RUNNING ──last token, abort, deadline──► FINISHED
       ▲                     │
       └─────preempted───────┘
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING

from cluster.errors import InvalidArgumentError
from cluster.kvstore.block_hash import child_hash, root_hash
from cluster.step import SampleSpec, SequenceStep
from cluster.types import EngineRequest, FinishReason

if TYPE_CHECKING:
    from cluster.engine.store_tier import Fetch


class SequenceState(Enum):
    """Where a sequence stands."""

    WAITING = auto()  # holds no blocks
    RUNNING = auto()  # holds the blocks of all its tokens so far
    FINISHED = auto()  # holds blocks only while its last step is in flight


@dataclass(frozen=True, slots=True)
class ModelTraits:
    """What an engine has to know of the model that it serves."""

    block_size: int  # tokens per KV block
    max_model_len: int  # tokens, prompt and output together
    vocab_size: int  # token ids are below
    eos_token_ids: frozenset[int]  # the model's end-of-text tokens
    fingerprint: bytes  # seeds the block hashes


class Sequence:
    """A request's tokens, how far they are computed, and the blocks that hold them.

    Args:
        seq_id: Unique in the engine, ascending with arrival.
        request: As `check_request` passed it.
        traits: Of the model.
        arrived_s: When it arrived, by the engine's clock.
    """

    __slots__ = (
        "_block_hashes",
        "_block_size",
        "_root_hash",
        "_stop_token_ids",
        "admitted_s",
        "arrived_s",
        "block_table",
        "catches_up",
        "expires_s",
        "fetch",
        "first_token_s",
        "held_since_s",
        "in_flight",
        "is_first_run",
        "max_num_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_expected_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "num_registered_blocks",
        "request",
        "seq_id",
        "state",
        "token_ids",
    )

    def __init__(
        self, seq_id: int, request: EngineRequest, traits: ModelTraits, arrived_s: float
    ) -> None:
        sampling = request.sampling
        self.seq_id = seq_id
        self.request = request
        self.state = SequenceState.WAITING
        self.is_first_run = True  # it was never preempted
        self.in_flight = False  # part of a step that is submitted and not collected

        # Prompt, then output, that of another replica included.
        self.token_ids = [*request.prompt_token_ids, *request.output_token_ids]
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.max_num_tokens = max_num_tokens(request, traits)  # ends at this many
        self.num_computed_tokens = 0  # in the KV cache
        self.num_expected_tokens = 0  # that need not be computed, when it was last looked up
        self.num_preemptions = 0
        self.num_cached_tokens = 0  # of the prompt, found in the prefix cache when first admitted
        # A tuple, because every plan carries it: it is rebuilt once per block, not once per step.
        self.block_table: tuple[int, ...] = ()
        self.num_registered_blocks = 0  # the first ones of the table are in the prefix cache
        self.catches_up = False  # blocks of its prompt may come from tiers below the KV cache
        self.fetch: Fetch | None = None  # what was asked of the store for it
        self.held_since_s: float | None = None  # it computes nothing because blocks are to come

        self.arrived_s = arrived_s  # seconds by the engine's clock, like the next three
        self.admitted_s: float | None = None  # first time
        self.first_token_s: float | None = None  # when the first one of this engine was chosen
        self.expires_s = math.inf if request.deadline_s is None else arrived_s + request.deadline_s

        eos = () if sampling.ignore_eos else tuple(sorted(traits.eos_token_ids))
        self._stop_token_ids = tuple(dict.fromkeys(eos + sampling.stop_token_ids))
        self._block_size = traits.block_size
        self._root_hash = root_hash(traits.fingerprint, request.salt)
        self._block_hashes: list[bytes] = []

    @property
    def tenant(self) -> str:
        """Who shares a fair share."""
        return self.request.tenant

    @property
    def tenant_weight(self) -> float:
        """Of this share."""
        return self.request.tenant_weight

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output so far."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_chosen_tokens(self) -> int:
        """Tokens generated so far by this engine."""
        return self.num_output_tokens - len(self.request.output_token_ids)

    @property
    def num_remaining_tokens(self) -> int:
        """Tokens to compute before the next one can be chosen, >= 1."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether only the token that was chosen last is to be computed."""
        return (
            len(self.token_ids) == self.num_computed_tokens + 1
            and len(self.token_ids) > self.num_prompt_tokens
        )

    @property
    def num_matchable_blocks(self) -> int:
        """Full blocks that need not be computed: the last token is, its logits choose the next."""
        return (len(self.token_ids) - 1) // self._block_size

    def block_hash(self, index: int) -> bytes:
        """Return the hash of block `index`, all of whose tokens are known."""
        size = self._block_size
        while len(self._block_hashes) <= index:
            start = len(self._block_hashes) * size
            tokens = self.token_ids[start : start + size]
            assert len(tokens) == size, f"block {index} is not full"
            parent = self._block_hashes[-1] if self._block_hashes else self._root_hash
            self._block_hashes.append(child_hash(parent, tokens))
        return self._block_hashes[index]

    def append(self, token_id: int) -> FinishReason | None:
        """Add a generated token; return why it is the last one, or None if it is not."""
        self.token_ids.append(token_id)
        return self.finish_reason()

    def finish_reason(self) -> FinishReason | None:
        """Return why the last token of the output ends it, or None if it does not."""
        num_output_tokens = self.num_output_tokens
        if num_output_tokens > self.request.sampling.min_tokens and (
            self.token_ids[-1] in self._stop_token_ids
        ):
            return FinishReason.STOP
        if self.num_tokens >= self.max_num_tokens:
            return FinishReason.LENGTH
        return None

    def plan(self, num_tokens: int) -> SequenceStep:
        """Return the step that computes the next `num_tokens` tokens."""
        start, end = self.num_computed_tokens, self.num_computed_tokens + num_tokens
        return SequenceStep(
            self.seq_id,
            tuple(self.token_ids[start:end]),
            start,
            self.block_table,
            self._sample_spec() if end == len(self.token_ids) else None,
        )

    def _sample_spec(self) -> SampleSpec:
        sampling = self.request.sampling
        must_go_on = self.num_output_tokens < sampling.min_tokens
        penalized = sampling.has_penalties
        # By position: this runs for every sequence of every step, and keywords cost a third more.
        return SampleSpec(
            sampling.seed,
            len(self.token_ids),
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
            sampling.min_p,
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
            sampling.num_logprobs,
            self._stop_token_ids if must_go_on else (),
            self.request.prompt_token_ids if penalized else (),
            tuple(self.token_ids[self.num_prompt_tokens :]) if penalized else (),
        )


def max_num_tokens(request: EngineRequest, traits: ModelTraits) -> int:
    """Return how many tokens prompt and output have together at the most."""
    wanted = len(request.prompt_token_ids) + request.sampling.max_tokens
    return min(wanted, traits.max_model_len)


def check_request(request: EngineRequest, traits: ModelTraits, num_blocks: int) -> None:
    """Refuse what the model or its KV cache could never finish.

    Args:
        request: Anything.
        traits: Of the model.
        num_blocks: KV blocks in all.

    Raises:
        InvalidArgumentError: A value is out of range; `field` names it.
    """
    num_prompt_tokens, sampling = len(request.prompt_token_ids), request.sampling
    if num_prompt_tokens == 0:
        raise InvalidArgumentError("the prompt is empty: give at least one token", field="prompt")
    if num_prompt_tokens >= traits.max_model_len:
        raise InvalidArgumentError(
            f"prompt of {num_prompt_tokens} tokens, limit={traits.max_model_len - 1} "
            "(one is left for the answer): shorten it",
            field="prompt",
        )
    if sampling.max_tokens < 1:
        raise InvalidArgumentError(
            f"max_tokens={sampling.max_tokens}, at least 1: ask for a token",
            field="sampling.max_tokens",
        )
    num_given = len(request.output_token_ids)
    if num_given > max_num_tokens(request, traits) - num_prompt_tokens:
        raise InvalidArgumentError(
            f"{num_given} tokens of the answer are there already, "
            f"limit={max_num_tokens(request, traits) - num_prompt_tokens}: it has ended before",
            field="output_token_ids",
        )
    _check_token_ids(request.prompt_token_ids, traits.vocab_size, "prompt")
    _check_token_ids(request.output_token_ids, traits.vocab_size, "output_token_ids")
    _check_token_ids(sampling.stop_token_ids, traits.vocab_size, "sampling.stop_token_ids")
    num_stops = len(traits.eos_token_ids.union(sampling.stop_token_ids))
    if sampling.min_tokens > 0 and num_stops >= traits.vocab_size:
        raise InvalidArgumentError(
            f"min_tokens={sampling.min_tokens} with {num_stops} stop tokens, the whole vocabulary: "
            "no token could be chosen, name fewer",
            field="sampling.stop_token_ids",
        )
    # The last token is chosen, but never computed: it needs no place in the cache.
    num_needed = -(-(max_num_tokens(request, traits) - 1) // traits.block_size)
    if num_needed > num_blocks:
        raise InvalidArgumentError(
            f"prompt of {num_prompt_tokens} tokens with max_tokens={sampling.max_tokens} needs "
            f"{num_needed} KV blocks of {traits.block_size} tokens, limit={num_blocks}: "
            "ask for fewer tokens",
            field="sampling.max_tokens",
        )


def _check_token_ids(token_ids: tuple[int, ...], vocab_size: int, field: str) -> None:
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocab_size):
        wrong = next(token for token in token_ids if not 0 <= token < vocab_size)
        raise InvalidArgumentError(
            f"token id {wrong}, limit={vocab_size - 1}: tokenize with the model's own tokenizer",
            field=field,
        )
