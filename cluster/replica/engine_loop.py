"""An engine in a thread of its own: commands in, updates out.

The engine is not thread-safe and need not be: only this thread touches it. Commands wait in one
bounded queue and are taken between two steps.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from cluster.engine.engine import Engine
from cluster.errors import OverloadedError, SluiceError, UnavailableError
from cluster.replica.processes import ThreadClock
from cluster.types import EngineOutput, EngineRequest, ReplicaLoad

logger = logging.getLogger(__name__)

STEP_TIMES_INTERVAL_S = 60.0
"""Between two updates with what is known of the steps' times; each one is written to a file."""


@dataclass(frozen=True, slots=True)
class EngineUpdate:
    """What changed since the update before."""

    outputs: list[EngineOutput] = field(default_factory=list)
    added_blocks: list[bytes] = field(default_factory=list)  # hashes now in the prefix cache
    removed_blocks: list[bytes] = field(default_factory=list)  # hashes no longer there
    load: ReplicaLoad | None = None  # where it is time to tell it
    step_times: list[tuple[float, ...]] | None = None  # all that are known, where it is time to


@dataclass(frozen=True, slots=True)
class _Flush:
    """Forget cached blocks."""

    done: Future[int]  # how many


@dataclass(slots=True)
class _Preload:
    """Fetch blocks from the store."""

    hashes: Sequence[bytes]
    done: Future[int]  # how many have come
    num_before: int = 0  # of the engine's count, when it began


@dataclass(frozen=True, slots=True)
class _HandOver:
    """End a request so that another replica goes on with it."""

    request_id: str


# A string is the id of a request to abort.
_Command = EngineRequest | str | _HandOver | _Flush | _Preload


class EngineLoop:
    """Steps an engine for as long as there is work.

    Args:
        engine: Belongs to the loop from `start` on.
        publish: Called in the loop's thread with every update; must not block.
        fail: Called in the loop's thread when the engine cannot go on, after the last update.
        load_interval_s: Between two load reports.
        max_commands: Bound of the queue.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        publish: Callable[[EngineUpdate], None],
        fail: Callable[[str], None],
        load_interval_s: float,
        max_commands: int,
    ) -> None:
        self._engine = engine
        self._publish = publish
        self._fail = fail
        self._load_interval_s = load_interval_s
        self._max_commands = max_commands
        self._commands: deque[_Command] = deque()
        self._preloads: list[_Preload] = []  # that have begun
        self._wakeup = threading.Condition()
        self._is_stopping = False
        self._load_due_s = 0.0
        self._step_times_due_s = time.monotonic() + STEP_TIMES_INTERVAL_S
        self._num_told_steps = engine.step_time.num_steps
        self._step_began_s: float | None = None
        self._clock: ThreadClock | None = None  # of the thread
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to step."""
        self._thread.start()

    @property
    def num_commands(self) -> int:
        """Commands that wait for the present step to end."""
        return len(self._commands)

    @property
    def step_age_s(self) -> float:
        """For how long the present step has been running, seconds; 0 between two steps."""
        began_s = self._step_began_s
        return 0.0 if began_s is None else time.monotonic() - began_s

    @property
    def cpu_s(self) -> float:
        """Processor time that the loop's thread has used, seconds."""
        return self._clock.read() if self._clock is not None else 0.0

    @property
    def is_running(self) -> bool:
        """Whether the engine belongs to the loop's thread still."""
        return self._thread.is_alive()

    def submit(self, request: EngineRequest) -> None:
        """Hand a request to the engine; what becomes of it arrives in updates.

        Raises:
            OverloadedError: The queue is full.
        """
        self._enter(request)

    def abort(self, request_id: str) -> None:
        """End a request; its blocks are free before the next step. Unknown ids are fine."""
        self._end_request(request_id)

    def hand_over(self, request_id: str) -> None:
        """Have a request end as MOVED, when its blocks are stored. Unknown ids are fine.

        To be called once for a request, since the queue does not bound these.
        """
        self._end_request(_HandOver(request_id))

    def preload(self, hashes: Sequence[bytes]) -> Future[int]:
        """Fetch blocks from the store into the host tier; the result is how many have come.

        Raises:
            OverloadedError: The queue is full.
        """
        done: Future[int] = Future()
        self._enter(_Preload(hashes, done))
        return done

    def flush_cache(self) -> Future[int]:
        """Forget every cached block that no request uses; the result is how many there were.

        Raises:
            OverloadedError: The queue is full.
        """
        done: Future[int] = Future()
        self._enter(_Flush(done))
        return done

    def stop(self, timeout_s: float) -> None:
        """Let the present step finish, then end the thread; what it promised fails."""
        with self._wakeup:
            self._is_stopping = True
            self._wakeup.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _end_request(self, command: str | _HandOver) -> None:
        with self._wakeup:
            self._commands.append(command)  # no more of these than of requests
            self._wakeup.notify()

    def _enter(self, command: _Command) -> None:
        with self._wakeup:
            if self._is_stopping:
                raise UnavailableError("the engine has stopped: ask another replica")
            if len(self._commands) >= self._max_commands:
                raise OverloadedError(
                    f"{len(self._commands)} requests wait for the engine, "
                    f"limit={self._max_commands}: try again later"
                )
            self._commands.append(command)
            self._wakeup.notify()

    def _run(self) -> None:
        self._clock = ThreadClock()
        try:
            while not self._is_stopping:
                self._turn()
        except BaseException as error:  # the group has failed: everybody has to hear of it
            logger.exception("the engine failed")
            reason = str(error) if isinstance(error, SluiceError) else repr(error)
            self._publish(EngineUpdate(self._engine.abort_all(f"LOST: {reason}")))
            self._fail(reason)
        finally:
            self._break_promises()

    def _break_promises(self) -> None:
        with self._wakeup:
            self._is_stopping = True
            waiting = [c for c in self._commands if isinstance(c, (_Flush, _Preload))]
        begun = [*self._preloads, *(c for c in waiting if c.done.set_running_or_notify_cancel())]
        for command in begun:
            command.done.set_exception(UnavailableError("the engine has stopped"))

    def _turn(self) -> None:
        commands = self._take()
        self._step_began_s = time.monotonic()  # whatever a turn does may hang
        outputs = [output for command in commands if (output := self._apply(command))]
        outputs += self._engine.step()
        self._end_preloads()
        added, removed = self._engine.take_block_events()
        load = None
        now_s = time.monotonic()
        if now_s >= self._load_due_s:
            load = self._engine.load()
            self._load_due_s = now_s + self._load_interval_s
        step_times = None
        model = self._engine.step_time
        if now_s >= self._step_times_due_s and model.num_steps > self._num_told_steps:
            step_times, self._num_told_steps = model.snapshot(), model.num_steps
            self._step_times_due_s = now_s + STEP_TIMES_INTERVAL_S
        if outputs or added or removed or load is not None or step_times:
            self._publish(EngineUpdate(outputs, added, removed, load, step_times))
        self._step_began_s = None

    def _take(self) -> list[_Command]:
        with self._wakeup:
            if not self._commands and not self._engine.has_work:
                self._wakeup.wait(self._load_interval_s)
            commands = list(self._commands)
            self._commands.clear()
        return commands

    def _apply(self, command: _Command) -> EngineOutput | None:
        if isinstance(command, str):
            self._engine.abort(command)
        elif isinstance(command, _HandOver):
            self._engine.hand_over(command.request_id)
        elif isinstance(command, EngineRequest):
            return self._add(command)
        elif not command.done.set_running_or_notify_cancel():
            pass  # nobody waits for it any more; from here on it cannot be cancelled
        elif isinstance(command, _Flush):
            command.done.set_result(self._engine.flush_cache())
        else:
            command.num_before = self._engine.num_preloaded
            self._engine.preload(command.hashes)
            self._preloads.append(command)
        return None

    def _add(self, request: EngineRequest) -> EngineOutput | None:
        try:
            self._engine.add(request)
        except SluiceError as error:
            return EngineOutput(request.request_id, error=f"{error.code}: {error}")
        return None

    def _end_preloads(self) -> None:
        if not self._preloads or self._engine.num_preloading:
            return
        for preload in self._preloads:
            preload.done.set_result(self._engine.num_preloaded - preload.num_before)
        self._preloads.clear()
