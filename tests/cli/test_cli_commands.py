"""`sluice generate`, `status` and `bench serve` against a server without a cluster."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_run import error_of, run

from tests.bench.bench_fakes import FakeInference, serving

pytestmark = pytest.mark.integration


@pytest.fixture
def fake() -> FakeInference:
    return FakeInference(["ok"] * 20)


@pytest.fixture
def address(fake: FakeInference) -> Iterator[str]:
    with serving(fake) as address:
        yield address


def test_generate_streams_the_text(address: str) -> None:
    result = run("generate", "def f", "--address", address, "--max-tokens", "3")
    assert result.exit_code == 0, result.output
    assert result.stdout == "t0 t1 t2 \n"
    assert "length: 3 tokens, prompt 12 (3 cached)" in result.stderr


def test_generate_json_is_one_object(address: str) -> None:
    result = run("generate", "def f", "--address", address, "--max-tokens", "3", "--json")
    answer = json.loads(result.stdout)
    assert answer["text"] == "t0 t1 t2 "
    assert answer["token_ids"] == [0, 1, 2]
    assert answer["finish_reason"] == "length"


def test_generate_sends_what_is_set_and_nothing_else(address: str, fake: FakeInference) -> None:
    options = ["--temperature", "0", "--top-k", "5", "--stop", "a", "--stop", "b", "--seed", "7"]
    run("generate", "-", "--address", address, "--max-tokens", "2", *options, stdin="x = é")
    (request,) = fake.requests
    assert request.text == "x = é"
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed) == (0.0, 5, 7)
    assert list(sampling.stop) == ["a", "b"]
    assert sampling.HasField("temperature")  # 0 is a choice, too
    assert not sampling.HasField("top_p")
    assert not sampling.HasField("repetition_penalty")


def test_generate_reports_logprobs(address: str, fake: FakeInference) -> None:
    asked = ["generate", "x", "--address", address, "--max-tokens", "2", "--logprobs", "2"]
    result = run(*asked)
    assert fake.requests[0].sampling.logprobs == 2
    assert result.stdout == "t0 t1 \n"
    assert result.stderr.count("-0.25, '[x]' -1.50") == 2
    answer = json.loads(run(*asked, "--json").stdout)
    assert [scored["logprob"] for scored in answer["logprobs"]] == [-0.25, -0.25]
    assert [top["text"] for top in answer["logprobs"][1]["top"]] == ["t1 ", "[x]"]


@pytest.mark.parametrize("outcome", ["refuse", "break", "truncate"])
def test_generate_that_fails_says_so_in_one_line(outcome: str) -> None:
    with serving(FakeInference([outcome])) as address:
        result = run("generate", "x", "--address", address, "--max-tokens", "3")
    assert result.exit_code == 1
    assert result.stderr.strip().startswith("sluice: ")
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("command", [["status"], ["generate", "x"], ["bench", "serve"]])
def test_command_without_a_server_fails_in_one_line(command: list[str]) -> None:
    load = ["--concurrency", "1"] if command[0] == "bench" else []
    result = run(*command, "--address", "127.0.0.1:1", *load)
    assert result.exit_code == 1
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert "Traceback" not in result.output


def test_generate_refuses_a_missing_certificate(address: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "ca.pem")
    assert missing in error_of("generate", "x", "--address", address, "--ca-file", missing)


def test_status_shows_every_replica(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    result = run("status", "--address", address)
    assert result.exit_code == 0
    for cell in ("r1", "ready", "fake", "2 x 1", "25 / 100", "25.0%", "1234"):
        assert cell in result.stdout
    assert "4 running, 0 waiting at gateway g1" in result.stdout


def test_status_json_is_one_object(address: str) -> None:
    state = json.loads(run("status", "--address", address, "--json").stdout)
    assert state["num_inflight"] == 4
    assert state["replicas"][0]["num_free_blocks"] == 75


def test_bench_serve_json_says_what_was_measured_where(address: str, tmp_path: Path) -> None:
    plot = tmp_path / "run.png"
    load = ["--concurrency", "2", "--num-requests", "5", "--warmup", "1"]
    shape = ["--input-tokens", "8", "--output-tokens", "3", "--ttft-slo-s", "5"]
    result = run(
        "bench", "serve", "--address", address, *load, *shape, "--plot", str(plot), "--json"
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["result"]["status"] == {"OK": 5}
    assert report["result"]["goodput"] == 1.0
    assert report["objective"] == {"ttft_s": 5.0, "tpot_s": None}
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
