"""A peer's environment and its copy of the model: made once, used by every run.

<cache>/vllm/                       virtual environment
<cache>/vllm/installed.json         what is in it, written last; of other pins: made again
<cache>/models/llama-0.5b/          the checkpoint
<cache>/exports/<digest>/openvino-int8/   the checkpoint in a peer's own format
<cache>/logs/
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from cluster.bench.peers.peers import Command, Peer, export_command
from cluster.bench.peers.processes import RunFailedError, last_object, run_command
from cluster.machine import cache_folder

MARKER = "installed.json"
SETUP_TIMEOUT_S = 3600.0
CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
_NATIVE_BUILD = {"CMAKE_ARGS": "-DGGML_NATIVE=ON"}
"""What is built from source is built for this machine's processor."""
_LIST_PACKAGES = """
import importlib.metadata, json
packages = importlib.metadata.distributions()
print(json.dumps({p.name.replace("_", "-"): p.version for p in packages}))
"""


def default_cache() -> Path:
    """Return $SLUICE_CACHE_DIR/peers, or ~/.cache/sluice/peers."""
    return cache_folder("peers")


@dataclass(frozen=True, slots=True)
class Environments:
    """The peers' environments and exports under one folder."""

    cache: Path  # never inside the repository: gigabytes

    def venv(self, peer: Peer) -> Path:
        """Return the folder of the peer's environment, made or not."""
        return self.cache / peer.name

    def log(self, name: str) -> Path:
        """Return the file that the standard error of a process goes to."""
        return self.cache / "logs" / f"{name}.log"

    def versions(self, peer: Peer) -> dict[str, str]:
        """Return the installed version of each package; empty where nothing is installed."""
        marker = self.venv(peer) / MARKER
        if not marker.is_file():
            return {}
        found: dict[str, str] = json.loads(marker.read_text())["versions"]
        return found

    def is_installed(self, peer: Peer) -> bool:
        """Return whether the environment is whole and of the pins that are asked for."""
        marker = self.venv(peer) / MARKER
        return marker.is_file() and json.loads(marker.read_text())["pins"] == _pins(peer)

    def install(self, peer: Peer) -> None:
        """Make the peer's environment anew.

        Raises:
            RunFailedError: It cannot be made: no network, no such version, no compiler.
        """
        venv = self.venv(peer)
        marker = venv / MARKER
        marker.unlink(missing_ok=True)
        log = self.log(f"{peer.name}-install")
        make = Command((sys.executable, "-m", "venv", "--clear", str(venv)), {})
        run_command(make, log, SETUP_TIMEOUT_S)
        self._pip_install(peer, log)
        if peer.unwanted:
            run_command(self._pip(peer, "uninstall", "--yes", *peer.unwanted), log, SETUP_TIMEOUT_S)
        listing = Command((str(venv / "bin/python"), "-c", _LIST_PACKAGES), {})
        versions = last_object(run_command(listing, log, SETUP_TIMEOUT_S))
        marker.write_text(json.dumps({"pins": _pins(peer), "versions": versions}, indent=1))

    def export(self, peer: Peer, model: Path, scheme: str) -> Path:
        """Return the checkpoint as the peer wants it, converted where that was not done before.

        Raises:
            RunFailedError: The conversion failed.
        """
        if not peer.export:
            return model
        name = f"{peer.name}-{scheme}"
        out = self.cache / "exports" / _digest(model) / name
        if out.is_dir():
            return out
        part = out.with_name(f"{name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        command = export_command(peer, self.venv(peer), model, scheme, part)
        run_command(command, self.log(f"{name}-export"), SETUP_TIMEOUT_S)
        part.rename(out)  # last, so that a folder of that name is whole
        return out

    def _pip_install(self, peer: Peer, log: Path) -> None:
        """Install from the configured index; else with PyTorch's own for its CPU builds."""
        try:
            install = self._pip(peer, "install", *peer.requirements)
            run_command(install, log, SETUP_TIMEOUT_S)
        except RunFailedError as error:
            if not any("torch" in line or "vllm" in line for line in peer.requirements):
                raise
            index = ("--extra-index-url", CPU_TORCH_INDEX)
            try:
                install = self._pip(peer, "install", *index, *peer.requirements)
                run_command(install, log, SETUP_TIMEOUT_S)
            except RunFailedError:
                raise error from None

    def _pip(self, peer: Peer, action: str, *args: str) -> Command:
        python = str(self.venv(peer) / "bin/python")
        options = ("--disable-pip-version-check", "--quiet")
        return Command((python, "-m", "pip", *options, action, *args), _NATIVE_BUILD)


def _pins(peer: Peer) -> list[str]:
    return [*peer.requirements, *peer.unwanted]


def _digest(model: Path) -> str:
    """Return a name that changes with the checkpoint's path, sizes and times."""
    files = [*sorted(model.glob("*.safetensors*")), model / "config.json"]
    facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
