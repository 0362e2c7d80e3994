"""What was measured of steps, kept for the next start: one file per model, layout and machine.

    $SLUICE_CACHE_DIR/step_time/<hash of what the steps depend on>.json

A file that cannot be read, or is about something else, is as good as none: the log says so.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig
from cluster.machine import cache_folder, cpu_name
from cluster.replica.placement import threads_per_worker

logger = logging.getLogger(__name__)

_VERSION = 1
_MAX_BYTES = 4 * 2**20  # a longer file is none of ours
_MIN_STEP_S = 1e-7  # shorter than any step, and long enough to divide by
_MAX_VALUE = 1e12  # of tokens, contexts and their products

StepTimes = Sequence[tuple[float, ...]]
"""`StepTimeModel.snapshot`."""


def identity_of(config: ClusterConfig, *, fingerprint: bytes) -> dict[str, Any]:
    """Return everything that the time of a step depends on, as plain data.

    Args:
        config: Of the cluster.
        fingerprint: Of weights, dtype and layout.
    """
    scaling = config.replica.autoscaling
    num_groups = scaling.max_replicas if scaling else config.replica.num_replicas
    num_threads = threads_per_worker(config.parallel, os.cpu_count() or 1, num_groups)
    return {
        "version": _VERSION,
        "fingerprint": fingerprint.hex(),
        "dtype": config.model.dtype,
        "quantization": config.model.quantization,
        "cache_dtype": config.cache.dtype,
        "block_size": config.cache.block_size,
        "tp": config.parallel.tp,
        "pp": config.parallel.pp,
        "threads": num_threads,
        "device": config.model.device,
        "kernels": os.environ.get("SLUICE_KERNELS", ""),
        "machine": _gpu_name() if config.model.device == "cuda" else cpu_name(),
    }


class StepTimeFile:
    """Reads and writes one file.

    Args:
        identity: What `identity_of` returned.
        folder: Where the files are; None is the user's cache folder.
    """

    def __init__(self, identity: dict[str, Any], folder: Path | None = None) -> None:
        self._identity = identity
        text = json.dumps(identity, sort_keys=True).encode()
        name = hashlib.blake2b(text, digest_size=16).hexdigest()
        self.path = (folder or cache_folder("step_time")) / f"{name}.json"

    def load(self) -> StepTimes:
        """Return what was saved last, nothing where there is nothing of use."""
        try:
            with self.path.open("rb") as file:
                data = file.read(_MAX_BYTES + 1)
        except FileNotFoundError:
            return []
        except OSError as error:
            logger.warning("step times not read: %s", error)
            return []
        try:
            if len(data) > _MAX_BYTES:
                raise ValueError(f"more than {_MAX_BYTES} bytes")
            return _checked(json.loads(data), self._identity)
        except (ValueError, TypeError, RecursionError) as error:
            logger.warning("step times in %s are of no use: %s", self.path, error)
            return []

    def save(self, steps: StepTimes) -> None:
        """Replace the file in one move; a failure is logged, for nothing depends on it."""
        text = json.dumps({"identity": self._identity, "steps": [list(row) for row in steps]})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self.path.parent, suffix=".tmp")
            try:
                with os.fdopen(descriptor, "w") as file:
                    file.write(text)
                Path(name).replace(self.path)
            except OSError:
                with suppress(OSError):
                    Path(name).unlink()
                raise
        except OSError as error:
            logger.warning("step times not saved: %s", error)


def _checked(content: Any, identity: dict[str, Any]) -> StepTimes:
    if not isinstance(content, dict) or content.get("identity") != identity:
        raise ValueError("they belong to another model, layout or machine")
    steps = [tuple(map(float, row)) for row in content["steps"]] if "steps" in content else []
    for row in steps:
        is_known = len(row) == 5 and all(0 <= value <= _MAX_VALUE for value in row)
        if not is_known or row[4] < _MIN_STEP_S:
            raise ValueError(f"a step of {row}")
    return steps


def _gpu_name() -> str:
    import torch  # seconds to import: only where it is there anyway

    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else "cuda"
