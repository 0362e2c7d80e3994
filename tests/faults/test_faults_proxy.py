"""The proxy does to a real Redis what the tests say that it does."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import redis
from fault_proxy import BulkValues, Fault, FaultProxy
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis_server import RedisServer

VALUE = bytes(range(256)) * 400


@pytest.fixture
def proxy(redis_server: RedisServer) -> Iterator[FaultProxy]:
    with FaultProxy(redis_server.port) as proxy:
        client(proxy).set("faults:proxy", VALUE)
        yield proxy


def client(proxy: FaultProxy, timeout_s: float = 5.0) -> redis.Redis:
    """Return a client that tries nothing twice."""
    return redis.Redis(port=proxy.port, socket_timeout=timeout_s, retry=Retry(NoBackoff(), 0))


def test_values_are_found_wherever_a_stream_is_cut() -> None:
    value = b"$300\r\n" + bytes(294)  # what is in a value is not taken for a header
    stream = b"+OK\r\n$3\r\nabc\r\n*1\r\n$300\r\n" + value + b"\r\n:1\r\n$300\r\n" + value + b"\r\n"
    first = stream.index(value)
    assert BulkValues().starts(stream) == [first, stream.rindex(value)]
    for cut in range(first + 1, first + 300):
        values = BulkValues()
        assert values.starts(stream[:cut]) == [first]
        assert values.starts(stream[cut:]) == [stream.rindex(value) - cut]


@pytest.mark.integration
def test_proxy_without_a_fault_changes_nothing(proxy: FaultProxy) -> None:
    assert client(proxy).get("faults:proxy") == VALUE


@pytest.mark.integration
def test_silence_holds_living_connections_and_new_ones_until_it_ends(proxy: FaultProxy) -> None:
    old = client(proxy, timeout_s=0.2)
    old.ping()
    proxy.switch(Fault.SILENT)
    num_connections = proxy.num_connections
    for one in (old, client(proxy, timeout_s=0.2)):
        with pytest.raises(redis.TimeoutError):
            one.get("faults:proxy")
    assert proxy.num_connections > num_connections, "it accepts"
    proxy.switch(Fault.NONE)
    assert client(proxy).get("faults:proxy") == VALUE


@pytest.mark.integration
def test_late_answers_come_when_their_time_is_over(proxy: FaultProxy) -> None:
    late = client(proxy)
    late.ping()
    proxy.switch(Fault.LATE, 0.2)
    began_s = time.monotonic()
    assert late.ping()
    assert 0.2 <= time.monotonic() - began_s < 2.0


@pytest.mark.integration
def test_reset_ends_living_connections_and_new_ones(proxy: FaultProxy) -> None:
    old = client(proxy)
    old.ping()
    proxy.switch(Fault.REFUSE)
    for one in (lambda: old, lambda: client(proxy)):
        with pytest.raises(redis.ConnectionError):
            one().ping()
    proxy.switch(Fault.NONE)
    assert client(proxy).ping()


@pytest.mark.integration
def test_corruption_changes_bytes_of_a_value_and_nothing_else(proxy: FaultProxy) -> None:
    proxy.switch(Fault.CORRUPT)
    got = client(proxy).get("faults:proxy")
    assert isinstance(got, bytes) and len(got) == len(VALUE)
    assert sum(a != b for a, b in zip(got, VALUE, strict=True)) == 128
    assert client(proxy).ping()


@pytest.mark.integration
def test_truncation_ends_a_connection_within_a_value(proxy: FaultProxy) -> None:
    proxy.switch(Fault.TRUNCATE)
    with pytest.raises(redis.ConnectionError):
        client(proxy).get("faults:proxy")
    assert client(proxy).ping(), "short replies are whole"


@pytest.mark.integration
def test_loss_delays_some_and_loses_nothing_that_arrives(proxy: FaultProxy) -> None:
    lossy = client(proxy, timeout_s=20.0)
    lossy.ping()
    proxy.switch(Fault.LOSSY)
    elapsed_s = []
    for _ in range(4):
        began_s = time.monotonic()
        try:
            assert lossy.get("faults:proxy") == VALUE
        except redis.ConnectionError:  # one in 32 packets is lost so often that TCP gives up
            lossy = client(proxy, timeout_s=20.0)
        elapsed_s.append(time.monotonic() - began_s)
    assert max(elapsed_s) > 0.15, "nothing was lost"
    proxy.switch(Fault.NONE)
    assert client(proxy).ping()
