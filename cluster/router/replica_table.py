"""The replicas that can be routed to, and what each one has to do.

A leader pushes its load a few times a second. Between two reports this gateway may send it many
requests, so what it sent is added until a report must contain it:

    load report          k                k+1               k+2
    ---------------------|-----------------|-----------------|------> time
    sent here                  fresh            settling        in the report, forgotten

A request sent just before report k+1 may have missed it, but not k+2. One that ends before that is
forgotten at once. Time forgets the others, so no lost answer can leave a count behind.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.types import ReplicaInfo, ReplicaLoad, ReplicaSnapshot


@dataclass(slots=True)
class _Entry:
    info: ReplicaInfo
    load: ReplicaLoad
    # Prompt tokens to compute, by request.
    fresh: dict[str, int] = field(default_factory=dict)  # since the last report
    settling: dict[str, int] = field(default_factory=dict)  # between the last two reports


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
        entry.settling, entry.fresh = entry.fresh, {}
        return is_turning

    def on_submit(self, replica_id: str, request_id: str, num_prefill_tokens: int) -> None:
        """Count a request sent to a replica, with the prompt tokens that it has to compute."""
        entry = self._entries.get(replica_id)
        if entry is not None:
            entry.fresh[request_id] = num_prefill_tokens

    def on_end(self, replica_id: str, request_id: str) -> None:
        """Count a request no more; unknown already is fine."""
        entry = self._entries.get(replica_id)
        if entry is not None:
            entry.fresh.pop(request_id, None)
            entry.settling.pop(request_id, None)

    def snapshots(self) -> list[ReplicaSnapshot]:
        """Return all replicas, ordered by id."""
        return [
            ReplicaSnapshot(
                info=entry.info,
                load=entry.load,
                num_inflight=len(entry.fresh) + len(entry.settling),
                num_inflight_prefill_tokens=(
                    sum(entry.fresh.values()) + sum(entry.settling.values())
                ),
            )
            for _, entry in sorted(self._entries.items())
        ]
