"""How a client shows its key, and where it must not."""

from __future__ import annotations

import pytest

from cluster.errors import ConfigError
from cluster.rpc.connection import is_loopback, key_metadata

KEY = "sk-not-to-be-seen"


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:9000",
        "127.9.9.9:1",
        "localhost:9000",
        "localhost",
        "[::1]:9000",
        "::1",
        "dns:///localhost:9000",
        "dns:localhost:9000",
        "ipv4:127.0.0.1:9000",
        "ipv6:[::1]:9000",
        "ipv6:%5B::1%5D:9000",
        "unix:/run/sluice",
    ],
)
def test_addresses_of_this_machine(address: str) -> None:
    assert is_loopback(address)
    assert key_metadata(KEY, address, is_tls=False) == (("authorization", f"Bearer {KEY}"),)


@pytest.mark.parametrize(
    "address",
    [
        "10.0.0.1:9000",
        "gateway:9000",
        "127.0.0.1.example:9000",
        "localhost.example:9000",
        "0.0.0.0:9000",
        "[2001:db8::1]:9000",
        "dns:///gateway:9000",
        "dns://10.0.0.53/localhost:9000",
        "xds:///localhost:9000",
        "ipv4:127.0.0.1:9000,10.0.0.1:9000",
        "ipv4:127.0.0.1,10.0.0.1:9000",
        "",
    ],
)
def test_key_is_not_sent_over_a_network_as_plain_text(address: str) -> None:
    assert not is_loopback(address)
    with pytest.raises(ConfigError, match="without TLS") as caught:
        key_metadata(KEY, address, is_tls=False)
    assert KEY not in str(caught.value)
    assert key_metadata(KEY, address, is_tls=True)
    assert key_metadata(None, address, is_tls=False) == ()


@pytest.mark.parametrize("key", ["", "two words", "new\nline", "Bearer x", "ключ"])
def test_what_cannot_be_a_key_is_refused_unseen(key: str) -> None:
    with pytest.raises(ConfigError, match=f"api_key has {len(key)} characters") as caught:
        key_metadata(key, "localhost:1", is_tls=True)
    assert not key or key not in str(caught.value)
