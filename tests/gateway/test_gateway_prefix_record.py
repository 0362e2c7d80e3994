"""A registered prefix as bytes: round trips, and what somebody else wrote there."""

from __future__ import annotations

from dataclasses import replace

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.gateway.prefix_record import PrefixRecord, decode_record, encode_record, record_key

RECORD = PrefixRecord.of("alice", "system", "sluice-demo", (1, 2, 4095, 2**32 - 1), 12.5)
KEY = record_key("alice", "system")


def test_record_survives_the_store() -> None:
    read = decode_record(KEY, encode_record(RECORD))
    assert read == RECORD
    assert read.token_ids == (1, 2, 4095, 2**32 - 1)
    assert read.num_tokens == 4


def test_record_takes_four_bytes_per_token() -> None:
    long = replace(RECORD, packed_tokens=bytes(4) * 10_000)
    assert len(encode_record(long)) - len(encode_record(RECORD)) <= 4 * 10_000


@given(st.text(), st.text(), st.text(), st.text())
def test_keys_of_different_owners_or_names_differ(
    tenant: str, name: str, other_tenant: str, other_name: str
) -> None:
    is_same = (tenant, name) == (other_tenant, other_name)
    assert (record_key(tenant, name) == record_key(other_tenant, other_name)) == is_same


def test_key_is_not_moved_by_a_separator() -> None:
    pairs = [("a", "bc"), ("ab", "c"), ("a", "b.c"), ("a.b", "c"), ("", "abc"), ("abc", "")]
    assert len({record_key(*pair) for pair in pairs}) == len(pairs)


def _changed(**fields: object) -> bytes:
    packed: bytes = msgpack.packb({**msgpack.unpackb(encode_record(RECORD)), **fields})
    return packed


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"\xc1",
        b"\xff" * 40,
        msgpack.packb([1, 2]),
        encode_record(RECORD)[:-1],
        encode_record(RECORD) + b"\0",
        _changed(version=2),
        _changed(tokens=b""),
        _changed(tokens=b"\1\0\0"),
        _changed(tokens="text"),
        _changed(tenant=7),
        _changed(tenant="bob"),
        _changed(name="other"),
        _changed(name="has blank"),
        _changed(registered_at_s=float("nan")),
        _changed(more=1),
    ],
)
def test_what_does_not_verify_is_no_record(value: bytes) -> None:
    assert decode_record(KEY, value) is None


def test_record_under_the_key_of_another_tenant_is_no_record() -> None:
    assert decode_record(record_key("bob", "system"), encode_record(RECORD)) is None
