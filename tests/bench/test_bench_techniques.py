"""The ablation: its ladder, its workload, its arithmetic, rows that fail, one real run."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from cluster.bench.engine_drive import Pace, drive
from cluster.bench.plot_techniques import plot_techniques
from cluster.bench.techniques import run_in_process, run_techniques
from cluster.bench.techniques_generate import GenerateServer
from cluster.bench.techniques_ladder import Technique, ladder, settings_of
from cluster.bench.techniques_report import techniques_report
from cluster.bench.techniques_row import Row, config_of, group_size_for, open_server, run_row
from cluster.bench.techniques_workload import QUICK, Workload
from cluster.clock import WallClock
from cluster.errors import ConfigError
from cluster.kernels import native
from cluster.types import EngineOutput
from tests.cli.cli_run import error_of, run
from tests.model.model_fakes import save_model

SMALL = replace(QUICK, budget_s=60.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("model"))


def technique(name: str) -> Technique:
    return next(one for one in ladder() if one.name == name)


def answer(rate: float) -> dict[str, Any]:
    return {
        "num_requests": 7,
        "window_s": 2.0,
        "requests_per_s": 3.5,
        "out_tokens_per_s": rate,
        "total_tokens_per_s": 30 * rate,
        "num_out_tokens": 100,
        "num_prompt_tokens": 2900,
        "cached_token_share": 0.0,
        "ttft_s": {"p50": 0.5, "p99": 1.5},
        "tpot_s": {"p50": 0.05, "p99": 0.15},
        "peak_rss_bytes": 2**30,
    }


def run_with(rates: dict[str, float | None]) -> dict[str, Any]:
    """Return the report of a ladder whose rows measure `rates`; None fails."""

    def run_row(row: Row, _: Technique) -> dict[str, Any]:
        rate = rates[row.technique]
        return {"error": f"{row.technique} is broken"} if rate is None else answer(rate)

    return run_techniques("demo", QUICK, names=list(rates), run_row=run_row)


def test_ladder_adds_one_switch_per_row() -> None:
    told = {"name", "title", "switch", "literature", "settings"}
    workload = Workload()
    for before, after in zip(ladder(), ladder()[1:], strict=False):
        changed = {
            field.name
            for field in fields(Technique)
            if field.name not in told and getattr(before, field.name) != getattr(after, field.name)
        }
        old = settings_of(before, workload, "m")
        new = settings_of(after, workload, "m")
        if before.is_engine:
            changed |= {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
        # How many tokens a step takes is the switch itself, or follows from the batch's size.
        changed -= {"engine.max_num_batched_tokens", "engine.max_num_seqs"}
        # Without batching there is nothing to wait for; the batch and its manner come together.
        if after.name == "dynamic_batching":
            changed -= {"waits_for_all"}
        assert len(changed) == 1, (after.name, changed)


def test_ladder_computes_prompts_whole_until_they_are_chunked() -> None:
    workload = Workload()
    whole = settings_of(technique("continuous_batching"), workload, "m")
    budget = workload.num_users * workload.max_prompt_tokens
    assert whole["engine.max_num_batched_tokens"] == budget
    chunked = settings_of(technique("chunked_prefill"), workload, "m")
    assert "engine.max_num_batched_tokens" not in chunked


def test_workload_is_the_same_for_every_technique_and_alike_in_every_part() -> None:
    workload = Workload(num_requests=200)
    drawn = workload.requests(1000)
    assert drawn == workload.requests(1000)
    prefixes = {r.prompt_token_ids[: workload.num_prefix_tokens] for r in drawn}
    assert len(prefixes) == 1
    assert len({r.prompt_token_ids for r in drawn}) == 200
    lengths = [r.sampling.max_tokens for r in drawn]
    assert (min(lengths), max(lengths)) == workload.output_tokens
    for begin in range(0, 200, 10):
        assert sum(lengths[begin : begin + 10]) / 10 == pytest.approx(16, abs=2)
    other = workload.warmup(3, 1000)
    assert other[0].prompt_token_ids[:16] != drawn[0].prompt_token_ids[:16]
    assert max(len(r.prompt_token_ids) + r.sampling.max_tokens for r in drawn) <= (
        workload.max_sequence_tokens
    )


def test_gains_are_over_the_row_before_and_over_the_first() -> None:
    figures = run_with({"naive": 2.0, "bf16": 5.0, "int8": 4.0})
    gains = [(row["gain_over_previous"], row["gain_over_first"]) for row in figures["rows"]]
    assert gains == [(None, 1.0), (2.5, 2.5), (0.8, 2.0)]
    assert [row["is_gain"] for row in figures["rows"]] == [None, True, False]
    assert figures["total"]["best"] == "bf16"
    assert figures["total"]["gain"] == 2.5


def test_failed_row_is_reported_and_the_next_is_compared_with_the_last_that_ran(
    tmp_path: Path,
) -> None:
    figures = run_with({"naive": 2.0, "int8": None, "int4": 6.0})
    failed, last = figures["rows"][1:]
    assert failed["error"] == "int8 is broken"
    assert failed["gain_over_previous"] is None
    assert last["gain_over_previous"] == 3.0
    console = Console(width=120, record=True, file=StringIO())
    console.print(techniques_report(figures))
    text = console.export_text()
    assert "INT8 failed: int8 is broken" in text
    assert "3.00x" in text and "FP16 to INT8" in text
    plot_techniques(figures, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_report_of_nothing_but_failures_says_so(tmp_path: Path) -> None:
    figures = run_with({"naive": None, "bf16": None})
    assert figures["total"]["gain"] is None
    console = Console(width=120, record=True, file=StringIO())
    console.print(techniques_report(figures))
    assert "no row could be measured" in console.export_text()
    plot_techniques(figures, tmp_path / "plot.png")


def test_row_survives_the_way_to_its_process() -> None:
    row = Row("int8", "/some/model", 2, Workload(seed=3))
    assert Row.decode(row.encode()) == row


def test_generate_answers_like_the_engine(folder: Path) -> None:
    """The naive server and the engine do the same work, to the token."""

    def tokens(server: Any) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        step = server.step

        def spy(emit: Any) -> None:
            def keep(output: EngineOutput) -> None:
                found.setdefault(output.request_id, []).extend(t.token_id for t in output.tokens)
                emit(output)

            step(keep)

        server.step = spy
        drive(server, SMALL.requests(131), Pace(2, 2), WallClock())
        return found

    engine_row = replace(technique("continuous_batching"), dtype="float32")
    config = config_of(Row("continuous_batching", str(folder), 1, SMALL), engine_row)
    engine, vocab_size = open_server(engine_row, config, SMALL)
    assert vocab_size == 131
    expected = tokens(GenerateServer(folder, torch.float32, is_packed=False))
    assert tokens(GenerateServer(folder, torch.float32, is_packed=True)) == expected
    assert tokens(engine) == expected
    assert [len(found) for found in expected.values()] == [
        request.sampling.max_tokens for request in SMALL.requests(131)
    ]


@pytest.mark.parametrize("name", ["packed_weights", "dynamic_batching", "prefix_cache"])
def test_row_counts_what_was_asked_for(folder: Path, name: str) -> None:
    figures = run_row(Row(name, str(folder), 1, SMALL))
    asked = SMALL.requests(131)
    assert figures["num_requests"] == len(asked)
    assert figures["num_out_tokens"] == sum(r.sampling.max_tokens for r in asked)
    assert figures["num_prompt_tokens"] == sum(len(r.prompt_token_ids) for r in asked)
    rate = figures["num_out_tokens"] / figures["window_s"]
    assert figures["out_tokens_per_s"] == pytest.approx(rate)
    assert figures["kernels"] == (native.isa() or "torch")
    # All users ask at once, so they all compute the prefix; the later ones find it.
    num_finders = len(asked) - SMALL.num_users if name == "prefix_cache" else 0
    cached = figures["cached_token_share"] * figures["num_prompt_tokens"]
    assert cached == pytest.approx(num_finders * SMALL.num_prefix_tokens)


@pytest.mark.parametrize("name", ["fused_kernels", "int8", "int4"])
def test_row_of_the_kernels_is_not_measured_without_them(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLUICE_KERNELS", "torch")
    monkeypatch.setattr(native, "_load", lambda: ("", "SLUICE_KERNELS=torch asks for it"))
    with pytest.raises(ConfigError, match=r"^SLUICE_KERNELS=torch: .* unset SLUICE_KERNELS") as got:
        run_row(Row(name, str(folder), 1, SMALL))
    assert got.value.field == "SLUICE_KERNELS"


def test_group_size_is_the_largest_that_divides(tmp_path: Path) -> None:
    wide = save_model("llama", tmp_path, hidden_size=128, intermediate_size=192)
    assert group_size_for(str(wide)) == 64
    assert group_size_for("demo") == 32


def test_command_names_the_techniques_that_there_are() -> None:
    error = error_of("bench", "techniques", "--technique=magic")
    assert "--technique=magic" in error and "int8" in error


def test_command_fails_where_a_row_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "cluster.bench.techniques.run_in_process",
        lambda row, _: {"error": "broken"} if row.technique == "int8" else answer(2.0),
    )
    rows = ["--technique=bf16", "--technique=int8"]
    result = run("bench", "techniques", *rows, "--quick", "--json")
    assert result.exit_code == 1
    assert [row["error"] for row in json.loads(result.stdout)["rows"]] == [None, "broken"]
    assert run("bench", "techniques", rows[0], "--quick", "--json").exit_code == 0


@pytest.mark.integration
def test_row_that_cannot_run_says_why() -> None:
    found = run_in_process(Row("bf16", "/nowhere", 1, QUICK), technique("bf16"))
    assert "/nowhere" in found["error"]


@pytest.mark.integration
def test_command_measures_rows_in_processes_of_their_own(folder: Path, tmp_path: Path) -> None:
    names = [f"--technique={name}" for name in ("naive", "prefix_cache")]
    png = tmp_path / "gains.png"
    options = [f"--model={folder}", "--quick", "--threads=1", f"--plot={png}", "--json"]
    result = run("bench", "techniques", *names, *options)
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert [row["error"] for row in figures["rows"]] == [None, None]
    rates = [row["out_tokens_per_s"] for row in figures["rows"]]
    assert figures["rows"][1]["gain_over_first"] == pytest.approx(rates[1] / rates[0])
    assert all(row["peak_rss_bytes"] > 2**20 for row in figures["rows"])
    assert figures["workload"]["num_requests"] == QUICK.num_requests
    assert figures["provenance"]["command"]
    assert png.stat().st_size > 1000
