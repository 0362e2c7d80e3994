"""From a configuration to the store that it names."""

from __future__ import annotations

from cluster.config import StoreConfig
from cluster.errors import ConfigError
from cluster.kvstore.store import Store

SCHEMES = ("embedded", "redis", "rediss", "unix")


def open_store(config: StoreConfig) -> Store:
    """Return the store of `config.resolved_url`; nothing is waited for before its first call.

    The embedded store needs a Ray that is initialised; where it is created by this call, its first
    calls may raise `UnavailableError` until it has started.

    Raises:
        ConfigError: The URL's scheme is not one of `SCHEMES`, or the rest cannot be read.
    """
    url = config.resolved_url
    scheme, separator, _ = url.partition("://")
    if url == "embedded":
        # Imported here: who uses one kind of store does not pay for the other.
        from cluster.kvstore.embedded_actor import EmbeddedStoreClient, get_or_create_actor

        return EmbeddedStoreClient(get_or_create_actor(config), config.timeout_s)
    if separator and scheme in SCHEMES[1:]:
        from cluster.kvstore.redis_store import RedisStore

        return RedisStore(config)
    # Without a separator the text may be anything, a password too: it is not repeated.
    got = f"scheme {scheme!r}" if separator else "no scheme"
    raise ConfigError(
        f"store.url has {got}: use embedded, redis://, rediss:// or unix://", field="store.url"
    )
