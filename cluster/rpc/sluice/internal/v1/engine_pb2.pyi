from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ServiceClass(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SERVICE_CLASS_UNSPECIFIED: _ClassVar[ServiceClass]
    SERVICE_CLASS_INTERACTIVE: _ClassVar[ServiceClass]
    SERVICE_CLASS_STANDARD: _ClassVar[ServiceClass]
    SERVICE_CLASS_BATCH: _ClassVar[ServiceClass]

class End(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    END_UNSPECIFIED: _ClassVar[End]
    END_STOP: _ClassVar[End]
    END_LENGTH: _ClassVar[End]
    END_CANCELLED: _ClassVar[End]
    END_ERROR: _ClassVar[End]
    END_MOVED: _ClassVar[End]

class StoreState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STORE_STATE_UNSPECIFIED: _ClassVar[StoreState]
    STORE_STATE_EXACT: _ClassVar[StoreState]
    STORE_STATE_DEGRADED: _ClassVar[StoreState]
    STORE_STATE_OFF: _ClassVar[StoreState]
SERVICE_CLASS_UNSPECIFIED: ServiceClass
SERVICE_CLASS_INTERACTIVE: ServiceClass
SERVICE_CLASS_STANDARD: ServiceClass
SERVICE_CLASS_BATCH: ServiceClass
END_UNSPECIFIED: End
END_STOP: End
END_LENGTH: End
END_CANCELLED: End
END_ERROR: End
END_MOVED: End
STORE_STATE_UNSPECIFIED: StoreState
STORE_STATE_EXACT: StoreState
STORE_STATE_DEGRADED: StoreState
STORE_STATE_OFF: StoreState

class Sampling(_message.Message):
    __slots__ = ("max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "stop_token_ids", "ignore_eos", "num_logprobs")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    NUM_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    num_logprobs: int
    def __init__(self, max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., seed: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., num_logprobs: _Optional[int] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("request_id", "prompt_token_ids", "sampling", "salt", "deadline_s", "ttft_slo_s", "tpot_slo_s", "pins_prefix", "service_class", "tenant", "tenant_weight", "output_token_ids")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    TTFT_SLO_S_FIELD_NUMBER: _ClassVar[int]
    TPOT_SLO_S_FIELD_NUMBER: _ClassVar[int]
    PINS_PREFIX_FIELD_NUMBER: _ClassVar[int]
    SERVICE_CLASS_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    TENANT_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: Sampling
    salt: bytes
    deadline_s: float
    ttft_slo_s: float
    tpot_slo_s: float
    pins_prefix: bool
    service_class: ServiceClass
    tenant: str
    tenant_weight: float
    output_token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, request_id: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., salt: _Optional[bytes] = ..., deadline_s: _Optional[float] = ..., ttft_slo_s: _Optional[float] = ..., tpot_slo_s: _Optional[float] = ..., pins_prefix: _Optional[bool] = ..., service_class: _Optional[_Union[ServiceClass, str]] = ..., tenant: _Optional[str] = ..., tenant_weight: _Optional[float] = ..., output_token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class HandOver(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class SessionRequest(_message.Message):
    __slots__ = ("submit", "cancel", "hand_over")
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    HAND_OVER_FIELD_NUMBER: _ClassVar[int]
    submit: Submit
    cancel: Cancel
    hand_over: HandOver
    def __init__(self, submit: _Optional[_Union[Submit, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., hand_over: _Optional[_Union[HandOver, _Mapping]] = ...) -> None: ...

class Candidate(_message.Message):
    __slots__ = ("token_id", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class Candidates(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[Candidate]
    def __init__(self, items: _Optional[_Iterable[_Union[Candidate, _Mapping]]] = ...) -> None: ...

class Output(_message.Message):
    __slots__ = ("request_id", "token_ids", "logprobs", "top", "num_cached_tokens", "end", "error", "queued_s")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    QUEUED_S_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    top: _containers.RepeatedCompositeFieldContainer[Candidates]
    num_cached_tokens: int
    end: End
    error: str
    queued_s: float
    def __init__(self, request_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., top: _Optional[_Iterable[_Union[Candidates, _Mapping]]] = ..., num_cached_tokens: _Optional[int] = ..., end: _Optional[_Union[End, str]] = ..., error: _Optional[str] = ..., queued_s: _Optional[float] = ...) -> None: ...

class SessionResponse(_message.Message):
    __slots__ = ("outputs",)
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.RepeatedCompositeFieldContainer[Output]
    def __init__(self, outputs: _Optional[_Iterable[_Union[Output, _Mapping]]] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Hinge(_message.Message):
    __slots__ = ("tokens", "token_s")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    token_s: float
    def __init__(self, tokens: _Optional[int] = ..., token_s: _Optional[float] = ...) -> None: ...

class StepCost(_message.Message):
    __slots__ = ("floor_s", "token_s", "hinges", "sequence_s", "context_s", "prompt_work_s", "num_steps")
    FLOOR_S_FIELD_NUMBER: _ClassVar[int]
    TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    HINGES_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_S_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_S_FIELD_NUMBER: _ClassVar[int]
    PROMPT_WORK_S_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    floor_s: float
    token_s: float
    hinges: _containers.RepeatedCompositeFieldContainer[Hinge]
    sequence_s: float
    context_s: float
    prompt_work_s: float
    num_steps: int
    def __init__(self, floor_s: _Optional[float] = ..., token_s: _Optional[float] = ..., hinges: _Optional[_Iterable[_Union[Hinge, _Mapping]]] = ..., sequence_s: _Optional[float] = ..., context_s: _Optional[float] = ..., prompt_work_s: _Optional[float] = ..., num_steps: _Optional[int] = ...) -> None: ...

class CacheLoad(_message.Message):
    __slots__ = ("store_state", "num_host_slots", "num_host_blocks", "num_host_hit_tokens", "num_store_hit_tokens", "num_device_evictions", "num_host_evictions", "num_stored_blocks", "num_fetched_blocks", "stored_bytes", "fetched_bytes", "num_rejected", "num_late", "num_failed", "num_corrupt", "saved_s")
    STORE_STATE_FIELD_NUMBER: _ClassVar[int]
    NUM_HOST_SLOTS_FIELD_NUMBER: _ClassVar[int]
    NUM_HOST_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_HOST_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_STORE_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_DEVICE_EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_HOST_EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_STORED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_FETCHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    FETCHED_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_REJECTED_FIELD_NUMBER: _ClassVar[int]
    NUM_LATE_FIELD_NUMBER: _ClassVar[int]
    NUM_FAILED_FIELD_NUMBER: _ClassVar[int]
    NUM_CORRUPT_FIELD_NUMBER: _ClassVar[int]
    SAVED_S_FIELD_NUMBER: _ClassVar[int]
    store_state: StoreState
    num_host_slots: int
    num_host_blocks: int
    num_host_hit_tokens: int
    num_store_hit_tokens: int
    num_device_evictions: int
    num_host_evictions: int
    num_stored_blocks: int
    num_fetched_blocks: int
    stored_bytes: int
    fetched_bytes: int
    num_rejected: int
    num_late: int
    num_failed: int
    num_corrupt: int
    saved_s: float
    def __init__(self, store_state: _Optional[_Union[StoreState, str]] = ..., num_host_slots: _Optional[int] = ..., num_host_blocks: _Optional[int] = ..., num_host_hit_tokens: _Optional[int] = ..., num_store_hit_tokens: _Optional[int] = ..., num_device_evictions: _Optional[int] = ..., num_host_evictions: _Optional[int] = ..., num_stored_blocks: _Optional[int] = ..., num_fetched_blocks: _Optional[int] = ..., stored_bytes: _Optional[int] = ..., fetched_bytes: _Optional[int] = ..., num_rejected: _Optional[int] = ..., num_late: _Optional[int] = ..., num_failed: _Optional[int] = ..., num_corrupt: _Optional[int] = ..., saved_s: _Optional[float] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("num_running", "num_waiting", "num_queued_prefill_tokens", "num_free_blocks", "num_blocks", "num_prefix_query_tokens", "num_prefix_hit_tokens", "num_generated_tokens", "is_draining", "step_cost", "cache", "due", "late_s", "prefill_token_s", "decode_step_s", "fetch_block_s")
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_QUEUED_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFIX_QUERY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFIX_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IS_DRAINING_FIELD_NUMBER: _ClassVar[int]
    STEP_COST_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    DUE_FIELD_NUMBER: _ClassVar[int]
    LATE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_STEP_S_FIELD_NUMBER: _ClassVar[int]
    FETCH_BLOCK_S_FIELD_NUMBER: _ClassVar[int]
    num_running: int
    num_waiting: int
    num_queued_prefill_tokens: int
    num_free_blocks: int
    num_blocks: int
    num_prefix_query_tokens: int
    num_prefix_hit_tokens: int
    num_generated_tokens: int
    is_draining: bool
    step_cost: StepCost
    cache: CacheLoad
    due: _containers.RepeatedCompositeFieldContainer[DueWork]
    late_s: float
    prefill_token_s: float
    decode_step_s: float
    fetch_block_s: float
    def __init__(self, num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., num_queued_prefill_tokens: _Optional[int] = ..., num_free_blocks: _Optional[int] = ..., num_blocks: _Optional[int] = ..., num_prefix_query_tokens: _Optional[int] = ..., num_prefix_hit_tokens: _Optional[int] = ..., num_generated_tokens: _Optional[int] = ..., is_draining: _Optional[bool] = ..., step_cost: _Optional[_Union[StepCost, _Mapping]] = ..., cache: _Optional[_Union[CacheLoad, _Mapping]] = ..., due: _Optional[_Iterable[_Union[DueWork, _Mapping]]] = ..., late_s: _Optional[float] = ..., prefill_token_s: _Optional[float] = ..., decode_step_s: _Optional[float] = ..., fetch_block_s: _Optional[float] = ...) -> None: ...

class DueWork(_message.Message):
    __slots__ = ("due_s", "work_s")
    DUE_S_FIELD_NUMBER: _ClassVar[int]
    WORK_S_FIELD_NUMBER: _ClassVar[int]
    due_s: float
    work_s: float
    def __init__(self, due_s: _Optional[float] = ..., work_s: _Optional[float] = ...) -> None: ...

class WatchResponse(_message.Message):
    __slots__ = ("seq", "is_snapshot", "added", "removed", "load")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    IS_SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    ADDED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    seq: int
    is_snapshot: bool
    added: _containers.RepeatedScalarFieldContainer[int]
    removed: _containers.RepeatedScalarFieldContainer[int]
    load: Load
    def __init__(self, seq: _Optional[int] = ..., is_snapshot: _Optional[bool] = ..., added: _Optional[_Iterable[int]] = ..., removed: _Optional[_Iterable[int]] = ..., load: _Optional[_Union[Load, _Mapping]] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("num_requests",)
    NUM_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    num_requests: int
    def __init__(self, num_requests: _Optional[int] = ...) -> None: ...

class FlushCacheRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FlushCacheResponse(_message.Message):
    __slots__ = ("num_blocks",)
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    def __init__(self, num_blocks: _Optional[int] = ...) -> None: ...
