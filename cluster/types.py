"""What moves between the layers: requests, sampling, tokens, the state of a replica.

Plain, frozen data; validated where it enters (gateway/validation.py), asserted here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a request ended well."""

    STOP = "stop"  # a stop string, a stop token, or the model's end-of-text token
    LENGTH = "length"  # max_tokens, or the model's context is full
    CANCELLED = "cancelled"  # the client or the gateway asked for it
    MOVED = "moved"  # its replica hands it over: another one goes on with it


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen from the logits.

    Order of application: penalties, banned tokens, temperature, top-k, top-p, min-p.
    """

    max_tokens: int = 128  # tokens to generate at the most, >= 1
    min_tokens: int = 0  # before this many no stop condition holds
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # keep the k likeliest; 0 keeps all
    top_p: float = 1.0  # keep the smallest set with this probability, (0, 1]
    min_p: float = 0.0  # keep tokens with at least min_p x the likeliest's probability
    repetition_penalty: float = 1.0  # > 1 divides (multiplies negative) logits of seen tokens
    presence_penalty: float = 0.0  # subtracted once from tokens of the output, [-2, 2]
    frequency_penalty: float = 0.0  # subtracted per occurrence in the output, [-2, 2]
    seed: int = 0  # with the position it fixes the random number of a token
    stop: tuple[str, ...] = ()  # the text ends before the first of these
    stop_token_ids: tuple[int, ...] = ()  # generation ends at one of these
    ignore_eos: bool = False  # the model's end-of-text token does not stop
    num_logprobs: int = -1  # -1 none, 0 of the chosen token, n also the n likeliest

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens seen so far change the logits."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


class ServiceClass(StrEnum):
    """Who waits for an answer: decides the share that is guaranteed under too much work."""

    INTERACTIVE = "interactive"  # somebody watches it appear
    STANDARD = "standard"  # somebody waits for it
    BATCH = "batch"  # nobody waits: it fills what is left, and makes room for the others


@dataclass(frozen=True, slots=True)
class SLO:
    """The latency that a request should see: what its place in queues and batches follows from."""

    ttft_s: float | None = None  # seconds to the first token; None is no objective
    tpot_s: float | None = None  # seconds per further token; None is no objective


NO_SLO = SLO()
"""Without an objective."""


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One request as an engine gets it: token ids, no text."""

    request_id: str  # unique in the cluster
    prompt_token_ids: tuple[int, ...]  # at least one
    sampling: SamplingParams
    salt: bytes = b""  # of the tenant, from the authenticated identity: isolates cached blocks
    deadline_s: float | None = None  # seconds left when the engine receives it; None is no bound
    slo: SLO = NO_SLO  # what its latency should be
    pins_prefix: bool = False  # its prompt is a registered prefix: stored at once, and kept
    service_class: ServiceClass = ServiceClass.STANDARD
    tenant: str = ""  # of the authenticated identity: who shares a fair share
    tenant_weight: float = 1.0  # of its fair share, > 0
    # Of its answer, generated before, maybe elsewhere: it goes on behind them. Limits, penalties
    # and positions count them, as if they had been generated here.
    output_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and the logarithm of its probability before temperature and filters."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What one sequence got from one step."""

    token_id: int
    logprob: float | None = None  # of the chosen token, if asked for
    top: tuple[TokenLogprob, ...] = ()  # the likeliest, best first, if asked for


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """New tokens of one request, and its end if it ended.

    A request's outputs arrive in order; exactly one has `finish_reason` or `error` set, the last.
    """

    request_id: str
    tokens: tuple[SampledToken, ...] = ()
    num_cached_tokens: int = 0  # of the prompt, taken from the prefix cache
    finish_reason: FinishReason | None = None
    error: str | None = None  # "CODE: message" where the request failed
    queued_s: float = 0.0  # from arrival to the first step, set on the last output


@dataclass(frozen=True, slots=True)
class StepShape:
    """What the time of a step depends on."""

    num_tokens: int = 0  # computed, of prompts and decodes
    num_sequences: int = 0
    context_tokens: int = 0  # in the KV cache, read by decodes
    prompt_work: float = 0.0  # tokens x context read, summed over the prompt chunks

    def with_decode(self, num_computed_tokens: int) -> StepShape:
        """Return the shape with one more decoding sequence."""
        return StepShape(
            self.num_tokens + 1,
            self.num_sequences + 1,
            self.context_tokens + num_computed_tokens,
            self.prompt_work,
        )

    def with_chunk(self, num_tokens: int, num_computed_tokens: int) -> StepShape:
        """Return the shape with one more chunk of a prompt, read from the middle of it on average.

        Args:
            num_tokens: Of the chunk.
            num_computed_tokens: Of its prompt, in the KV cache.
        """
        return StepShape(
            self.num_tokens + num_tokens,
            self.num_sequences + 1,
            self.context_tokens,
            self.prompt_work + num_tokens * (num_computed_tokens + num_tokens / 2),
        )


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of a step on one replica, as fitted to its measured steps.

    Convex and never falling in the tokens: below some number of tokens a step waits for the
    weights' bytes, above it for arithmetic.
    """

    floor_s: float  # of any step
    token_s: float  # per token
    hinges: tuple[tuple[int, float], ...]  # (tokens, seconds more for each token beyond them)
    sequence_s: float  # per sequence
    context_s: float  # per token of context that decodes read
    prompt_work_s: float  # per token x context of prompt chunks
    num_steps: int = 0  # measured, that it rests on

    def seconds(self, shape: StepShape) -> float:
        """Return how long a step takes."""
        num_tokens = shape.num_tokens
        total_s = (
            self.floor_s
            + self.token_s * num_tokens
            + self.sequence_s * shape.num_sequences
            + self.context_s * shape.context_tokens
            + self.prompt_work_s * shape.prompt_work
        )
        for tokens, more_s in self.hinges:
            if num_tokens <= tokens:
                break
            total_s += more_s * (num_tokens - tokens)
        return total_s

    def scaled(self, factor: float) -> StepCost:
        """Return the cost on a machine that needs `factor` times as long."""
        return StepCost(
            factor * self.floor_s,
            factor * self.token_s,
            tuple((tokens, factor * more_s) for tokens, more_s in self.hinges),
            factor * self.sequence_s,
            factor * self.context_s,
            factor * self.prompt_work_s,
            self.num_steps,
        )


class StoreState(StrEnum):
    """How the store of KV blocks does, as one replica sees it."""

    EXACT = "exact"  # reads and writes are answered in time
    DEGRADED = "degraded"  # writes fail, or it is being tried whether reads work again
    OFF = "off"  # nothing is read, or there is none


@dataclass(frozen=True, slots=True)
class CacheLoad:
    """The tiers of one replica's KV cache; counters are since start."""

    store_state: StoreState = StoreState.OFF
    num_host_slots: int = 0
    num_host_blocks: int = 0  # slots in use
    num_host_hit_tokens: int = 0  # prompt tokens that came from the host tier
    num_store_hit_tokens: int = 0  # likewise from the store
    num_device_evictions: int = 0  # blocks
    num_host_evictions: int = 0  # blocks
    num_stored_blocks: int = 0  # written to the store
    num_fetched_blocks: int = 0  # read from it
    stored_bytes: int = 0
    fetched_bytes: int = 0
    num_rejected: int = 0  # writes dropped because too many were on their way
    num_late: int = 0  # requests that went on without what they had waited for
    num_failed: int = 0  # operations that the store did not answer well
    num_corrupt: int = 0  # blocks that did not verify
    saved_s: float = 0.0  # prefill that hits in host tier and store made needless, predicted


MAX_DUE_WORKS = 16
"""In one load report: what is due at nearly one time is added up."""


@dataclass(frozen=True, slots=True)
class DueWork:
    """Prompts whose first tokens are due at about one time."""

    due_s: float  # seconds from the report until then; negative is over already
    work_s: float  # predicted seconds of prefill, >= 0


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """What a leader pushes about itself, many times a second."""

    num_running: int = 0  # sequences that hold blocks
    num_waiting: int = 0  # sequences that wait for blocks or for a place in the batch
    num_queued_prefill_tokens: int = 0  # prompt tokens not computed yet, running or waiting
    num_free_blocks: int = 0  # free or evictable KV blocks
    num_blocks: int = 0
    num_prefix_query_tokens: int = 0  # since start: prompt tokens looked up
    num_prefix_hit_tokens: int = 0  # since start: of these, found in the cache
    num_generated_tokens: int = 0  # since start
    is_draining: bool = False  # takes no new requests
    step_cost: StepCost | None = None  # None until a step was measured
    cache: CacheLoad = CacheLoad()
    # Prompts that can still meet their objective, soonest first, at most MAX_DUE_WORKS.
    due: tuple[DueWork, ...] = ()
    late_s: float = 0.0  # seconds of prefill of all others: without an objective, or too late
    prefill_token_s: float = 0.0  # seconds per prompt token beside the present batch; 0: unknown
    decode_step_s: float = 0.0  # seconds of a step of the present batch alone; 0: unknown
    fetch_block_s: float = 0.0  # seconds per block read from the store; 0: nothing can be read


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """Who a replica group is: registered through a lease, constant for its life."""

    replica_id: str  # new after every restart
    address: str  # host:port of the leader's internal gRPC service
    model: str  # name that clients ask for
    fingerprint: str  # of weights, dtype and layout, hex: seeds the block hashes
    tp: int
    pp: int
    block_size: int  # tokens per KV block
    max_model_len: int  # tokens, prompt and answer together
    pid: int = 0  # of the leader
    node_id: str = ""


@dataclass(frozen=True, slots=True)
class ReplicaSnapshot:
    """What the router knows of one replica at the moment of a decision."""

    info: ReplicaInfo
    load: ReplicaLoad = field(default_factory=ReplicaLoad)
    num_inflight: int = 0  # sent by this gateway and not in `load` yet
    num_inflight_prefill_tokens: int = 0  # likewise, uncached prompt tokens
