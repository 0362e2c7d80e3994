"""Builds and loads the CPU kernels of `cpu/`: once per source, torch and instruction set.

    cpu/*.cpp --g++, one process per file--> $SLUICE_CACHE_DIR/kernels/<key>/kernels.so
              (~/.cache/sluice without the variable)

The key is a hash of what goes in, so a change builds afresh and nothing stale is ever loaded.
Processes that start together wait for the one that builds. Where nothing can be built, plain torch
serves, slower; the log says why. SLUICE_KERNELS=avx512_bf16|avx512|avx2|torch forces a choice.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

from cluster.errors import ConfigError
from cluster.machine import cache_folder, locked

SOURCES = Path(__file__).parent / "cpu"
BUILD_TIMEOUT_S = 600.0
"""For one build, and for waiting on another process's."""

ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "avx512_bf16": ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"),
    "avx512": ("-march=x86-64-v4",),
    "avx2": ("-march=x86-64-v3",),
}
"""Compiler flags by instruction set, the best first."""

_CPU_FEATURES: dict[str, set[str]] = {
    "avx512_bf16": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx2": {"avx2", "fma", "f16c", "bmi2"},
}
# Torch's own OpenMP serves the kernels: linking with -fopenmp could bring a second pool of threads.
_COMPILE_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=fast")

logger = logging.getLogger(__name__)


class _BuildError(Exception):
    """The kernels cannot be built or loaded here; the message is the reason."""


def load() -> str:
    """Make the kernels callable as ``torch.ops.sluice.*``; again is free.

    Returns:
        The reason why plain torch serves instead, which is logged once; empty when they are there.

    Raises:
        ConfigError: SLUICE_KERNELS names nothing known, or what this CPU does not have.
    """
    return _load()[1]


def isa() -> str:
    """Return the instruction set of the loaded kernels, a key of `ISA_FLAGS`; "" for none."""
    return _load()[0]


@cache
def _load() -> tuple[str, str]:
    forced = os.environ.get("SLUICE_KERNELS", "")
    name, reason = choose_isa(forced, cpu_features())
    if name:
        try:
            torch.ops.load_library(str(_built(name)))  # type: ignore[no-untyped-call]
        except (_BuildError, OSError, RuntimeError) as error:  # no home to cache in
            name, reason = "", str(error)
    if name:
        why = "SLUICE_KERNELS asks for it" if forced else "the best of what this CPU has"
        logger.info("CPU kernels: %s, %s", name, why)
    else:
        logger.warning("CPU kernels: plain torch, slower, because %s", reason)
    return name, reason


def cpu_features() -> set[str]:
    """Return what the CPU says it can do; empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split()[2:]) for line in lines if line.startswith("flags")), set())


def choose_isa(forced: str, features: set[str]) -> tuple[str, str]:
    """Return the instruction set to use, or "" and the reason why there is none.

    Args:
        forced: A key of `ISA_FLAGS`, "torch", or "" for the best that the CPU has.
        features: From `cpu_features`.

    Raises:
        ConfigError: `forced` is unknown or not among the CPU's.
    """
    there = [name for name in ISA_FLAGS if _CPU_FEATURES[name] <= features]
    if forced == "torch":
        return "", "SLUICE_KERNELS=torch asks for it"
    if forced and forced not in there:
        raise ConfigError(
            f"SLUICE_KERNELS={forced}: this CPU offers {', '.join([*there, 'torch'])}; name one of "
            "these or unset it",
            field="SLUICE_KERNELS",
        )
    if not there:
        return "", f"the CPU ({platform.machine()}) has no AVX2"
    return forced or there[0], ""


def _built(name: str) -> Path:
    """Return the shared library for an instruction set, built now if it is not there."""
    folder = cache_folder("kernels") / _key(name)
    library = folder / "kernels.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock", timeout_s=BUILD_TIMEOUT_S):
        if not library.exists():
            started = time.monotonic()
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                _link(_compile(name, Path(scratch)), Path(scratch) / library.name)
                (Path(scratch) / library.name).replace(library)
            logger.info("CPU kernels built in %.0f s: %s", time.monotonic() - started, library)
    return library


def _key(name: str) -> str:
    digest = hashlib.sha256()
    for part in (name, *ISA_FLAGS[name], *_COMPILE_FLAGS, torch.__version__, _compiler()):
        digest.update(part.encode() + b"\0")
    for path in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{name}-{digest.hexdigest()[:16]}"


def _compiler() -> str:
    path = shutil.which(os.environ.get("CXX") or "g++")
    if path is None:
        raise _BuildError("there is no C++ compiler (Debian, Ubuntu: apt-get install g++)")
    return path


def _compile(name: str, folder: Path) -> list[Path]:
    from torch.utils.cpp_extension import include_paths  # slow to import, and only a build needs it

    includes = [f"-isystem{path}" for path in include_paths()]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        flags = (*_COMPILE_FLAGS, *ISA_FLAGS[name], *includes)
        _run([_compiler(), *flags, "-c", str(source), "-o", str(target)])
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, sorted(SOURCES.glob("*.cpp"))))


def _link(objects: list[Path], target: Path) -> None:
    from torch.utils.cpp_extension import library_paths

    where = [f"-L{path}" for path in library_paths()]
    libraries = ["-lc10", "-ltorch_cpu"]
    _run([_compiler(), "-shared", *map(str, objects), *where, *libraries, "-o", str(target)])


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _BuildError(f"the compiler does not run: {error}") from error
    if done.returncode:
        raise _BuildError(f"the compiler failed: {done.stderr.strip()[-2000:]}")
