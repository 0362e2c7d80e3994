from __future__ import annotations

import pytest
from redis.asyncio.connection import SSLConnection, UnixDomainSocketConnection

from cluster.errors import ConfigError
from cluster.kvstore.redis_url import RedisKind, parse_redis_url


def test_redis_url_of_one_server() -> None:
    target = parse_redis_url("redis://us%40er:p%2Fw%3A@h:1234/3", "store.url")
    assert target.kind is RedisKind.STANDALONE
    assert target.addresses == (("h", 1234),)
    assert target.options == {"username": "us@er", "password": "p/w:", "db": 3}
    assert target.label == "h:1234"
    assert parse_redis_url("redis://h", "store.url").addresses == (("h", 6379),)


def test_redis_url_of_a_socket() -> None:
    target = parse_redis_url("unix://u:p@/run/redis.sock?db=2", "store.url")
    assert target.addresses == ()
    assert target.label == "/run/redis.sock"
    assert target.options == {
        "username": "u",
        "password": "p",
        "path": "/run/redis.sock",
        "db": 2,
        "connection_class": UnixDomainSocketConnection,
    }


def test_redis_url_of_sentinels() -> None:
    target = parse_redis_url(
        "redis+sentinel://u:p%25@s1:26000,s2/my%2Fmain/4"
        "?sentinel_username=su&sentinel_password=s%26p",
        "store.url",
    )
    assert target.kind is RedisKind.SENTINEL
    assert target.addresses == (("s1", 26000), ("s2", 26379))
    assert target.service == "my/main"
    assert target.options == {"username": "u", "password": "p%", "db": 4}
    assert target.sentinel_options == {"username": "su", "password": "s&p"}


def test_redis_url_of_a_cluster_with_tls() -> None:
    target = parse_redis_url(
        "rediss+cluster://:pw@a,b:7000,[::1]:7001?ssl_ca_certs=/ca.pem&ssl_check_hostname=no",
        "store.url",
    )
    assert target.kind is RedisKind.CLUSTER
    assert target.addresses == (("a", 6379), ("b", 7000), ("::1", 7001))
    assert target.options == {
        "password": "pw",
        "connection_class": SSLConnection,
        "ssl_ca_certs": "/ca.pem",
        "ssl_check_hostname": False,
    }


def test_redis_url_tls_of_sentinels_is_that_of_their_service() -> None:
    target = parse_redis_url("rediss+sentinel://:pw@s/m?ssl_ca_certs=/ca.pem", "store.url")
    assert target.sentinel_options == {
        "connection_class": SSLConnection,
        "ssl_ca_certs": "/ca.pem",
    }


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hun/ter2@host:1",
        "redis://user:1234#hunter2@host",
        "redis://user:1234?hunter2@host",
        "redis+sentinel://user:1234/hunter2@host/0",
        "redis+cluster://user:1234?ssl_ca_certs=hunter2@host",
        "redis://:hunter2@host:1/0#",
        "redis://:hunter2@host:port",
        "redis://:hunter2@h:99999",
        "redis://:hunter2@",
        "redis://:hunter2@h/one",
        "redis://:hunter2@h?socket_timeout=9",
        "redis://:hunter2@h?password=hunter2&x=1",
        "unix://:hunter2@",
        "unix+cluster://:hunter2@/path",
        "redis+sentinel://:hunter2@h",
        "redis+sentinel://:hunter2@h,/m",
        "redis+cluster://:hunter2@h/1",
        "redis+other://:hunter2@h",
    ],
)
def test_redis_url_that_cannot_be_read_is_refused_without_its_text(url: str) -> None:
    with pytest.raises(ConfigError, match=r"store\.kv_url cannot be read") as caught:
        parse_redis_url(url, "store.kv_url")
    assert caught.value.field == "store.kv_url"
    assert "ter2" not in str(caught.value)
    assert caught.value.__suppress_context__  # a traceback does not show the parser's text either


def test_redis_url_target_does_not_show_its_passwords() -> None:
    target = parse_redis_url("redis+sentinel://:hunter2@h/m?sentinel_password=hunter3", "store.url")
    assert "hunter" not in repr(target) + target.label
