"""The only place where protobuf messages meet the types of `cluster/types.py`.

Both directions of the internal service: what one side writes, the other reads back equal, except
that log probabilities travel as 32-bit floats.
"""

from __future__ import annotations

from dataclasses import fields

from cluster.rpc.sluice.internal.v1 import engine_pb2
from cluster.types import (
    SLO,
    CacheLoad,
    DueWork,
    EngineOutput,
    EngineRequest,
    FinishReason,
    ReplicaLoad,
    SampledToken,
    SamplingParams,
    ServiceClass,
    StepCost,
    StoreState,
    TokenLogprob,
)

_END_OF_REASON = {
    FinishReason.STOP: engine_pb2.END_STOP,
    FinishReason.LENGTH: engine_pb2.END_LENGTH,
    FinishReason.CANCELLED: engine_pb2.END_CANCELLED,
    FinishReason.MOVED: engine_pb2.END_MOVED,
}
_REASON_OF_END = {int(end): reason for reason, end in _END_OF_REASON.items()}
_STORE_STATES = {
    StoreState.EXACT: engine_pb2.STORE_STATE_EXACT,
    StoreState.DEGRADED: engine_pb2.STORE_STATE_DEGRADED,
    StoreState.OFF: engine_pb2.STORE_STATE_OFF,
}
_STATE_OF_STORE = {int(value): state for state, value in _STORE_STATES.items()}
_CLASSES = {
    ServiceClass.INTERACTIVE: engine_pb2.SERVICE_CLASS_INTERACTIVE,
    ServiceClass.STANDARD: engine_pb2.SERVICE_CLASS_STANDARD,
    ServiceClass.BATCH: engine_pb2.SERVICE_CLASS_BATCH,
}
_CLASS_OF = {int(value): name for name, value in _CLASSES.items()}
_MIN_DEADLINE_S = 1e-6  # what is over travels as this, because 0 means no bound


def submit_to_proto(request: EngineRequest) -> engine_pb2.Submit:
    """Return the message that begins a request; stop strings stay behind, with the gateway."""
    sampling = request.sampling
    return engine_pb2.Submit(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        sampling=engine_pb2.Sampling(
            max_tokens=sampling.max_tokens,
            min_tokens=sampling.min_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            seed=sampling.seed,
            stop_token_ids=sampling.stop_token_ids,
            ignore_eos=sampling.ignore_eos,
            num_logprobs=sampling.num_logprobs,
        ),
        salt=request.salt,
        deadline_s=(
            0.0 if request.deadline_s is None else max(request.deadline_s, _MIN_DEADLINE_S)
        ),
        ttft_slo_s=request.slo.ttft_s,
        tpot_slo_s=request.slo.tpot_s,
        pins_prefix=request.pins_prefix,
        service_class=_CLASSES[request.service_class],
        tenant=request.tenant,
        tenant_weight=request.tenant_weight,
        output_token_ids=request.output_token_ids,
    )


def submit_from_proto(submit: engine_pb2.Submit) -> EngineRequest:
    """Return the request of a message, without stop strings."""
    sampling = submit.sampling
    return EngineRequest(
        request_id=submit.request_id,
        prompt_token_ids=tuple(submit.prompt_token_ids),
        sampling=SamplingParams(
            max_tokens=sampling.max_tokens,
            min_tokens=sampling.min_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            seed=sampling.seed,
            stop_token_ids=tuple(sampling.stop_token_ids),
            ignore_eos=sampling.ignore_eos,
            num_logprobs=sampling.num_logprobs,
        ),
        salt=submit.salt,
        deadline_s=submit.deadline_s or None,
        slo=SLO(
            submit.ttft_slo_s if submit.HasField("ttft_slo_s") else None,
            submit.tpot_slo_s if submit.HasField("tpot_slo_s") else None,
        ),
        pins_prefix=submit.pins_prefix,
        service_class=_CLASS_OF.get(submit.service_class, ServiceClass.STANDARD),
        tenant=submit.tenant,
        tenant_weight=submit.tenant_weight or 1.0,
        output_token_ids=tuple(submit.output_token_ids),
    )


def output_to_proto(output: EngineOutput) -> engine_pb2.Output:
    """Return the message of one request's new tokens and, on the last one, its end.

    Log probabilities are there for all tokens of an output or for none.
    """
    message = engine_pb2.Output(
        request_id=output.request_id,
        token_ids=[token.token_id for token in output.tokens],
        num_cached_tokens=output.num_cached_tokens,
        queued_s=output.queued_s,
    )
    if output.error is not None:
        message.end = engine_pb2.END_ERROR
        message.error = output.error
    elif output.finish_reason is not None:
        message.end = _END_OF_REASON[output.finish_reason]
    if output.tokens and output.tokens[0].logprob is not None:
        _add_logprobs(message, output.tokens)
    return message


def _add_logprobs(message: engine_pb2.Output, tokens: tuple[SampledToken, ...]) -> None:
    for token in tokens:
        assert token.logprob is not None, "log probabilities of all tokens of an output or of none"
        message.logprobs.append(token.logprob)
    if any(token.top for token in tokens):
        for token in tokens:
            items = message.top.add().items
            for candidate in token.top:
                items.add(token_id=candidate.token_id, logprob=candidate.logprob)


def output_from_proto(message: engine_pb2.Output) -> EngineOutput:
    """Return the new tokens of one request."""
    tokens: tuple[SampledToken, ...]
    if not message.logprobs:  # nearly always: kept short, it runs once per token
        tokens = tuple([SampledToken(token_id) for token_id in message.token_ids])
    else:
        tops = [_candidates(top) for top in message.top] or [()] * len(message.token_ids)
        tokens = tuple(
            SampledToken(token_id, logprob, top)
            for token_id, logprob, top in zip(
                message.token_ids, message.logprobs, tops, strict=True
            )
        )
    end = message.end
    return EngineOutput(
        message.request_id,
        tokens,
        message.num_cached_tokens,
        _REASON_OF_END.get(end) if end else None,
        message.error if end == engine_pb2.END_ERROR else None,
        message.queued_s,
    )


def _candidates(top: engine_pb2.Candidates) -> tuple[TokenLogprob, ...]:
    return tuple(TokenLogprob(item.token_id, item.logprob) for item in top.items)


def load_to_proto(load: ReplicaLoad) -> engine_pb2.Load:
    """Return the message of a replica's load."""
    return engine_pb2.Load(
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        num_queued_prefill_tokens=load.num_queued_prefill_tokens,
        num_free_blocks=load.num_free_blocks,
        num_blocks=load.num_blocks,
        num_prefix_query_tokens=load.num_prefix_query_tokens,
        num_prefix_hit_tokens=load.num_prefix_hit_tokens,
        num_generated_tokens=load.num_generated_tokens,
        is_draining=load.is_draining,
        step_cost=None if load.step_cost is None else _cost_to_proto(load.step_cost),
        cache=_cache_to_proto(load.cache),
        due=[engine_pb2.DueWork(due_s=due.due_s, work_s=due.work_s) for due in load.due],
        late_s=load.late_s,
        prefill_token_s=load.prefill_token_s,
        decode_step_s=load.decode_step_s,
        fetch_block_s=load.fetch_block_s,
    )


def load_from_proto(load: engine_pb2.Load) -> ReplicaLoad:
    """Return the load of a message."""
    return ReplicaLoad(
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        num_queued_prefill_tokens=load.num_queued_prefill_tokens,
        num_free_blocks=load.num_free_blocks,
        num_blocks=load.num_blocks,
        num_prefix_query_tokens=load.num_prefix_query_tokens,
        num_prefix_hit_tokens=load.num_prefix_hit_tokens,
        num_generated_tokens=load.num_generated_tokens,
        is_draining=load.is_draining,
        step_cost=_cost_from_proto(load.step_cost) if load.HasField("step_cost") else None,
        cache=_cache_from_proto(load.cache) if load.HasField("cache") else CacheLoad(),
        due=tuple([DueWork(due.due_s, due.work_s) for due in load.due]),
        late_s=load.late_s,
        prefill_token_s=load.prefill_token_s,
        decode_step_s=load.decode_step_s,
        fetch_block_s=load.fetch_block_s,
    )


def _cache_to_proto(cache: CacheLoad) -> engine_pb2.CacheLoad:
    values = {field.name: getattr(cache, field.name) for field in fields(cache)}
    return engine_pb2.CacheLoad(**values | {"store_state": _STORE_STATES[cache.store_state]})


def _cache_from_proto(message: engine_pb2.CacheLoad) -> CacheLoad:
    values = {field.name: getattr(message, field.name) for field in fields(CacheLoad)}
    state = _STATE_OF_STORE.get(message.store_state, StoreState.OFF)
    return CacheLoad(**values | {"store_state": state})


def _cost_to_proto(cost: StepCost) -> engine_pb2.StepCost:
    return engine_pb2.StepCost(
        floor_s=cost.floor_s,
        token_s=cost.token_s,
        hinges=[engine_pb2.Hinge(tokens=tokens, token_s=more_s) for tokens, more_s in cost.hinges],
        sequence_s=cost.sequence_s,
        context_s=cost.context_s,
        prompt_work_s=cost.prompt_work_s,
        num_steps=cost.num_steps,
    )


def _cost_from_proto(message: engine_pb2.StepCost) -> StepCost:
    return StepCost(
        floor_s=message.floor_s,
        token_s=message.token_s,
        hinges=tuple((hinge.tokens, hinge.token_s) for hinge in message.hinges),
        sequence_s=message.sequence_s,
        context_s=message.context_s,
        prompt_work_s=message.prompt_work_s,
        num_steps=message.num_steps,
    )
