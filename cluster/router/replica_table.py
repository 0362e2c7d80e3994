"""The replicas that can be routed to, and what each one has to do, as columns.

A leader pushes its load a few times a second. Between two reports this gateway may send it many
requests, so what it sent is added until a report must contain it:

    load report          k                k+1               k+2
    ---------------------|-----------------|-----------------|------> time
    sent here                  fresh            settling        in the report, forgotten

A request sent just before report k+1 may have missed it, but not k+2. One that ends before that is
forgotten at once. Time forgets the others, so no lost answer can leave a count behind.

A decision looks at every replica, so each figure of all replicas stands in one array: row i of
every column is one replica, rows 0 to len - 1 are in use, the last one moves into the place of one
that leaves.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cluster.router.correction import Correction, RiskModel
from cluster.types import MAX_DUE_WORKS, ReplicaInfo, ReplicaLoad, ReplicaSnapshot

Floats = npt.NDArray[np.float64]

_MAX_SENT = 16  # requests of a row that are told apart by when they are due
_FIRST_CAPACITY = 16
_REPORTED_AND_SENT = np.repeat(np.eye(2), (MAX_DUE_WORKS, _MAX_SENT), axis=0)  # which is which
_COLUMNS = (
    "num_requests",  # running and waiting, by the last report
    "num_waiting",  # by the last report
    "queued_tokens",  # of prompts, by the last report
    "free_blocks",
    "prefill_token_s",
    "prompt_work_s",
    "decode_step_s",
    "sequence_s",  # of one more sequence in a step
    "context_s",  # of one more token of context in a step
    "fetch_block_s",
    "reported_s",  # when the last report came
    "block_size",
    "max_model_len",
    "num_sent",  # not in the report yet
    "sent_tokens",  # likewise: prompt tokens to compute
    "sent_blocks",  # likewise: KV blocks to be taken
    "sent_s",  # likewise: seconds of prefill that found no place of their own
    "sent_work_s",  # likewise: all seconds of prefill
    "reported_work_s",  # seconds of prefill in the last report, late ones included
    "num_open",  # sent by this gateway and not ended
    "median",  # of measured over predicted time to the first token
    "is_open",  # 1: takes requests; 0: drains
)


@dataclass(frozen=True, slots=True)
class Sent:
    """A request on its way to a replica."""

    num_tokens: int  # of its prompt, to be computed
    num_blocks: int = 0  # KV blocks that it needs and does not find there
    work_s: float = 0.0  # predicted prefill
    due_s: float = np.inf  # when its first token is due, by the gateway's clock


@dataclass(slots=True)
class _Entry:
    info: ReplicaInfo
    load: ReplicaLoad
    correction: Correction
    fresh: dict[str, Sent] = field(default_factory=dict)  # since the last report
    settling: dict[str, Sent] = field(default_factory=dict)  # between the last two reports
    open: dict[str, None] = field(default_factory=dict)  # sent and not ended


class ReplicaTable:
    """Replicas by id, each with its last load report and what it may not contain.

    Args:
        miss_probability: Of the admitted requests so many may miss their objective.
    """

    def __init__(self, *, miss_probability: float = 0.1) -> None:
        self.risk = RiskModel(miss_probability)
        self._entries: dict[str, _Entry] = {}
        self._row_of: dict[str, int] = {}
        self.ids: list[str] = []  # by row
        self.kinds: list[tuple[str, int, str]] = []  # by row: fingerprint, block size, model
        self._columns = {name: np.zeros(_FIRST_CAPACITY) for name in _COLUMNS}
        self._due = np.full((_FIRST_CAPACITY, MAX_DUE_WORKS + _MAX_SENT), np.inf)
        self._work = np.zeros((_FIRST_CAPACITY, MAX_DUE_WORKS + _MAX_SENT))
        self.version = 0  # another one whenever a row came or went

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, replica_id: str) -> bool:
        return replica_id in self._entries

    def add(self, info: ReplicaInfo, load: ReplicaLoad, *, now_s: float = 0.0) -> None:
        """Begin to know a replica, or begin anew after its connection was lost."""
        self.remove(info.replica_id)
        row = len(self.ids)
        if row == len(self._due):
            self._grow()
        self._entries[info.replica_id] = _Entry(info, load, Correction())
        self._row_of[info.replica_id] = row
        self.ids.append(info.replica_id)
        self.kinds.append((info.fingerprint, info.block_size, info.model))
        self.version += 1
        self._clear(row)
        self._set(row, "block_size", info.block_size)
        self._set(row, "max_model_len", info.max_model_len)
        self._write_correction(row)
        self._write_load(row, load, now_s)

    def remove(self, replica_id: str) -> None:
        """Forget a replica; unknown already is fine."""
        if self._entries.pop(replica_id, None) is None:
            return
        row, last = self._row_of.pop(replica_id), len(self.ids) - 1
        self.version += 1
        if row != last:
            for column in self._columns.values():
                column[row] = column[last]
            self._due[row], self._work[row] = self._due[last], self._work[last]
            self.ids[row], self.kinds[row] = self.ids[last], self.kinds[last]
            self._row_of[self.ids[row]] = row
        self.ids.pop()
        self.kinds.pop()

    def on_load(self, replica_id: str, load: ReplicaLoad, *, now_s: float = 0.0) -> bool:
        """Take a load report; return whether the replica has begun or ended to drain.

        That of an unknown replica is ignored.
        """
        entry = self._entries.get(replica_id)
        if entry is None:
            return False
        is_turning = load.is_draining != entry.load.is_draining
        entry.load = load
        entry.settling, entry.fresh = entry.fresh, {}
        self._write_load(self._row_of[replica_id], load, now_s)
        return is_turning

    def on_submit(self, replica_id: str, request_id: str, sent: Sent) -> None:
        """Count a request sent to a replica."""
        entry = self._entries.get(replica_id)
        if entry is not None:
            entry.fresh[request_id] = sent
            entry.open[request_id] = None
            self._write_sent(self._row_of[replica_id], entry)

    def on_end(self, replica_id: str, request_id: str) -> None:
        """Count a request no more; unknown already is fine."""
        entry = self._entries.get(replica_id)
        if entry is not None:
            entry.fresh.pop(request_id, None)
            entry.settling.pop(request_id, None)
            entry.open.pop(request_id, None)
            self._write_sent(self._row_of[replica_id], entry)

    def on_first_token(self, replica_id: str, *, predicted_s: float, actual_s: float) -> None:
        """Learn how long a request's first token took that was predicted without correction."""
        entry = self._entries.get(replica_id)
        if entry is not None:
            entry.correction.observe(predicted_s, actual_s)
            self._write_correction(self._row_of[replica_id])

    def column(self, name: str) -> Floats:
        """Return one figure of all replicas, by row; not to be changed or kept."""
        return self._columns[name][: len(self.ids)]

    def row_of(self, replica_id: str) -> int | None:
        """Return the row of a replica, until one comes or goes."""
        return self._row_of.get(replica_id)

    def work_before(self, due_s: float, now_s: float) -> Floats:
        """Return the seconds of prefill, by row, that come before a prompt that is due then.

        What a replica has done since its report is taken off; what is due at the same time or has
        been sent there counts as before.
        """
        if due_s == np.inf:
            return self.backlog(now_s)
        num_rows = len(self.ids)
        is_before = self._due[:num_rows] <= due_s
        # Products with zeros and ones: sums of short rows cost several times as much.
        sums = (self._work[:num_rows] * is_before).dot(_REPORTED_AND_SENT)
        reported = sums[:, 0] - (now_s - self.column("reported_s"))
        total: Floats = np.maximum(reported, 0.0, out=reported)
        total += sums[:, 1]
        total += self.column("sent_s")
        return total

    def backlog(self, now_s: float) -> Floats:
        """Return the seconds of prefill, by row, of all prompts, whenever they are due."""
        reported = self.column("reported_work_s") - (now_s - self.column("reported_s"))
        total: Floats = np.maximum(reported, 0.0, out=reported)
        total += self.column("sent_work_s")
        return total

    def snapshots(self) -> list[ReplicaSnapshot]:
        """Return all replicas, ordered by id."""
        return [
            ReplicaSnapshot(
                info=entry.info,
                load=entry.load,
                num_inflight=len(entry.fresh) + len(entry.settling),
                num_inflight_prefill_tokens=sum(
                    sent.num_tokens for sent in (*entry.fresh.values(), *entry.settling.values())
                ),
            )
            for _, entry in sorted(self._entries.items())
        ]

    def check_invariants(self) -> None:
        """Assert that rows, entries and columns agree."""
        assert sorted(self.ids) == sorted(self._entries) == sorted(self._row_of)
        for row, replica_id in enumerate(self.ids):
            entry = self._entries[replica_id]
            assert self._row_of[replica_id] == row
            assert self.kinds[row][:2] == (entry.info.fingerprint, entry.info.block_size)
            assert self._columns["num_open"][row] == len(entry.open)
            assert self._columns["num_sent"][row] == len(entry.fresh) + len(entry.settling)

    def _set(self, row: int, name: str, value: float) -> None:
        self._columns[name][row] = value

    def _clear(self, row: int) -> None:
        for column in self._columns.values():
            column[row] = 0.0
        self._due[row], self._work[row] = np.inf, 0.0

    def _grow(self) -> None:
        for name, column in self._columns.items():
            self._columns[name] = np.concatenate([column, np.zeros_like(column)])
        self._due = np.concatenate([self._due, np.full_like(self._due, np.inf)])
        self._work = np.concatenate([self._work, np.zeros_like(self._work)])

    def _write_load(self, row: int, load: ReplicaLoad, now_s: float) -> None:
        cost = load.step_cost
        values = {
            "num_requests": load.num_running + load.num_waiting,
            "num_waiting": load.num_waiting,
            "queued_tokens": load.num_queued_prefill_tokens,
            "free_blocks": load.num_free_blocks,
            "prefill_token_s": load.prefill_token_s,
            "prompt_work_s": cost.prompt_work_s if cost else 0.0,
            "decode_step_s": load.decode_step_s,
            "sequence_s": cost.sequence_s + cost.token_s if cost else 0.0,
            "context_s": cost.context_s if cost else 0.0,
            "fetch_block_s": load.fetch_block_s,
            "reported_work_s": load.late_s + sum(item.work_s for item in load.due),
            "reported_s": now_s,
            "is_open": 0.0 if load.is_draining else 1.0,
        }
        for name, value in values.items():
            self._columns[name][row] = value
        due, work = self._due[row], self._work[row]
        due[:MAX_DUE_WORKS], work[:MAX_DUE_WORKS] = np.inf, 0.0
        for index, item in enumerate(load.due[:MAX_DUE_WORKS]):
            due[index], work[index] = now_s + item.due_s, item.work_s
        self._write_sent(row, self._entries[self.ids[row]])

    def _write_sent(self, row: int, entry: _Entry) -> None:
        due, work = self._due[row, MAX_DUE_WORKS:], self._work[row, MAX_DUE_WORKS:]
        due[:], work[:] = np.inf, 0.0
        num_sent = num_tokens = num_blocks = 0
        rest_s = all_s = 0.0
        for sent in (*entry.settling.values(), *entry.fresh.values()):
            if num_sent < _MAX_SENT:
                due[num_sent], work[num_sent] = sent.due_s, sent.work_s
            else:
                rest_s += sent.work_s
            all_s += sent.work_s
            num_sent += 1
            num_tokens += sent.num_tokens
            num_blocks += sent.num_blocks
        columns = self._columns
        columns["num_sent"][row], columns["sent_tokens"][row] = num_sent, num_tokens
        columns["sent_blocks"][row], columns["sent_s"][row] = num_blocks, rest_s
        columns["sent_work_s"][row] = all_s
        columns["num_open"][row] = len(entry.open)

    def _write_correction(self, row: int) -> None:
        self._columns["median"][row] = self._entries[self.ids[row]].correction.median
