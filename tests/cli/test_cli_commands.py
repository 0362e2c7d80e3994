"""`sluice generate`, `explain` and `status` against a server without a cluster."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_run import error_of, run

from cluster.rpc import queries
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


def test_generate_streams_the_text(address: str) -> None:
    result = run("generate", "def f", "--address", address, "--max-tokens", "3")
    assert result.exit_code == 0, result.output
    assert result.stdout == "t0 t1 t2 \n"
    assert "length: 3 tokens, prompt 12 (3 cached)" in result.stderr


def test_generate_shows_the_id_to_explain(address: str, fake: FakeInference) -> None:
    asked = ["generate", "x", "--address", address, "--max-tokens", "1"]
    chosen, first, second = run(*asked, "--request-id", "r7"), run(*asked), run(*asked)
    assert chosen.stderr.endswith(" s, request r7]\n")
    ids = [request.request_id for request in fake.requests]
    assert ids[0] == "r7" and "" not in ids and len(set(ids)) == 3
    assert f", request {ids[1]}]" in first.stderr and f", request {ids[2]}]" in second.stderr


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


def test_generate_sends_its_objective_and_session(address: str, fake: FakeInference) -> None:
    asked = ["generate", "x", "--address", address, "--max-tokens", "1"]
    run(*asked, "--class", "interactive", "--request-id", "r7")
    run(*asked, "--ttft-s", "0.5", "--tpot-s", "0.05", "--session", "s")
    run(*asked, "--class", "batch", "--json")
    by_class, by_times, as_json = fake.requests
    assert by_class.service_class == pb.SERVICE_CLASS_INTERACTIVE
    assert (by_class.request_id, by_class.session) == ("r7", "")
    assert by_times.latency == pb.LatencyObjective(ttft_s=0.5, tpot_s=0.05)
    assert by_times.session == "s"
    assert as_json.service_class == pb.SERVICE_CLASS_BATCH


def test_generate_refuses_an_objective_that_cannot_be_one(address: str) -> None:
    asked = ("generate", "x", "--address", address)
    both = error_of(*asked, "--class", "batch", "--ttft-s", "1")
    assert "service_class=batch and ttft_s=1" in both
    assert "'urgent' is not one of" in error_of(*asked, "--class", "urgent")
    assert "tpot_s=nan" in error_of(*asked, "--tpot-s", "nan")


def test_generate_shows_its_place_in_the_queue_on_standard_error() -> None:
    with serving(FakeInference(["queue"])) as address:
        result = run("generate", "x", "--address", address, "--max-tokens", "1")
    assert result.stdout == "t0 \n"
    assert result.stderr.splitlines()[:2] == [
        "[queued: 3 before it, about 1.2 s]",
        "[queued: 0 before it]",
    ]


EXPLANATION = pb.ExplainResponse(
    request_id="r7",
    policy="slo",
    outcome=pb.ADMISSION_OUTCOME_DISPATCHED,
    reason="it has [half] of the prompt",
    candidates=[
        pb.RouteCandidate(replica_id="near", score=0.25, cached_tokens=640, ttft_p50_s=0.21),
        pb.RouteCandidate(replica_id="far", score=1.5, num_requests=7),
    ],
    num_candidates=16,
    num_excluded=1,
    ttft_slo_s=0.5,
    ttft_s=0.25,
)


def test_explain_marks_the_chosen_replica(
    address: str, fake: FakeInference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    fake.explanation = EXPLANATION
    result = run("explain", "r7", "--address", address)
    assert result.exit_code == 0, result.output
    assert "r7 dispatched by policy slo 0.0 s ago: it has [half] of the prompt" in result.stdout
    assert "the best 2 of 16 weighed, 1 passed over" in result.stdout
    near, far = (line for line in result.stdout.splitlines() if "near" in line or "far" in line)
    assert "→" in near and "640" in near and "210.0" in near
    assert "→" not in far and "1.5" in far
    assert "objective 500.0 ms, predicted at dispatch (p50) 210.0 ms" in result.stdout
    assert "actual from arrival 250.0 ms" in result.stdout


def test_explain_json_is_one_object(address: str, fake: FakeInference) -> None:
    fake.explanation = EXPLANATION
    answer = json.loads(run("explain", "r7", "--address", address, "--json").stdout)
    assert (answer["outcome"], answer["ttft_s"], answer["tpot_slo_s"]) == ("dispatched", 0.25, None)
    assert [candidate["replica_id"] for candidate in answer["candidates"]] == ["near", "far"]


def test_explain_of_a_refusal_marks_nobody(address: str, fake: FakeInference) -> None:
    fake.explanation = pb.ExplainResponse(
        request_id="r7",
        outcome=pb.ADMISSION_OUTCOME_REFUSED,
        candidates=[pb.RouteCandidate(replica_id="near")],
    )
    shown = run("explain", "r7", "--address", address).stdout
    assert "refused" in shown and "near" in shown and "→" not in shown
    assert "predicted at dispatch (p50) -, actual from arrival -" in shown


def test_explain_of_what_nobody_remembers_is_one_line(address: str) -> None:
    result = run("explain", "gone", "--address", address)
    assert result.exit_code == 1
    assert result.stderr == "sluice: gone is not remembered\n"


class FakeGateways(FakeInference):
    """Several gateways behind one port, one for each new connection; one remembers a request."""

    def __init__(self, num_gateways: int) -> None:
        super().__init__([])
        self.connections: list[str] = []
        self.num_asked = 0
        self._num_gateways = num_gateways

    def Explain(self, request: pb.ExplainRequest, context: Any) -> pb.ExplainResponse:
        self.num_asked += 1
        if context.peer() not in self.connections:
            self.connections.append(context.peer())
        is_last = self.connections.index(context.peer()) == self._num_gateways - 1
        self.explanation = EXPLANATION if is_last else None
        return super().Explain(request, context)


def test_explain_asks_until_it_reaches_the_gateway_that_remembers() -> None:
    fake = FakeGateways(32)
    with serving(fake) as address:
        result = run("explain", "r7", "--address", address, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["request_id"] == "r7"
    assert len(fake.connections) == 32


def test_explain_asks_every_address(address: str) -> None:
    remembers = FakeInference([])
    remembers.explanation = EXPLANATION
    with serving(remembers) as other:
        result = run("explain", "r7", "--address", address, "--address", other, "--json")
    assert json.loads(result.stdout)["request_id"] == "r7"


def test_explain_gives_up_where_no_gateway_remembers() -> None:
    fake = FakeGateways(33)
    with serving(fake) as address:
        result = run("explain", "r7", "--address", address)
    assert result.exit_code == 1
    assert result.stderr == "sluice: r7 is not remembered\n"
    assert fake.num_asked == len(fake.connections) == 32


def test_explain_asks_no_more_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries, "QUERY_TIMEOUT_S", 0.0)
    fake = FakeGateways(33)
    with serving(fake) as address:
        assert run("explain", "r7", "--address", address).exit_code == 1
    assert fake.num_asked == 1


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
