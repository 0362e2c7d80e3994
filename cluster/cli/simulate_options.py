"""Options of `sluice simulate`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

_LOAD = "Load"
_CLUSTER = "Cluster"
_HARDWARE = "Hardware of a replica"
_FAULTS = "Faults"
_OBJECTIVE = "Objective"
_SWEEP = "Sweep"
_OUTPUT = "Output"


class Switch(StrEnum):
    """On or off."""

    ON = "on"
    OFF = "off"


class EngineOrder(StrEnum):
    """In which an engine computes prompts."""

    SLACK = "slack"
    FCFS = "fcfs"


Trace = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Mooncake JSONL or Azure CSV.", rich_help_panel=_LOAD),
]
WorkloadSpec = Annotated[
    str,
    typer.Option(
        "--workload",
        metavar="SPEC",
        help="Synthetic: a name, with values as name:key=value,key=value.",
        rich_help_panel=_LOAD,
    ),
]
SkipInvalid = Annotated[
    bool,
    typer.Option("--skip-invalid", help="Leave invalid rows out.", rich_help_panel=_LOAD),
]
NumRequests = Annotated[
    int | None, typer.Option(min=1, help="Only the first so many.", rich_help_panel=_LOAD)
]
Duration = Annotated[
    float | None,
    typer.Option(
        min=0.001,
        help="Only those of the first so many seconds, before scaling.",
        rich_help_panel=_LOAD,
    ),
]
RateScale = Annotated[
    str,
    typer.Option(
        metavar="X",
        help="Times the rate of the workload; with --sweep several: 1,2,4 or 1:8:0.5.",
        rich_help_panel=_LOAD,
    ),
]
Policy = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="router.policy of `sluice config`; with --sweep several: slo,random.",
        rich_help_panel=_CLUSTER,
    ),
]
Admission = Annotated[
    Switch | None,
    typer.Option(
        help="Refuse what cannot be in time; as each system would run: on for slo, else off.",
        rich_help_panel=_CLUSTER,
    ),
]
Order = Annotated[
    EngineOrder | None,
    typer.Option(
        "--engine-order",
        help="Of prompts; by default slack for slo, fcfs for the others.",
        rich_help_panel=_CLUSTER,
    ),
]
Replicas = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="At the begin; 16, or the fewest of --autoscale.",
        rich_help_panel=_CLUSTER,
    ),
]
Gateways = Annotated[int, typer.Option(min=1, max=1024, rich_help_panel=_CLUSTER)]
Autoscale = Annotated[
    str, typer.Option(metavar="FEWEST:MOST", help="Replicas.", rich_help_panel=_CLUSTER)
]
Seeds = Annotated[
    str,
    typer.Option(
        "--seed", metavar="N", help="With --sweep several: 0,1,2.", rich_help_panel=_CLUSTER
    ),
]
EventDelayMs = Annotated[
    float,
    typer.Option(
        min=0, max=60000, help="From an engine to a gateway and back.", rich_help_panel=_CLUSTER
    ),
]
PrefillRate = Annotated[
    float,
    typer.Option("--prefill-tokens-per-s", min=1, max=1e9, rich_help_panel=_HARDWARE),
]
DecodeStepMs = Annotated[
    float,
    typer.Option(min=0.001, max=60000, help="Of a step that decodes.", rich_help_panel=_HARDWARE),
]
CostModelFile = Annotated[
    Path | None,
    typer.Option(
        "--cost-model",
        metavar="FILE",
        help="In place of the two rates: what `sluice bench engine --fit` wrote.",
        rich_help_panel=_HARDWARE,
    ),
]
HardwareName = Annotated[
    str,
    typer.Option(
        "--hardware",
        metavar="NAME",
        help="Likewise: an estimate from the peaks of a100, h100, h200 or l40s.",
        rich_help_panel=_HARDWARE,
    ),
]
NumParameters = Annotated[
    float,
    typer.Option(min=1e6, max=1e14, help="Of the model on --hardware.", rich_help_panel=_HARDWARE),
]
KvBytesPerToken = Annotated[int, typer.Option(min=1, help="Likewise.", rich_help_panel=_HARDWARE)]
NumDevices = Annotated[
    int,
    typer.Option(min=1, max=1024, help="Of a replica, on --hardware.", rich_help_panel=_HARDWARE),
]
NumBlocks = Annotated[int, typer.Option(min=1, help="Of KV cache.", rich_help_panel=_HARDWARE)]
BlockSize = Annotated[int, typer.Option(min=1, help="Tokens.", rich_help_panel=_HARDWARE)]
MaxBatchedTokens = Annotated[
    int,
    typer.Option("--max-num-batched-tokens", min=1, help="Of a step.", rich_help_panel=_HARDWARE),
]
Fails = Annotated[
    list[str] | None,
    typer.Option(
        "--fail",
        metavar="REPLICA@S[:S]",
        help="It dies; a new one serves after so long. May be repeated.",
        rich_help_panel=_FAULTS,
    ),
]
Slows = Annotated[
    list[str] | None,
    typer.Option(
        "--slow",
        metavar="REPLICA@S:FACTOR[:S]",
        help="Its steps take so many times as long. May be repeated.",
        rich_help_panel=_FAULTS,
    ),
]
SloTtftS = Annotated[
    float, typer.Option(min=0, help="0: no objective.", rich_help_panel=_OBJECTIVE)
]
SloTtftMsPerToken = Annotated[
    float,
    typer.Option(min=0, help="More for each token of the prompt.", rich_help_panel=_OBJECTIVE),
]
SloTpotMs = Annotated[
    float, typer.Option(min=0, help="0: no objective.", rich_help_panel=_OBJECTIVE)
]
IsSweep = Annotated[
    bool,
    typer.Option("--sweep", help="Every policy at every rate.", rich_help_panel=_SWEEP),
]
IsSerial = Annotated[
    bool,
    typer.Option("--serial", help="One after the other, without Ray.", rich_help_panel=_SWEEP),
]
Target = Annotated[
    float,
    typer.Option(min=0.001, max=1, help="Goodput that a rate must hold.", rich_help_panel=_SWEEP),
]
UsdPerHour = Annotated[
    float | None, typer.Option(min=0, help="Of one replica.", rich_help_panel=_OUTPUT)
]
HtmlFile = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", help="Write a page.", rich_help_panel=_OUTPUT),
]
