"""`sluice bench serve` against a server without a cluster."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_run import error_of, run

from cluster.rpc.sluice.v1 import inference_pb2 as pb
from tests.bench.bench_fakes import FakeInference, serving

pytestmark = pytest.mark.integration


@pytest.fixture
def fake() -> FakeInference:
    return FakeInference(["ok"] * 20)


@pytest.fixture
def address(fake: FakeInference) -> Iterator[str]:
    with serving(fake) as address:
        yield address


def test_bench_serve_json_says_what_was_measured_where(
    address: str, fake: FakeInference, tmp_path: Path
) -> None:
    plot = tmp_path / "run.png"
    load = ["--concurrency", "2", "--num-requests", "5", "--warmup", "1"]
    shape = ["--input-tokens", "8", "--output-tokens", "3", "--ttft-s", "5"]
    result = run(
        "bench", "serve", "--address", address, *load, *shape, "--plot", str(plot), "--json"
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["result"]["status"] == {"OK": 5}
    assert report["result"]["goodput"] == 1.0
    (objective,) = report["objectives"]
    assert objective == {"service_class": None, "ttft_s": 5.0, "tpot_s": None, "share": 1.0}
    assert [r.HasField("latency") for r in fake.requests] == [False] + [True] * 5  # the warm-up's
    assert fake.requests[-1].latency == pb.LatencyObjective(ttft_s=5.0)
    assert report["provenance"]["machine"]["cores"] >= 1
    assert report["provenance"]["versions"]["grpcio"]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_bench_serve_prints_tables(address: str) -> None:
    load = ["--rate", "100", "--num-requests", "3", "--warmup", "0"]
    shape = ["--input-tokens", "8", "--output-tokens", "3"]
    result = run("bench", "serve", "--address", address, *load, *shape)
    assert result.exit_code == 0, result.output
    assert "3 of 3 ok" in result.stdout
    assert "TTFT" in result.stdout


def test_bench_serve_refuses_what_does_not_fit(address: str) -> None:
    shape = ["--input-tokens", "600", "--output-tokens", "1"]
    assert "limit=512" in error_of("bench", "serve", "--address", address, "--rate", "1", *shape)


def test_bench_serve_sends_classes_and_counts_refusals(tmp_path: Path) -> None:
    fake, lines = FakeInference(["ok", "refuse"] * 10), tmp_path / "records.jsonl"
    load = ["--concurrency", "1", "--num-requests", "20", "--warmup", "0", "--records", str(lines)]
    shape = ["--input-tokens", "8", "--output-tokens", "3", "--classes", "interactive=3,batch=1"]
    with serving(fake) as address:
        result = run("bench", "serve", "--address", address, *load, *shape)
    assert result.exit_code == 0, result.output
    assert "10 of 20 requests" in result.stdout
    assert "refused, QUEUE_FULL" in result.stdout
    assert "2.5 / 2.5 s" in result.stdout
    names = {pb.SERVICE_CLASS_INTERACTIVE: "interactive", pb.SERVICE_CLASS_BATCH: "batch"}
    sent = [names[request.service_class] for request in fake.requests]
    assert 10 < sent.count("interactive") < 20
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [row["service_class"] for row in rows] == sent
    assert [row["end"] for row in rows] == ["OK", "RESOURCE_EXHAUSTED"] * 10
    assert [row["meets_slo"] for row in rows] == [True, False] * 10
    assert {row["ttft_slo_s"] for row in rows} == {1.0, None}


def test_bench_serve_replays_a_trace_at_a_scale(tmp_path: Path) -> None:
    trace, lines = tmp_path / "azure.csv", tmp_path / "records.jsonl"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n0.0,20,3\n1.0,9000,400\n2.0,0,1\n3.0,5,2\n"
    )
    fake = FakeInference(["ok"] * 3)
    replay = ["--trace", str(trace), "--rate-scale", "30", "--skip-invalid", "--warmup", "0"]
    options = ["--records", str(lines), "--ttft-s", "2", "--ttft-ms-per-token", "0.5"]
    with serving(fake) as address:
        report = run("bench", "serve", "--address", address, *replay, *options, "--json").stdout
    figures = json.loads(report)
    assert figures["load"]["rate_scale"] == 30
    assert figures["load"]["num_skipped"] == 1
    assert figures["clipped"] == {
        "num_requests": 1,
        "num_prompts": 1,
        "num_prompt_tokens": 9000 - 256,  # the fake model's context is 512 tokens
        "num_outputs": 1,
        "num_output_tokens": 400 - 256,
    }
    assert figures["result"]["status"] == {"OK": 3}
    assert [len(prompt) for prompt in fake.prompts] == [20, 256, 5]
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [row["arrived_s"] for row in rows] == pytest.approx([0.0, 1 / 30, 0.1])
    assert [row["ttft_slo_s"] for row in rows] == pytest.approx([2.01, 6.5, 2.0025])
    assert fake.requests[1].latency.ttft_s == pytest.approx(6.5)


def test_bench_serve_replays_a_workload_and_says_what_was_clipped() -> None:
    spec = "poisson:rate=50,duration=0.2,input_tokens=2000,output_tokens=4"
    with serving(FakeInference(["ok"] * 100)) as address:
        result = run("bench", "serve", "--address", address, "--workload", spec, "--warmup", "1")
    assert result.exit_code == 0, result.output
    assert "clipped to the model's context" in result.stdout
    assert "poisson" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rate", "1", "--workload", "poisson"], "give exactly one of these"),
        ([], "give exactly one of these"),
        (["--rate", "1", "--rate-scale", "2"], "it scales a --trace or a --workload"),
        (["--rate", "1", "--class", "batch", "--classes", "batch=1"], "exclude each other"),
        (["--rate", "1", "--class", "batch", "--tpot-s", "1"], "exclude each other"),
        (["--rate", "1", "--classes", "urgent=1"], "'urgent' is no class"),
        (["--rate", "1", "--ttft-ms-per-token", "1"], "without --ttft-s"),
        (["--rate", "1", "--ttft-s", "nan"], "ttft_s=nan"),
        (["--workload", "nothing"], "nothing"),
        (["--workload", "poisson", "--rate-scale", "0"], "rate_scale=0"),
        (["--trace", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--rate", "1", "--records", "/nowhere/r.jsonl"], "--records /nowhere/r.jsonl"),
    ],
)
def test_bench_serve_refuses_options_before_it_sends_anything(
    address: str, fake: FakeInference, options: list[str], message: str
) -> None:
    assert message in error_of("bench", "serve", "--address", address, *options)
    assert not fake.requests
