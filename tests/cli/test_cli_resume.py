"""`sluice generate` over connections that break, and `sluice drain`, against scripted gateways."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import grpc
import pytest
from cli_run import error_of, run

from cluster.errors import RESUME_ELSEWHERE, NotFoundError, PermissionDeniedError, UnavailableError
from cluster.rpc.sluice.v1 import inference_pb2 as pb
from tests.client.scripted_gateways import (
    TEXT,
    TOKENS,
    Fate,
    ScriptedGateway,
    gateways,
)

pytestmark = pytest.mark.integration
ELSEWHERE = UnavailableError("drains", reason=RESUME_ELSEWHERE)


def _at(addresses: Sequence[str]) -> list[str]:
    return [part for address in addresses for part in ("--address", address)]


def test_generate_resumes_and_says_so_on_standard_error() -> None:
    with gateways(Fate(5, ELSEWHERE)) as (addresses, script):
        result = run("generate", "x", *_at(addresses))
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{TEXT}\n"
    assert f"[cut off, resumed at {addresses[1]} after 0." in result.stderr
    assert script.ways == [(0, "GenerateStream"), (1, "Resume")]


def test_generate_json_has_the_whole_answer() -> None:
    with gateways(Fate(5)) as (addresses, _):
        result = run("generate", "x", *_at(addresses), "--json", "--request-id", "r7")
    answer = json.loads(result.stdout)
    assert (answer["request_id"], answer["text"]) == ("r7", TEXT)
    assert answer["token_ids"] == list(TOKENS)
    assert not result.stderr


def test_generate_without_resumption_fails_in_one_line() -> None:
    with gateways(Fate(5, ELSEWHERE)) as (addresses, script):
        result = run("generate", "x", *_at(addresses), "--no-resume")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "sluice: drains"
    assert len(script.calls) == 1


def test_generate_goes_on_with_an_earlier_request(monkeypatch: pytest.MonkeyPatch) -> None:
    with gateways(Fate(5, ELSEWHERE)) as (addresses, script):
        monkeypatch.setenv("SLUICE_ADDRESS", " ".join(addresses))
        run("generate", "x", "--request-id", "r7", "--detach", "9", "--no-resume")
        result = run("generate", "--resume-id", "r7", "--detach", "3")
        unknown = run("generate", "--resume-id", "r8")
    assert result.stdout == f"{TEXT}\n"
    assert result.stderr.endswith("request r7]\n")
    begun, resumed = (call.request for call in script.calls[:2])
    assert begun.detach_on_disconnect_s == 9.0
    assert resumed == pb.ResumeRequest(request_id="r7", detach_on_disconnect_s=3.0)
    assert unknown.exit_code == 1
    assert unknown.stderr == "sluice: request 'r8' is unknown\n"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["x", "--resume-id", "r"], "leave out TEXT"),
        (["--resume-id", "r", "--top-k", "3", "--class", "batch"], "top_k, service_class"),
        (["--resume-id", "r", "--request-id", "s"], "leave out request_id"),
        ([], "give TEXT, or --resume-id"),
        (["x", "--detach", "-1"], "'--detach'"),
    ],
)
def test_generate_refuses_what_contradicts_a_resumption(options: list[str], expected: str) -> None:
    assert expected in error_of("generate", *options)


def test_drain_says_what_is_handed_over() -> None:
    with gateways() as (addresses, script):
        shown = run("drain", "r1", *_at(addresses))
        answer = json.loads(run("drain", "r1", *_at(addresses), "--json").stdout)
    assert shown.stdout == "r1 drains: it hands over 3 requests\n"
    assert answer == {"replica_id": "r1", "num_requests": 3}
    assert [call.request.replica_id for call in script.calls] == ["r1", "r1"]


class _Leaving(ScriptedGateway):
    """Shows its replica, or cannot be reached, as planned for each look at the status."""

    plan = (
        ""  # d: it drains; a: it is absent; u: unavailable; the last one goes for all that follow
    )
    looks_s: list[float]

    def ClusterStatus(self, request: Any, context: Any) -> pb.ClusterStatusResponse:
        sight = self.plan[min(len(self.looks_s), len(self.plan) - 1)]
        self.looks_s.append(time.monotonic())
        if sight == "u":
            context.abort(grpc.StatusCode.UNAVAILABLE, "it leaves")
        left = pb.ReplicaStatus(replica_id="r1", state=pb.REPLICA_STATE_DRAINING, num_running=4)
        other = pb.ReplicaStatus(replica_id="r2", state=pb.REPLICA_STATE_READY)
        return pb.ClusterStatusResponse(replicas=[left, other] if sight == "d" else [other])


def _wait_for(monkeypatch: pytest.MonkeyPatch, plan: str, *options: str) -> tuple[Any, list[float]]:
    """Drain a replica; return the result, and when each look at the status came."""
    monkeypatch.setattr(_Leaving, "plan", plan)
    monkeypatch.setattr(_Leaving, "looks_s", [], raising=False)
    with gateways(num_gateways=1, kind=_Leaving) as (addresses, _):
        return run("drain", "r1", "--wait", *_at(addresses), *options), _Leaving.looks_s


def test_drain_waits_until_the_replica_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    result, looks_s = _wait_for(monkeypatch, "dda")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[1].startswith("r1 is gone after ")
    assert looks_s[-1] - looks_s[2] >= 0.5, "one answer is not enough"
    result, _ = _wait_for(monkeypatch, "dda", "--json")
    assert 0 <= json.loads(result.stdout)["gone_after_s"] < 60


def test_drain_is_not_misled_by_a_gateway_that_lost_sight(monkeypatch: pytest.MonkeyPatch) -> None:
    result, looks_s = _wait_for(monkeypatch, "dada")
    assert result.exit_code == 0, result.output
    assert looks_s[-1] - looks_s[3] >= 0.5, "what came before it was seen again does not count"


def test_drain_asks_again_where_no_gateway_is_in_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    result, looks_s = _wait_for(monkeypatch, "duuaua")
    assert result.exit_code == 0, result.output
    assert len(looks_s) >= 6


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ("d", "--timeout-s=0.001: r1 is still draining, 4 running, 0 waiting: wait longer"),
        ("a", "--timeout-s=0.001: r1 is not seen, but not yet for 0.5 s: wait longer"),
        ("u", "it leaves"),
    ],
)
def test_drain_that_takes_too_long_says_what_was_seen_last(
    monkeypatch: pytest.MonkeyPatch, plan: str, expected: str
) -> None:
    result, _ = _wait_for(monkeypatch, plan, "--timeout-s", "0.001")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"sluice: {expected}")


@pytest.mark.parametrize(
    "error", [NotFoundError("replica 'r1' is unknown"), PermissionDeniedError("administrators")]
)
def test_drain_that_is_refused_is_one_line(error: Exception) -> None:
    with gateways(Fate(error=error)) as (addresses, _):  # type: ignore[arg-type]
        result = run("drain", "r1", *_at(addresses), "--wait")
    assert result.exit_code == 1
    assert result.stderr == f"sluice: {error}\n"
