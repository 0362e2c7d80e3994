"""Drive a ramp of load up and down against an autoscaled cluster; write what happened.

Runs as a Ray job, `ray job submit -- python scripts/autoscale_experiment.py --out DIR`, or by
itself, then on a Ray of its own. Serve's autoscaler follows cluster/autoscaler/policy.py between
1 and 3 replica groups. DIR gets result.json (samples of groups and load, every request's TTFT and
status, configuration, commit, machine, versions) and result.png. Exit status 0 only if no stream
failed.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Awaitable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from rich.console import Console

from cluster.bench.load import LoadPlan, LoadRun, RequestShape
from cluster.bench.provenance import provenance
from cluster.bench.statistics import RequestRecord
from cluster.config import ClusterConfig, load_config
from cluster.gateway.app import check, start
from cluster.rpc.sluice.v1 import inference_pb2 as pb
from cluster.rpc.sluice.v1.inference_pb2_grpc import InferenceStub

SAMPLE_INTERVAL_S = 0.5


@dataclass(frozen=True)
class Phase:
    """A part of the ramp."""

    concurrency: int  # requests under way; 0 is silence
    duration_s: float


@dataclass(frozen=True)
class Sample:
    """The cluster at one moment, as the gateway sees it."""

    time_s: float  # since the ramp began
    num_groups: int  # that take requests
    num_running: int
    num_waiting: int


def configuration(overrides: list[str], max_groups: int) -> ClusterConfig:
    """Return the demo model behind an autoscaler that reacts within seconds."""
    scaling = {"min_replicas": 1, "max_replicas": max_groups, "target_load": 4}
    delays = {"upscale_delay_s": 2, "downscale_delay_s": 6, "metrics_interval_s": 0.5}
    defaults = [
        f"replica.autoscaling={json.dumps(scaling | delays)}",
        "parallel.num_cpus_per_worker=0.1",
        "parallel.threads_per_worker=1",
        "gateway.port=0",
    ]
    return load_config(None, defaults + overrides)


async def drive(address: str, phases: list[Phase], shape: RequestShape) -> dict[str, Any]:
    """Run the phases one after the other and return samples and requests."""
    samples: list[Sample] = []
    records: list[RequestRecord] = []
    async with grpc.aio.insecure_channel(address) as channel:
        stub = InferenceStub(channel)  # type: ignore[no-untyped-call]
        models = await stub.ListModels(pb.ListModelsRequest(), timeout=10)
        start_s = time.perf_counter()
        sampler = asyncio.create_task(sample(stub, start_s, samples))
        for index, phase in enumerate(phases):
            offset_s = time.perf_counter() - start_s
            if phase.concurrency == 0:
                await asyncio.sleep(phase.duration_s)
                continue
            plan = LoadPlan(None, phase.duration_s, concurrency=phase.concurrency)
            run = LoadRun(stub, models.models[0], shape, plan, first_index=index * 100_000)
            records += [shifted(record, offset_s) for record in await run.run()]
        sampler.cancel()
    return {
        "samples": [asdict(item) for item in samples],
        "requests": [
            {"time_s": r.scheduled_s, "ttft_s": r.ttft_s, "e2e_s": r.e2e_s, "status": r.status}
            for r in records
        ],
        "phases": [asdict(phase) for phase in phases],
    }


async def sample(stub: InferenceStub, start_s: float, samples: list[Sample]) -> None:
    """Append the state of the cluster until cancelled."""
    while True:
        call: Awaitable[pb.ClusterStatusResponse] = stub.ClusterStatus(
            pb.ClusterStatusRequest(), timeout=5
        )
        replicas = [r for r in (await call).replicas if r.state == pb.REPLICA_STATE_READY]
        samples.append(
            Sample(
                time_s=time.perf_counter() - start_s,
                num_groups=len(replicas),
                num_running=sum(r.num_running for r in replicas),
                num_waiting=sum(r.num_waiting for r in replicas),
            )
        )
        await asyncio.sleep(SAMPLE_INTERVAL_S)


def shifted(record: RequestRecord, offset_s: float) -> RequestRecord:
    """Return a record on the time line of the whole ramp."""
    return RequestRecord(
        record.scheduled_s + offset_s,
        record.end_s + offset_s,
        record.status,
        tuple(t + offset_s for t in record.message_times_s),
        record.num_tokens,
        record.num_prompt_tokens,
        record.num_cached_tokens,
    )


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw groups, load and TTFT over time."""
    from matplotlib import pyplot

    samples, requests = result["samples"], result["requests"]
    times = [s["time_s"] for s in samples]
    figure, (groups, load, ttft) = pyplot.subplots(
        3, 1, figsize=(10, 8), sharex=True, layout="constrained"
    )
    groups.step(times, [s["num_groups"] for s in samples], where="post")
    groups.set(ylabel="replica groups", yticks=range(result["max_groups"] + 2))
    load.plot(times, [s["num_running"] for s in samples], label="running")
    load.plot(times, [s["num_waiting"] for s in samples], label="waiting")
    load.set(ylabel="requests")
    load.legend()
    good = [r for r in requests if r["status"] == "OK"]
    bad = [r for r in requests if r["status"] != "OK"]
    ttft.scatter([r["time_s"] for r in good], [r["ttft_s"] for r in good], s=6, label="TTFT")
    ttft.scatter([r["time_s"] for r in bad], [0] * len(bad), color="red", label="failed")
    ttft.set(xlabel="seconds", ylabel="TTFT, seconds")
    ttft.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def turns(samples: list[dict[str, Any]]) -> list[int]:
    """Return the numbers of groups in the order in which they held, repeats left out."""
    history: list[int] = []
    for item in samples:
        if not history or history[-1] != item["num_groups"]:
            history.append(item["num_groups"])
    return history


def main(
    out: Annotated[Path, typer.Option(help="Folder for result.json and result.png.")],
    peak: Annotated[int, typer.Option(help="Requests under way at the top of the ramp.")] = 16,
    low_s: Annotated[float, typer.Option(help="Seconds of low load before the peak.")] = 6.0,
    peak_s: Annotated[float, typer.Option(help="Seconds at the peak.")] = 60.0,
    idle_s: Annotated[float, typer.Option(help="Seconds of low load after the peak.")] = 40.0,
    max_groups: Annotated[int, typer.Option(help="Replica groups at the most.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    set_: Annotated[list[str] | None, typer.Option("--set", help="a.b=value")] = None,
) -> None:
    """Run the experiment."""
    console = Console(stderr=True)
    if find_spec("matplotlib") is None:  # said before the ramp, not after it
        console.print("the plot needs matplotlib: pip install 'sluice[plot]'")
        raise typer.Exit(2)
    os.environ["MPLBACKEND"] = "Agg"
    out.mkdir(parents=True, exist_ok=True)
    config = configuration(set_ or [], max_groups)
    check(config)
    inside_job = "auto" if os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_ID") else None
    shape = RequestShape(num_input_tokens=64, num_output_tokens=64, seed=seed)
    phases = [Phase(1, low_s), Phase(peak, peak_s), Phase(1, idle_s)]
    with start(config, ray_address=inside_job, on_progress=console.log) as cluster:
        console.log(f"ramp: {phases}")
        result = asyncio.run(drive(cluster.address, phases, shape))
    failed = [r for r in result["requests"] if r["status"] != "OK"]
    result |= {"max_groups": max_groups, "turns": turns(result["samples"]), **provenance()}
    result |= {"num_failed": len(failed), "config": config.model_dump(mode="json")}
    (out / "result.json").write_text(json.dumps(result, indent=1))
    plot(result, out / "result.png")
    console.log(
        f"groups over time: {result['turns']}; {len(result['requests'])} requests, "
        f"{len(failed)} failed; see {out}/result.json and result.png"
    )
    raise typer.Exit(1 if failed or not result["requests"] else 0)


if __name__ == "__main__":
    typer.run(main)
