"""`sluice generate`: stream one completion to the terminal."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.cli.options import DEFAULT_ADDRESS, Address, AsJson, CaFile
from cluster.types import SamplingParams

_DEFAULTS = SamplingParams()
_SAMPLING = "Sampling"
_END = "End of the answer"


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads standard input.")],
    address: Address = DEFAULT_ADDRESS,
    ca_file: CaFile = None,
    model: Annotated[str, typer.Option(help="Name; needed where several are served.")] = "",
    timeout_s: Annotated[float, typer.Option(min=0.001, help="Deadline of the request.")] = 600.0,
    temperature: Annotated[
        float, typer.Option(help="0 is greedy.", rich_help_panel=_SAMPLING)
    ] = _DEFAULTS.temperature,
    top_k: Annotated[
        int, typer.Option(help="Keep the k likeliest; 0 keeps all.", rich_help_panel=_SAMPLING)
    ] = _DEFAULTS.top_k,
    top_p: Annotated[
        float, typer.Option(help="Keep this probability.", rich_help_panel=_SAMPLING)
    ] = _DEFAULTS.top_p,
    min_p: Annotated[
        float, typer.Option(help="Share of the likeliest's.", rich_help_panel=_SAMPLING)
    ] = _DEFAULTS.min_p,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: fewer repetitions.", rich_help_panel=_SAMPLING)
    ] = _DEFAULTS.repetition_penalty,
    presence_penalty: Annotated[
        float, typer.Option(help="Once per token seen.", rich_help_panel=_SAMPLING)
    ] = _DEFAULTS.presence_penalty,
    frequency_penalty: Annotated[
        float, typer.Option(help="Per occurrence.", rich_help_panel=_SAMPLING)
    ] = _DEFAULTS.frequency_penalty,
    seed: Annotated[
        int, typer.Option(min=0, help="Same seed, same text.", rich_help_panel=_SAMPLING)
    ] = _DEFAULTS.seed,
    max_tokens: Annotated[
        int, typer.Option(help="At the most.", rich_help_panel=_END)
    ] = _DEFAULTS.max_tokens,
    min_tokens: Annotated[
        int, typer.Option(help="No stop before.", rich_help_panel=_END)
    ] = _DEFAULTS.min_tokens,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; repeat.", rich_help_panel=_END)
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after end-of-text.", rich_help_panel=_END)
    ] = False,
    json: AsJson = False,
) -> None:
    """Stream a completion to the terminal."""
