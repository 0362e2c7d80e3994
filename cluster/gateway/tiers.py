"""The tiers of a replica's cache, as clients are told of them."""

from __future__ import annotations

from dataclasses import fields

from cluster.rpc.sluice.v1 import inference_pb2
from cluster.types import CacheLoad, StoreState

_STORE_STATES = {
    StoreState.EXACT: inference_pb2.STORE_STATE_EXACT,
    StoreState.DEGRADED: inference_pb2.STORE_STATE_DEGRADED,
    StoreState.OFF: inference_pb2.STORE_STATE_OFF,
}


def tiers_to_proto(load: CacheLoad) -> inference_pb2.CacheTiers:
    """Return the message of what a leader reports of its host tier and store."""
    values = {field.name: getattr(load, field.name) for field in fields(load)}
    return inference_pb2.CacheTiers(**values | {"store_state": _STORE_STATES[load.store_state]})
