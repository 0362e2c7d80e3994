"""The guardian of a process: ends it where it hangs, and what it leaves behind where it dies.

    process ──lines through a pipe──► guardian
            ◄──a byte for each tick──

    beat                the process lives
    limit SECONDS       from now on it is killed where no line comes for so long; 0: never
    child PID START     ends with the process: killed where it is still there a little later
    name NAME           of shared memory: removed after the process
    end of the lines    the process has ended, or is about to

A program of its own (`python -I -S guardian.py PID`), of a few megabytes, since it imports next to
nothing. It is the process's child, so the process's number cannot be used again under its eyes. Its
own ticks are counted, as in liveness.py: where the whole machine stood still nobody is killed. Nor
is a tick counted during which the process had work and no processor: it is not the one that hangs.
"""

import os
import select
import signal
import sys
import time

TICK_S = 0.1
GRACE_S = 0.3  # for what ends by itself when the process is gone
MAX_SPARED = 10  # times the limit; a process that gets no processor for so long is of no use
_SHARED_MEMORY = "/dev/shm/"
_CLOCK_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")


def start_of(pid: int) -> str:
    """Return when a process started, in ticks of the machine's clock; nothing if it has ended."""
    state, *fields = _fields(f"/proc/{pid}/stat")
    return "" if state in (b"", b"Z", b"X") else fields[18].decode()


def used_s(pid: int) -> float:
    """Return the processor time that a process has used, seconds; 0 of one that has ended."""
    fields = _fields(f"/proc/{pid}/stat")
    return sum(map(int, fields[11:13])) * _CLOCK_TICK_S


def num_wanted(pid: int) -> int:
    """Return how many processors a process could use: its threads that run or wait for one.

    As many as it may run on at the most; 0 for a process that has ended.
    """
    folder = f"/proc/{pid}/task/"
    try:
        threads = os.listdir(folder)  # noqa: PTH208 - pathlib is heavy
        most = len(os.sched_getaffinity(pid))
    except OSError:
        return 0
    return min(most, sum(_fields(f"{folder}{thread}/stat")[0] == b"R" for thread in threads))


def _fields(path: str) -> list[bytes]:
    """Return what follows the name in a file `stat`, the state first; nothing of a lost thread."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - pathlib is heavy
            return file.read().rpartition(b")")[2].split()
    except OSError:
        return [b""]


class Guardian:
    """Watches its parent.

    Args:
        pid: Of the parent.
        pipe: Descriptor that the parent's lines come from.
        answers: Descriptor of another pipe: a byte for each tick goes to it.
    """

    def __init__(self, pid: int, pipe: int, answers: int) -> None:
        self._pid = pid
        self._pipe = pipe
        self._answers = answers
        self._rest = b""  # of a line whose end has not come
        self._limit_s = 0.0
        self._silent_s = 0.0
        self._spared_s = 0.0  # of the silence, since the last line
        self._used_s = 0.0  # processor time of the parent, at the last tick
        self._children: dict[int, str] = {}
        self._names: dict[str, None] = {}

    @property
    def is_too_silent(self) -> bool:
        """Whether the parent is to be killed."""
        return 0 < self._limit_s < self._silent_s

    def run(self) -> None:
        """Watch until the parent has ended, then remove what it has left."""
        before_s = time.monotonic()
        while self._read() and os.getppid() == self._pid:
            self._answer()
            now_s = time.monotonic()
            self._tick(now_s - before_s)
            before_s = now_s
            if self.is_too_silent:
                _kill(self._pid)
                self._remove(0.0)  # what belongs to a process that hung has had time enough
                _say(f"process {self._pid} did not run for {self._limit_s:g} s and was killed")
                return
        self._remove(GRACE_S)

    def _tick(self, elapsed_s: float) -> None:
        """Count a tick as silence, unless the parent was kept from running."""
        before_s, self._used_s = self._used_s, used_s(self._pid)
        is_suspect = 0 < self._limit_s < 2 * self._silent_s
        if is_suspect and self._spared_s < MAX_SPARED * self._limit_s:
            lacked_s = num_wanted(self._pid) * elapsed_s - (self._used_s - before_s)
            if lacked_s >= 0.5 * elapsed_s:  # half a processor
                self._spared_s += elapsed_s
                return
        self._silent_s += min(elapsed_s, 2 * TICK_S)

    def _read(self) -> bool:
        """Wait for lines, a tick at the most; return whether the parent's end is open."""
        if not select.select([self._pipe], [], [], TICK_S)[0]:
            return True
        data = os.read(self._pipe, 65536)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._take(line.decode().split(" "))
            self._silent_s = self._spared_s = 0.0
        return bool(data)

    def _answer(self) -> None:
        try:
            os.write(self._answers, b".")
        except OSError:  # it is full: the parent stands still; or closed, then so are the lines
            return

    def _take(self, words: list[str]) -> None:
        if words[0] == "limit":
            self._limit_s = float(words[1])
        elif words[0] == "child":
            known = self._children.items()
            self._children = {pid: start for pid, start in known if start_of(pid) == start}
            self._children[int(words[1])] = words[2]
        elif words[0] == "name":
            self._names[words[1]] = None

    def _remove(self, grace_s: float) -> None:
        deadline_s = time.monotonic() + grace_s
        while self._living() and time.monotonic() < deadline_s:
            time.sleep(0.01)
        for pid in self._living():
            _kill(pid)
        for name in self._names:
            _unlink(name)

    def _living(self) -> list[int]:
        return [pid for pid, start in self._children.items() if start_of(pid) == start]


def _say(line: str) -> None:
    try:
        if select.select([], [2], [], 0.0)[1]:  # it waits for nobody who does not read
            os.write(2, f"guardian: {line}\n".encode())
    except OSError:  # nobody can read any more
        return


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError:
        return


def _unlink(name: str) -> None:
    try:
        os.unlink(_SHARED_MEMORY + name)  # noqa: PTH108 - pathlib is heavy
    except OSError:
        return


def _main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it goes after its parent, whoever ends the rest
    os.set_blocking(sys.stdout.fileno(), False)  # a parent that reads nothing is watched as well
    Guardian(int(sys.argv[1]), sys.stdin.fileno(), sys.stdout.fileno()).run()


if __name__ == "__main__":
    _main()
