"""How many prefixes there may be, and how much of that is one tenant's.

Every gateway reads all prefixes in one reply of the store, within one deadline: their number and
the sum of their tokens bound that reply.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.config import GatewayConfig
from cluster.errors import OverloadedError
from cluster.gateway.prefix_record import PrefixRecord


def check_room(record: PrefixRecord, known: Sequence[PrefixRecord], config: GatewayConfig) -> None:
    """Check that a prefix may be registered beside those that are.

    Where there are tenants, one of them has at most half of everything, so that none locks out the
    others.

    Raises:
        OverloadedError: It would be one too many, or their tokens would be; of all, or of its
            tenant.
    """
    _check(record, known, (config.max_prefixes, config.max_prefix_tokens_total), "")
    if record.tenant:
        own = [other for other in known if other.tenant == record.tenant]
        limits = ((config.max_prefixes + 1) // 2, (config.max_prefix_tokens_total + 1) // 2)
        _check(record, own, limits, " / 2 for one tenant")


def _check(
    record: PrefixRecord, known: Sequence[PrefixRecord], limits: tuple[int, int], share: str
) -> None:
    max_prefixes, max_tokens = limits
    if len(known) >= max_prefixes:
        raise OverloadedError(
            f"{len(known)} prefixes are registered, limit={max_prefixes} "
            f"(gateway.max_prefixes{share}): remove one first"
        )
    num_tokens = sum(other.num_tokens for other in known)
    if num_tokens + record.num_tokens > max_tokens:
        raise OverloadedError(
            f"registered prefixes have {num_tokens} tokens, with this one "
            f"{num_tokens + record.num_tokens}, limit={max_tokens} "
            f"(gateway.max_prefix_tokens_total{share}): remove one first"
        )
