"""`sluice generate`: stream one completion to the terminal."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.cli.connecting import Connection, connecting
from cluster.cli.options import AsJson, OfClass, TpotS, TtftS, print_json, read_prompt
from cluster.errors import InvalidArgumentError

if TYPE_CHECKING:
    from cluster.client import Completion, Event, Finished, Queued, ResumeOptions, ScoredToken

_SAMPLING = "Sampling (unset: the gateway's defaults)"
_END = "End of the answer"
_CUT = "Connections that break"


@connecting
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="Text to continue; - reads standard input.")
    ] = None,
    *,
    connection: Connection,
    prefix: Annotated[
        str, typer.Option(metavar="NAME", help="Registered prefix that comes before the prompt.")
    ] = "",
    model: Annotated[str, typer.Option(help="Name; empty is the only one served.")] = "",
    timeout_s: Annotated[float, typer.Option(min=0.001, help="Deadline of the request.")] = 600.0,
    request_id: Annotated[
        str,
        typer.Option(metavar="ID", help="Chosen by you, new for each request: it is for later."),
    ] = "",
    no_resume: Annotated[
        bool,
        typer.Option("--no-resume", help="Fail where the stream is cut off.", rich_help_panel=_CUT),
    ] = False,
    detach: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="It goes on for so long without this command.",
            rich_help_panel=_CUT,
        ),
    ] = 0.0,
    resume_id: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="Show the whole answer to an earlier request and go on with it.",
            rich_help_panel=_CUT,
        ),
    ] = None,
    service_class: OfClass = None,
    ttft_s: TtftS = None,
    tpot_s: TpotS = None,
    session: Annotated[
        str, typer.Option(metavar="NAME", help="Prefers the replica that served NAME before.")
    ] = "",
    temperature: Annotated[
        float | None,
        typer.Option(help="0 is greedy.", rich_help_panel=_SAMPLING),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(min=0, help="Keep the k likeliest; 0 keeps all.", rich_help_panel=_SAMPLING),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Keep the likeliest with this probability.", rich_help_panel=_SAMPLING),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            help="Keep those with this share of the likeliest's.", rich_help_panel=_SAMPLING
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(help="Above 1: fewer repetitions.", rich_help_panel=_SAMPLING),
    ] = None,
    presence_penalty: Annotated[
        float | None,
        typer.Option(help="Per token that the answer has.", rich_help_panel=_SAMPLING),
    ] = None,
    frequency_penalty: Annotated[
        float | None,
        typer.Option(help="Per occurrence in the answer.", rich_help_panel=_SAMPLING),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="The same seed gives the same answer.", rich_help_panel=_SAMPLING),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=0, help="Tokens at the most.", rich_help_panel=_END),
    ] = None,
    min_tokens: Annotated[
        int | None,
        typer.Option(min=0, help="Tokens before any stop.", rich_help_panel=_END),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Text to end before; may be repeated.", rich_help_panel=_END),
    ] = None,
    stop_token_id: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Token to end at; may be repeated.", rich_help_panel=_END),
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after end-of-text.", rich_help_panel=_END)
    ] = False,
    logprobs: Annotated[
        int | None,
        typer.Option(min=0, help="Report each token, and the N likeliest, with log probability."),
    ] = None,
    json: AsJson = False,
) -> None:
    """Stream a completion to the terminal."""
    choices = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "seed": seed,
        "max_tokens": max_tokens,
        "min_tokens": min_tokens,
        "stop": stop,
        "stop_token_ids": stop_token_id,
        "ignore_eos": ignore_eos,
        "logprobs": logprobs,
    }
    sampling = {name: value for name, value in choices.items() if value is not None}
    request: dict[str, Any] = {
        "model": model,
        "sampling": sampling,
        "prefix": prefix,
        "service_class": service_class,
        "ttft_s": ttft_s,
        "tpot_s": tpot_s,
        "session": session,
    }
    stream: ResumeOptions = {
        "timeout_s": timeout_s,
        "detach_on_disconnect_s": detach,
        "report_resumptions": not json,
    }
    if no_resume:
        stream["resume_timeout_s"] = 0.0
    if resume_id is not None:
        _refuse_beside_resume({"TEXT": prompt, "request_id": request_id, **sampling, **request})
    elif prompt is None:
        raise InvalidArgumentError("no prompt: give TEXT, or --resume-id", field="prompt")
    text = read_prompt(prompt, None)
    request_id = resume_id or request_id or uuid.uuid4().hex
    with connection.open() as client:
        events = (
            client.stream(text, request_id=request_id, **request, **stream)
            if resume_id is None
            else client.resume(resume_id, **stream)
        )
        if json:
            print_json(asdict(_completion(events, request_id)))
        else:
            _print(events, request_id)


def _refuse_beside_resume(values: dict[str, Any]) -> None:
    """Raise if something is said of a request that was begun long ago.

    Raises:
        InvalidArgumentError: It is.
    """
    given = [name for name, value in values.items() if value and name != "sampling"]
    if given:
        raise InvalidArgumentError(
            f"--resume-id goes on with a request as it was begun: leave out {', '.join(given)}",
            field="resume-id",
        )


def _completion(events: Iterable[Event], request_id: str) -> Completion:
    from cluster.rpc.completion import CompletionParts

    parts = CompletionParts(request_id)
    for event in events:
        parts.add(event)
    return parts.completion()


def _print(events: Iterable[Event], request_id: str) -> None:
    """Print the text as it comes, and what it waited for and took on standard error."""
    from cluster.client import Finished, Queued, Resumed, TextDelta

    scored: list[ScoredToken] = []
    for event in events:
        if isinstance(event, TextDelta):
            typer.echo(event.text, nl=False)
            scored += event.logprobs
        elif isinstance(event, Queued):
            typer.echo(_waiting(event), err=True)
        elif isinstance(event, Resumed):
            typer.echo(f"[cut off, resumed at {event.address} after {event.gap_s:.2f} s]", err=True)
        elif isinstance(event, Finished):
            typer.echo()
            if scored:
                Console(stderr=True).print(_logprobs_table(scored))
            typer.echo(_end(event, request_id), err=True)


def _waiting(event: Queued) -> str:
    estimate = "" if event.estimate_s is None else f", about {event.estimate_s:.1f} s"
    return f"[queued: {event.position} before it{estimate}]"


def _end(event: Finished, request_id: str) -> str:
    usage, timings = event.usage, event.timings
    return (
        f"[{event.finish_reason}: {usage.completion_tokens} tokens, "
        f"prompt {usage.prompt_tokens} ({usage.cached_tokens} cached), "
        f"TTFT {timings.ttft_s * 1e3:.0f} ms, {timings.total_s:.2f} s, request {request_id}]"
    )


def _logprobs_table(scored: Iterable[ScoredToken]) -> Table:
    table = Table("token", "logprob", "likeliest")
    for token in scored:
        likeliest = ", ".join(f"{other.text!r} {other.logprob:.2f}" for other in token.top)
        table.add_row(escape(repr(token.text)), f"{token.logprob:.2f}", escape(likeliest))
    return table
