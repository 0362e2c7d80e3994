"""Named files in shared memory: which came with a run of `sluice bench chaos` and are its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

FOLDER = Path("/dev/shm")
_OWN_PREFIXES = ("deepspeed", "psm_", "sem.", "sluice", "torch")


class SharedFiles:
    """The files that came since this was made; threads may share it.

    A file is the run's own by its name, or because one of the run's processes has mapped it at
    some time: behind a process that was killed nothing else says so. What another cluster makes on
    this machine meanwhile is taken for the run's.

    Args:
        mapped: Returns the paths that the run's processes map now. It reads the maps of all of
            them, so that it is asked only where a name says nothing.
        folder: Where the files lie.
    """

    def __init__(self, mapped: Callable[[], set[str]], folder: Path = FOLDER) -> None:
        self._mapped = mapped
        self._folder = folder
        self._older = frozenset(path.name for path in folder.iterdir())
        self._ever_mapped: set[str] = set()

    def note(self) -> None:
        """Look whether one of the run's processes maps what cannot be told by its name."""
        strangers = self._new() - set(self.names())
        if strangers:
            top = f"{self._folder}/"
            mapped = {path.removeprefix(top).split("/")[0] for path in self._mapped()}
            self._ever_mapped |= mapped

    def names(self) -> tuple[str, ...]:
        """Return the run's own files that are there now, sorted."""
        new = self._new()
        return tuple(
            sorted(n for n in new if n.startswith(_OWN_PREFIXES) or n in self._ever_mapped)
        )

    def _new(self) -> set[str]:
        return {path.name for path in self._folder.iterdir()} - self._older
