from __future__ import annotations

import dataclasses
import struct

from hypothesis import given
from hypothesis import strategies as st

from cluster.rpc import convert
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

_u32 = st.integers(0, 2**32 - 1)
_u64 = st.integers(0, 2**64 - 1)
_double = st.floats(allow_nan=False)
_float = st.floats(width=32, allow_nan=False)
_text = st.text(max_size=20)

_sampling = st.builds(
    SamplingParams,
    max_tokens=_u32,
    min_tokens=_u32,
    temperature=_double,
    top_k=_u32,
    top_p=_double,
    min_p=_double,
    repetition_penalty=_double,
    presence_penalty=_double,
    frequency_penalty=_double,
    seed=_u64,
    stop_token_ids=st.lists(_u32, max_size=4).map(tuple),
    ignore_eos=st.booleans(),
    num_logprobs=st.integers(-1, 20),
)
_request = st.builds(
    EngineRequest,
    request_id=_text,
    prompt_token_ids=st.lists(_u32, min_size=1, max_size=50).map(tuple),
    sampling=_sampling,
    salt=st.binary(max_size=32),
    deadline_s=st.none() | st.floats(1e-6, 1e9),
    slo=st.builds(SLO, ttft_s=st.none() | _double, tpot_s=st.none() | _double),
    pins_prefix=st.booleans(),
    service_class=st.sampled_from(ServiceClass),
    tenant=_text,
    tenant_weight=st.floats(1e-6, 1e6),
)
_top = st.lists(st.builds(TokenLogprob, token_id=_u32, logprob=_float), max_size=3).map(tuple)
_plain = st.builds(SampledToken, token_id=_u32)
_scored = st.builds(SampledToken, token_id=_u32, logprob=_float, top=_top)
_tokens = st.lists(_plain, max_size=4).map(tuple) | st.lists(_scored, max_size=4).map(tuple)
_end = st.one_of(
    st.just((None, None)),
    st.sampled_from(FinishReason).map(lambda reason: (reason, None)),
    _text.map(lambda text: (None, text)),
)
_cost = st.builds(
    StepCost,
    floor_s=_double,
    token_s=_double,
    hinges=st.lists(st.tuples(_u32, _double), max_size=8).map(tuple),
    sequence_s=_double,
    context_s=_double,
    prompt_work_s=_double,
    num_steps=_u64,
)
_wide = ("tokens", "evictions", "stored", "fetched", "rejected", "late", "failed", "corrupt")
_cache = st.builds(
    CacheLoad,
    **{
        field.name: _u64 if any(word in field.name for word in _wide) else _u32
        for field in dataclasses.fields(CacheLoad)
    }
    | {"store_state": st.sampled_from(StoreState), "saved_s": _double},
)
_others = {
    "is_draining": st.booleans(),
    "step_cost": st.none() | _cost,
    "cache": _cache,
    "due": st.lists(st.builds(DueWork, due_s=_double, work_s=_double), max_size=4).map(tuple),
    **dict.fromkeys(("late_s", "prefill_token_s", "decode_step_s", "fetch_block_s"), _double),
}
_load = st.builds(
    ReplicaLoad,
    **{
        field.name: _others.get(field.name, _u64 if "tokens" in field.name else _u32)
        for field in dataclasses.fields(ReplicaLoad)
    },
)


@given(_request)
def test_submit_survives_the_wire(request: EngineRequest) -> None:
    wire = convert.submit_to_proto(request).SerializeToString()
    assert convert.submit_from_proto(engine_pb2.Submit.FromString(wire)) == request


def test_submit_leaves_stop_strings_with_the_gateway() -> None:
    request = EngineRequest("r", (1,), SamplingParams(stop=("\n",)))
    assert convert.submit_from_proto(convert.submit_to_proto(request)).sampling.stop == ()


def test_submit_with_a_deadline_that_is_over_stays_bounded() -> None:
    request = EngineRequest("r", (1,), SamplingParams(), deadline_s=-1.0)
    deadline_s = convert.submit_from_proto(convert.submit_to_proto(request)).deadline_s
    assert deadline_s is not None
    assert 0 < deadline_s < 0.001


@given(_text, _tokens, _u32, _end, _double)
def test_output_survives_the_wire(
    request_id: str,
    tokens: tuple[SampledToken, ...],
    num_cached_tokens: int,
    end: tuple[FinishReason | None, str | None],
    queued_s: float,
) -> None:
    output = EngineOutput(request_id, tokens, num_cached_tokens, end[0], end[1], queued_s)
    wire = convert.output_to_proto(output).SerializeToString()
    assert convert.output_from_proto(engine_pb2.Output.FromString(wire)) == output


def test_output_logprobs_are_32_bit_floats() -> None:
    output = EngineOutput("r", (SampledToken(1, -0.1),))
    (token,) = convert.output_from_proto(convert.output_to_proto(output)).tokens
    assert token.logprob == struct.unpack("f", struct.pack("f", -0.1))[0]


@given(_load)
def test_load_survives_the_wire(load: ReplicaLoad) -> None:
    wire = convert.load_to_proto(load).SerializeToString()
    assert convert.load_from_proto(engine_pb2.Load.FromString(wire)) == load
