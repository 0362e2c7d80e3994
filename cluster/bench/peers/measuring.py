"""Get the peers ready, and measure one of them in a fresh process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.bench.peers.comparison import FIGURES
from cluster.bench.peers.environments import Environments
from cluster.bench.peers.peers import PEERS, SLUICE, peer_command, sluice_command
from cluster.bench.peers.processes import RunFailedError, last_object, run_command
from cluster.bench.peers.rows import Row


@dataclass(slots=True)
class Measuring:
    """What a run needs beside its turn."""

    environments: Environments
    model: Path  # the checkpoint
    threads: int  # cores for each
    seed: int  # of the prompts
    timeout_s: float  # of one run
    broken: dict[tuple[str, str], str] = field(default_factory=dict)  # (peer, scheme): why

    def prepare(self, rows: Sequence[Row], on_step: Callable[[str], object]) -> None:
        """Install and convert what the rows need; what fails is kept in `broken`.

        Args:
            rows: What will be run.
            on_step: Told what is begun, as a line of text.
        """
        needed = dict.fromkeys((peer, row.scheme) for row in rows for peer in row.peers)
        for name, scheme in needed:
            if name == SLUICE:
                continue
            try:
                if not self.environments.is_installed(PEERS[name]):
                    on_step(f"{name}: making its environment, minutes")
                    self.environments.install(PEERS[name])
                self.environments.export(PEERS[name], self.model, scheme)
            except RunFailedError as error:
                self.broken[name, scheme] = str(error)

    def measure(self, row: Row, name: str, round_number: int) -> Mapping[str, float]:
        """Run one turn in a fresh process and return its figures.

        Raises:
            RunFailedError: It could not be prepared, failed, took too long, or gave no figures.
        """
        if reason := self.broken.get((name, row.scheme)):
            raise RunFailedError(reason)
        log = self.environments.log(f"{row.name}-{name}-{round_number}")
        if name == SLUICE:
            command = sluice_command(self.model, row, self.threads, self.seed)
            answer = last_object(run_command(command, log, self.timeout_s))
            figures: Mapping[str, float] = answer.get("result", {})
        else:
            peer = PEERS[name]
            model = self.environments.export(peer, self.model, row.scheme)
            venv = self.environments.venv(peer)
            command = peer_command(peer, venv, model, row, self.threads, self.seed)
            figures = last_object(run_command(command, log, self.timeout_s))
        if missing := [figure for figure in FIGURES if figure not in figures]:
            raise RunFailedError(f"gave no {', '.join(missing)}")
        return figures
