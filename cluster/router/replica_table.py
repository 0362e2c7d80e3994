"""The replicas that can be routed to, and what each one has to do.

A leader pushes its load a few times a second. Between two reports this gateway may send it many
requests, so what it sent is added until a report must contain it:

    load report          k                k+1               k+2
    ---------------------|-----------------|-----------------|------> time
    sent here                  fresh            settling        in the report, forgotten

A request sent just before report k+1 may have missed it, but not k+2. Nothing is ever counted down,
so no lost answer can leave a counter behind.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.types import ReplicaInfo, ReplicaLoad, ReplicaSnapshot


@dataclass(slots=True)
class _Sent:
    num_requests: int = 0
    num_prefill_tokens: int = 0


@dataclass(slots=True)
class _Entry:
    info: ReplicaInfo
    load: ReplicaLoad
    fresh: _Sent = field(default_factory=_Sent)  # since the last report
    settling: _Sent = field(default_factory=_Sent)  # between the last two reports


class ReplicaTable:
    """Replicas by id, each with its last load report and what it may not contain."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, replica_id: str) -> bool:
        return replica_id in self._entries

    def add(self, info: ReplicaInfo, load: ReplicaLoad) -> None:
        """Begin to know a replica, or begin anew after its connection was lost."""
        self._entries[info.replica_id] = _Entry(info, load)

    def remove(self, replica_id: str) -> None:
        """Forget a replica; unknown already is fine."""
        self._entries.pop(replica_id, None)

    def on_load(self, replica_id: str, load: ReplicaLoad) -> bool:
        """Take a load report; return whether the replica has begun or ended to drain.

        That of an unknown replica is ignored.
        """
        entry = self._entries.get(replica_id)
        if entry is None:
            return False
        is_turning = load.is_draining != entry.load.is_draining
        entry.load = load
        entry.settling, entry.fresh = entry.fresh, _Sent()
        return is_turning

    def on_submit(self, replica_id: str, num_prefill_tokens: int) -> None:
        """Count a request sent to a replica, with the prompt tokens that it has to compute."""
        entry = self._entries.get(replica_id)
        if entry is not None:
            entry.fresh.num_requests += 1
            entry.fresh.num_prefill_tokens += num_prefill_tokens

    def snapshots(self) -> list[ReplicaSnapshot]:
        """Return all replicas, ordered by id."""
        return [
            ReplicaSnapshot(
                info=entry.info,
                load=entry.load,
                num_inflight=entry.fresh.num_requests + entry.settling.num_requests,
                num_inflight_prefill_tokens=(
                    entry.fresh.num_prefill_tokens + entry.settling.num_prefill_tokens
                ),
            )
            for _, entry in sorted(self._entries.items())
        ]
