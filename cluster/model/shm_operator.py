"""DeepSpeed's shared-memory operator for CPUs: compiled once per machine, at first use.

    $SLUICE_CACHE_DIR/deepspeed/<key>/deepspeed_shm_comm/deepspeed_shm_comm.so

torch guards a build by a file that whoever is killed meanwhile leaves behind, and everybody after
it waits for ever. Here the system's own lock goes around that: who holds it knows that such a file
is nobody's. The key keeps other environments out, which would compile over this one's.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import torch

from cluster.errors import ConfigError
from cluster.machine import cache_folder, locked


def check_compiler() -> None:
    """Return if this machine can build DeepSpeed's operator for the CPU.

    Raises:
        ConfigError: There is no C++ compiler.
    """
    if shutil.which("g++") is None:
        raise ConfigError(
            "parallel.tp: g++ not found: tensor parallelism on CPUs compiles DeepSpeed's "
            "shared-memory operator at first use; install g++ (apt-get install g++) or use "
            "parallel.tp=1",
            field="parallel.tp",
        )


def load_operator(*, timeout_s: float) -> None:
    """Have DeepSpeed load its operator, compiled now if it is not there; about 20 s.

    DeepSpeed keeps it for this process: `init_distributed` finds it and compiles nothing. It sets
    environment variables, TORCH_EXTENSIONS_DIR and DS_ACCELERATOR among them.

    Args:
        timeout_s: For another process's compilation.

    Raises:
        TimeoutError: Another process compiled for that long.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        return  # DeepSpeed goes through gloo then
    # ninja comes as a package: its command may lie only beside this interpreter.
    scripts = sysconfig.get_path("scripts")
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)])
    folder = operator_folder()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    with locked(folder / "lock", timeout_s=timeout_s):
        if (folder / builder.NAME / "lock").exists():
            # Compilers outlive who started them: where they write nobody else may build.
            left = folder / f"{builder.NAME}.{os.getpid()}"
            (folder / builder.NAME).rename(left)
            shutil.rmtree(left, ignore_errors=True)
        builder.load()


def operator_folder() -> Path:
    """Return where the operator lies: one folder per environment."""
    digest = hashlib.sha256()
    python = f"{sys.prefix} {sys.implementation.cache_tag} {platform.machine()}"
    for part in (python, torch.__version__, version("deepspeed")):
        digest.update(part.encode() + b"\0")
    return cache_folder("deepspeed") / digest.hexdigest()[:16]
