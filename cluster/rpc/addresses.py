"""The gateways that a client knows."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.errors import ConfigError


class Addresses:
    """Addresses of gateways in the caller's order, and which of them answered last.

    Args:
        address: host:port of a gateway, or several of them.

    Raises:
        ConfigError: There is none, or one is empty.
    """

    def __init__(self, address: str | Sequence[str]) -> None:
        self._known = (address,) if isinstance(address, str) else tuple(address)
        if not self._known or not all(self._known):
            raise ConfigError(
                f"address={address!r}: give host:port of at least one gateway, and none empty",
                field="address",
            )
        self.first = 0  # index of the one to ask first
        self.is_reached = False  # whether any gateway has ever answered

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._known)

    def __getitem__(self, index: int) -> str:
        """Return the one at an index."""
        return self._known[index]

    def in_turn(self) -> list[int]:
        """Return the index of each, those to ask first foremost."""
        return [(self.first + offset) % len(self) for offset in range(len(self))]

    def after(self, index: int) -> int:
        """Return the index of the one to ask after one that failed."""
        return (index + 1) % len(self)

    def answered(self, index: int) -> None:
        """Note that a gateway does its work: it is asked first from now on."""
        self.first, self.is_reached = index, True
