"""The public API in plain Python: what clients say, and what they are told.

Free of gRPC: both clients of `cluster/client.py` build and read their messages here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from cluster.errors import InvalidArgumentError
from cluster.rpc.public_cache import check_text, set_prompt, tiers_from_proto
from cluster.rpc.public_route import Queued, queued_from_proto
from cluster.rpc.sluice.v1 import inference_pb2
from cluster.types import CacheLoad, FinishReason, SamplingParams

_FINISH_REASONS = {
    int(inference_pb2.FINISH_REASON_STOP): FinishReason.STOP,
    int(inference_pb2.FINISH_REASON_LENGTH): FinishReason.LENGTH,
}


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens counted."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # of the prompt, from the prefix cache


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time went, as the gateway saw it, seconds from the request's arrival."""

    queued_s: float  # to the first step of the engine
    ttft_s: float  # to the first token
    total_s: float  # to the last token


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token with its log probability."""

    token_id: int
    text: str
    logprob: float
    top: tuple[ScoredToken, ...] = ()  # the likeliest at its position, best first


@dataclass(frozen=True, slots=True)
class Running:
    """The request was given to a replica."""

    replica_id: str


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What follows the answer so far."""

    text: str  # empty where it is held back
    token_ids: tuple[int, ...]
    logprobs: tuple[ScoredToken, ...] = ()  # one per token, if asked for


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer is complete."""

    finish_reason: FinishReason
    usage: Usage
    timings: Timings


@dataclass(frozen=True, slots=True)
class Resumed:
    """The stream was cut off, and goes on; only for callers who ask to be told."""

    gap_s: float  # from the last event before to the first one behind
    address: str  # of the gateway that goes on
    num_resumptions: int  # of this stream, this one included


Event = Queued | Running | TextDelta | Finished | Resumed


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[ScoredToken, ...]  # one per token, if asked for
    finish_reason: FinishReason
    usage: Usage
    timings: Timings


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that can be asked for."""

    name: str
    max_model_len: int  # tokens, prompt and answer together
    vocab_size: int


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """One replica group, as a gateway sees it."""

    replica_id: str
    state: str  # connecting, ready or draining
    model: str
    tp: int
    pp: int
    num_blocks: int
    num_free_blocks: int
    num_running: int
    num_waiting: int
    num_prefix_query_tokens: int
    num_prefix_hit_tokens: int
    num_generated_tokens: int
    num_indexed_blocks: int
    leader_pid: int
    address: str
    cache: CacheLoad  # below its device


@dataclass(frozen=True, slots=True)
class ClusterState:
    """The cluster, as a gateway sees it."""

    gateway_id: str
    num_queued: int
    num_inflight: int
    replicas: tuple[ReplicaState, ...]  # by id


def generate_request(
    prompt: str | None,
    token_ids: Sequence[int] | None,
    *,
    model: str,
    sampling: SamplingParams | Mapping[str, Any] | None,
    request_id: str,
    prefix: str = "",
) -> inference_pb2.GenerateRequest:
    """Return the message of a request.

    Args:
        prompt: Text, or None.
        token_ids: Ids in its place, or None.
        model: Name; empty is the only one served.
        sampling: All parameters, or some by the names of `SamplingParams`; the server has defaults
            for the others.
        request_id: Empty lets the server choose.
        prefix: Name of a registered prefix that comes before the prompt.

    Raises:
        InvalidArgumentError: The request cannot be written down.
    """
    for field, value in (("request_id", request_id), ("model", model), ("prefix", prefix)):
        check_text(field, value)
    message = inference_pb2.GenerateRequest(
        request_id=request_id,
        model=model,
        sampling=_sampling_message(sampling or {}),
        prefix=prefix,
    )
    set_prompt(message, prompt, token_ids)
    return message


def _sampling_message(
    sampling: SamplingParams | Mapping[str, Any],
) -> inference_pb2.SamplingParams:
    if isinstance(sampling, SamplingParams):
        given = {field.name: getattr(sampling, field.name) for field in fields(sampling)}
    else:
        given = dict(sampling)
    num_logprobs = given.pop("num_logprobs", -1)
    if num_logprobs >= 0:
        given["logprobs"] = num_logprobs
    message = inference_pb2.SamplingParams()
    for name, value in given.items():
        try:
            message.MergeFrom(inference_pb2.SamplingParams(**{name: value}))
        except (TypeError, ValueError) as error:
            raise InvalidArgumentError(
                f"sampling.{name}={value!r}: {error}", field=f"sampling.{name}"
            ) from error
    return message


def event_from_proto(message: inference_pb2.GenerateStreamResponse) -> Event | None:
    """Return an event; None for one that this version does not know."""
    kind = message.WhichOneof("event")
    if kind == "delta":
        delta = message.delta
        return TextDelta(delta.text, tuple(delta.token_ids), _logprobs(delta.logprobs))
    if kind == "finished":
        finished = message.finished
        return Finished(
            _FINISH_REASONS[finished.finish_reason],
            _usage(finished.usage),
            _timings(finished.timings),
        )
    if kind == "running":
        return Running(message.running.replica_id)
    return queued_from_proto(message.queued) if kind == "queued" else None


def models_from_proto(message: inference_pb2.ListModelsResponse) -> list[ServedModel]:
    """Return the models."""
    return [ServedModel(m.name, m.max_model_len, m.vocab_size) for m in message.models]


def cluster_from_proto(message: inference_pb2.ClusterStatusResponse) -> ClusterState:
    """Return the state of the cluster."""
    return ClusterState(
        gateway_id=message.gateway_id,
        num_queued=message.num_queued,
        num_inflight=message.num_inflight,
        replicas=tuple(_replica(replica) for replica in message.replicas),
    )


def _replica(message: inference_pb2.ReplicaStatus) -> ReplicaState:
    values = {field.name: getattr(message, field.name) for field in fields(ReplicaState)}
    state = inference_pb2.ReplicaState.Name(message.state)
    values["state"] = state.removeprefix("REPLICA_STATE_").lower()
    return ReplicaState(**values | {"cache": tiers_from_proto(message.cache)})


def _usage(message: inference_pb2.Usage) -> Usage:
    return Usage(message.prompt_tokens, message.completion_tokens, message.cached_tokens)


def _timings(message: inference_pb2.Timings) -> Timings:
    return Timings(message.queued_s, message.ttft_s, message.total_s)


def _logprobs(positions: Sequence[inference_pb2.PositionLogprobs]) -> tuple[ScoredToken, ...]:
    return tuple(
        ScoredToken(
            position.chosen.token_id,
            position.chosen.text,
            position.chosen.logprob,
            tuple(ScoredToken(item.token_id, item.text, item.logprob) for item in position.top),
        )
        for position in positions
    )
