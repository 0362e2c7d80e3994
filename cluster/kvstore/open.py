"""From a configuration to the stores that it names."""

from __future__ import annotations

from cluster.clock import Clock, WallClock
from cluster.config import StoreConfig
from cluster.errors import ConfigError
from cluster.kvstore.block_store import BlockStore
from cluster.kvstore.guarded import Guard, GuardedBlocks, GuardedStore
from cluster.kvstore.store import Store

SCHEMES = (
    "redis",
    "rediss",
    "unix",
    "redis+sentinel",
    "rediss+sentinel",
    "redis+cluster",
    "rediss+cluster",
)


def open_store(config: StoreConfig, clock: Clock | None = None) -> GuardedStore:
    """Return the store of `config.resolved_url`; nothing is waited for before its first call.

    The embedded store needs a Ray that is initialised; where it is created by this call, its first
    calls may raise `UnavailableError` until it has started.

    Args:
        config: Of the store.
        clock: Of the circuit breaker; None: the machine's.

    Raises:
        ConfigError: The URL's scheme is not one of `SCHEMES`, or the rest cannot be read.
    """
    if _is_embedded(config.resolved_url, "store.url"):
        # Imported here: who uses one kind of store does not pay for the other.
        from cluster.kvstore.embedded_actor import EmbeddedStoreClient, get_or_create_actor

        store: Store = EmbeddedStoreClient(get_or_create_actor(config), config.timeout_s)
    else:
        from cluster.kvstore.redis_store import RedisStore

        store = RedisStore(config)
    return GuardedStore(store, Guard(config, clock or WallClock()))


def open_block_store(
    config: StoreConfig, *, guarded: bool = True, clock: Clock | None = None
) -> BlockStore | None:
    """Return the store of KV blocks of `config.resolved_kv_url`; None for 'off'.

    As for `open_store`, nothing is waited for.

    Args:
        config: Of the store.
        guarded: Bound the calls in flight and break the circuit, for who has no breaker of its own.
        clock: Of the circuit breaker; None: the machine's.

    Raises:
        ConfigError: The URL's scheme is not one of `SCHEMES`, or the rest cannot be read.
    """
    url = config.resolved_kv_url
    if url == "off":
        return None
    if _is_embedded(url, "store.kv_url" if config.kv_url else "store.url"):
        from cluster.kvstore.embedded_actor import EmbeddedBlocksClient, get_or_create_actor

        blocks: BlockStore = EmbeddedBlocksClient(get_or_create_actor(config), config.timeout_s)
    else:
        from cluster.kvstore.redis_blocks import RedisBlocks

        blocks = RedisBlocks(config)
    return GuardedBlocks(blocks, Guard(config, clock or WallClock())) if guarded else blocks


def _is_embedded(url: str, field: str) -> bool:
    """Return whether a URL names the embedded store rather than Redis.

    Raises:
        ConfigError: It names neither.
    """
    if url == "embedded":
        return True
    scheme, separator, _ = url.partition("://")
    if separator and scheme in SCHEMES:
        return False
    # Without a separator the text may be anything, a password too: it is not repeated.
    got = f"scheme {scheme!r}" if separator else "no scheme"
    raise ConfigError(f"{field} has {got}: use embedded, {'://, '.join(SCHEMES)}://", field=field)
