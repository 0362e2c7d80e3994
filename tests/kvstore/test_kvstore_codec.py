from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.kvstore.codec import HEADER_BYTES, decode_block, encode_block

payloads = st.binary(max_size=200)
fingerprints = st.binary(max_size=20)


@given(payloads, fingerprints)
def test_codec_returns_what_was_encoded(payload, fingerprint) -> None:
    data = encode_block(payload, fingerprint)
    assert len(data) == HEADER_BYTES + len(fingerprint) + len(payload)
    assert decode_block(data, fingerprint) == payload
    assert encode_block(memoryview(payload), fingerprint) == data


def test_codec_takes_views_of_wider_items() -> None:
    view = memoryview(bytes(range(16))).cast("I")
    assert decode_block(encode_block(view, b"m"), b"m") == bytes(range(16))


def test_codec_copies_nothing_when_it_reads() -> None:
    for data in (encode_block(b"payload", b"m"), bytearray(encode_block(b"payload", b"m"))):
        view = decode_block(data, b"m")
        assert isinstance(view, memoryview)
        assert view.obj is data


@given(payloads, fingerprints, st.data())
def test_codec_changed_byte_is_a_miss(payload, fingerprint, data) -> None:
    encoded = bytearray(encode_block(payload, fingerprint))
    index = data.draw(st.integers(0, len(encoded) - 1))
    encoded[index] ^= data.draw(st.integers(1, 255))
    assert decode_block(bytes(encoded), fingerprint) is None


def test_codec_every_flipped_bit_is_a_miss() -> None:
    encoded = encode_block(b"payload", b"model")
    for bit in range(8 * len(encoded)):
        flipped = bytearray(encoded)
        flipped[bit // 8] ^= 1 << bit % 8
        assert decode_block(bytes(flipped), b"model") is None


@given(payloads, fingerprints, st.binary(min_size=1, max_size=9), st.data())
def test_codec_other_length_is_a_miss(payload, fingerprint, tail, data) -> None:
    encoded = encode_block(payload, fingerprint)
    cut = data.draw(st.integers(0, len(encoded) - 1))
    assert decode_block(encoded[:cut], fingerprint) is None
    assert decode_block(encoded + tail, fingerprint) is None


@given(payloads, fingerprints, fingerprints)
def test_codec_foreign_fingerprint_is_a_miss(payload, ours, theirs) -> None:
    assert (decode_block(encode_block(payload, ours), theirs) == payload) == (ours == theirs)


@given(st.binary(max_size=100), fingerprints)
def test_codec_anything_else_is_a_miss(data, fingerprint) -> None:
    assert decode_block(data, fingerprint) is None


def test_codec_other_version_is_a_miss(monkeypatch) -> None:
    monkeypatch.setattr("cluster.kvstore.codec.VERSION", 2)
    newer = encode_block(b"payload", b"model")
    assert decode_block(newer, b"model") == b"payload"
    monkeypatch.undo()
    assert decode_block(newer, b"model") is None
