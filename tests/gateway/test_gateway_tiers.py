"""A replica's tiers on their way to a client."""

from __future__ import annotations

from dataclasses import fields

from hypothesis import given
from hypothesis import strategies as st

from cluster.gateway.tiers import tiers_to_proto
from cluster.rpc.public_cache import tiers_from_proto
from cluster.rpc.sluice.v1 import inference_pb2
from cluster.types import CacheLoad, StoreState

_counts = {field.name: st.integers(0, 2**32 - 1) for field in fields(CacheLoad)}
_seconds = st.floats(0, allow_nan=False, allow_infinity=False)
_loads = st.builds(
    CacheLoad, **_counts | {"store_state": st.sampled_from(StoreState), "saved_s": _seconds}
)


@given(_loads)
def test_tiers_survive_the_way_to_the_client(load: CacheLoad) -> None:
    wire = tiers_to_proto(load).SerializeToString()
    assert tiers_from_proto(inference_pb2.CacheTiers.FromString(wire)) == load


def test_state_that_is_not_known_is_off() -> None:
    message = inference_pb2.CacheTiers(store_state=17)
    assert tiers_from_proto(message).store_state is StoreState.OFF
