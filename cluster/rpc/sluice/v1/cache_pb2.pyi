from cluster.rpc.sluice.v1 import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RegisterPrefixRequest(_message.Message):
    __slots__ = ("name", "model", "text", "token_ids")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    model: str
    text: str
    token_ids: _inference_pb2.TokenIds
    def __init__(self, name: _Optional[str] = ..., model: _Optional[str] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Union[_inference_pb2.TokenIds, _Mapping]] = ...) -> None: ...

class Prefix(_message.Message):
    __slots__ = ("name", "model", "num_tokens", "num_blocks", "num_stored_blocks", "registered_at_s", "tenant")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_STORED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    REGISTERED_AT_S_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    name: str
    model: str
    num_tokens: int
    num_blocks: int
    num_stored_blocks: int
    registered_at_s: float
    tenant: str
    def __init__(self, name: _Optional[str] = ..., model: _Optional[str] = ..., num_tokens: _Optional[int] = ..., num_blocks: _Optional[int] = ..., num_stored_blocks: _Optional[int] = ..., registered_at_s: _Optional[float] = ..., tenant: _Optional[str] = ...) -> None: ...

class RegisterPrefixResponse(_message.Message):
    __slots__ = ("prefix",)
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    prefix: Prefix
    def __init__(self, prefix: _Optional[_Union[Prefix, _Mapping]] = ...) -> None: ...

class ListPrefixesRequest(_message.Message):
    __slots__ = ("tenant",)
    TENANT_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    def __init__(self, tenant: _Optional[str] = ...) -> None: ...

class ListPrefixesResponse(_message.Message):
    __slots__ = ("prefixes",)
    PREFIXES_FIELD_NUMBER: _ClassVar[int]
    prefixes: _containers.RepeatedCompositeFieldContainer[Prefix]
    def __init__(self, prefixes: _Optional[_Iterable[_Union[Prefix, _Mapping]]] = ...) -> None: ...

class RemovePrefixRequest(_message.Message):
    __slots__ = ("name", "tenant")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    name: str
    tenant: str
    def __init__(self, name: _Optional[str] = ..., tenant: _Optional[str] = ...) -> None: ...

class RemovePrefixResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CacheStatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StoreStats(_message.Message):
    __slots__ = ("used_bytes", "max_bytes", "num_blocks", "num_pinned_blocks", "num_evicted")
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_PINNED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_EVICTED_FIELD_NUMBER: _ClassVar[int]
    used_bytes: int
    max_bytes: int
    num_blocks: int
    num_pinned_blocks: int
    num_evicted: int
    def __init__(self, used_bytes: _Optional[int] = ..., max_bytes: _Optional[int] = ..., num_blocks: _Optional[int] = ..., num_pinned_blocks: _Optional[int] = ..., num_evicted: _Optional[int] = ...) -> None: ...

class ReplicaCache(_message.Message):
    __slots__ = ("replica_id", "num_blocks", "num_free_blocks", "num_prefix_query_tokens", "num_prefix_hit_tokens", "tiers")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFIX_QUERY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFIX_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    num_blocks: int
    num_free_blocks: int
    num_prefix_query_tokens: int
    num_prefix_hit_tokens: int
    tiers: _inference_pb2.CacheTiers
    def __init__(self, replica_id: _Optional[str] = ..., num_blocks: _Optional[int] = ..., num_free_blocks: _Optional[int] = ..., num_prefix_query_tokens: _Optional[int] = ..., num_prefix_hit_tokens: _Optional[int] = ..., tiers: _Optional[_Union[_inference_pb2.CacheTiers, _Mapping]] = ...) -> None: ...

class CacheStatsResponse(_message.Message):
    __slots__ = ("store", "store_error", "replicas")
    STORE_FIELD_NUMBER: _ClassVar[int]
    STORE_ERROR_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    store: StoreStats
    store_error: str
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaCache]
    def __init__(self, store: _Optional[_Union[StoreStats, _Mapping]] = ..., store_error: _Optional[str] = ..., replicas: _Optional[_Iterable[_Union[ReplicaCache, _Mapping]]] = ...) -> None: ...

class FlushCacheRequest(_message.Message):
    __slots__ = ("replicas", "store")
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    replicas: bool
    store: bool
    def __init__(self, replicas: _Optional[bool] = ..., store: _Optional[bool] = ...) -> None: ...

class FlushCacheResponse(_message.Message):
    __slots__ = ("num_replica_blocks", "num_store_blocks", "failed_replica_ids")
    NUM_REPLICA_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_STORE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FAILED_REPLICA_IDS_FIELD_NUMBER: _ClassVar[int]
    num_replica_blocks: int
    num_store_blocks: int
    failed_replica_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, num_replica_blocks: _Optional[int] = ..., num_store_blocks: _Optional[int] = ..., failed_replica_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class InspectCacheRequest(_message.Message):
    __slots__ = ("model", "text", "token_ids", "prefix")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    model: str
    text: str
    token_ids: _inference_pb2.TokenIds
    prefix: str
    def __init__(self, model: _Optional[str] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Union[_inference_pb2.TokenIds, _Mapping]] = ..., prefix: _Optional[str] = ...) -> None: ...

class InspectCacheResponse(_message.Message):
    __slots__ = ("num_tokens", "num_blocks", "num_stored_blocks", "store_error", "replicas")
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_STORED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    STORE_ERROR_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    num_tokens: int
    num_blocks: int
    num_stored_blocks: int
    store_error: str
    replicas: _containers.RepeatedCompositeFieldContainer[CachedOn]
    def __init__(self, num_tokens: _Optional[int] = ..., num_blocks: _Optional[int] = ..., num_stored_blocks: _Optional[int] = ..., store_error: _Optional[str] = ..., replicas: _Optional[_Iterable[_Union[CachedOn, _Mapping]]] = ...) -> None: ...

class CachedOn(_message.Message):
    __slots__ = ("replica_id", "num_blocks")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    num_blocks: int
    def __init__(self, replica_id: _Optional[str] = ..., num_blocks: _Optional[int] = ...) -> None: ...
