"""`sluice model eval`: how well a model predicts text, and what its quantization costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from cluster.cli.options import AsJson, ConfigFile, Overrides, bar_options, print_json
from cluster.config import ClusterConfig, ModelConfig, load_config
from cluster.errors import ConfigError

if TYPE_CHECKING:
    from cluster.model.evaluate import Agreement, Evaluation

_PROMPT_TOKENS = 64
_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def evaluate_model(
    model: Annotated[
        str | None, typer.Argument(help="Folder of a checkpoint, or 'demo'; else model.path.")
    ] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="May be repeated; else files unknown to the demo model."),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=0, help="Score about so many, spread over the text; 0: all.")
    ] = 16_384,
    against: Annotated[
        str,
        typer.Option(
            metavar="bf16|fp32|DIR", help="Compare with the same model unquantized, or another."
        ),
    ] = "",
    prompts: Annotated[int, typer.Option(min=0, help="Continued greedily by both.")] = 16,
    continue_tokens: Annotated[int, typer.Option(min=1, help="Of each prompt.")] = 32,
    json: AsJson = False,
) -> None:
    """Score held-out text in this process, with the modules and the paged cache that serve."""
    from cluster.model.evaluate import compare
    from cluster.model.held_out import cut_windows, encode_texts, held_out_texts, read_text

    if model is not None:
        overrides = [*(overrides or []), f"model.path={model}"]
    settings = load_config(config, overrides)
    reference = _reference(settings.model, against) if against else None
    ours = _prepare(settings)
    texts = [read_text(file) for file in text] if text else held_out_texts()
    encoded = encode_texts(settings.model.folder, texts)
    windows = cut_windows(encoded, ours["max_model_len"], tokens)
    num_prompts = prompts if reference else 0
    result = _run(settings, settings.model, windows, num_prompts, continue_tokens)
    report = {**ours, **_figures(result)}
    if reference is not None:
        plain = settings.cache.model_copy(update={"dtype": "auto"})
        other = _run(
            settings.model_copy(update={"cache": plain}),
            reference,
            windows,
            num_prompts,
            continue_tokens,
        )
        agreement = compare(result, other)
        report["against"] = {
            "model": against,
            "cache_dtype": "auto",
            **_figures(other),
            **_finite(agreement),
        }
    if json:
        print_json(report)
    else:
        Console().print(_table(report))


def _reference(model: ModelConfig, against: str) -> ModelConfig:
    """Return the model to compare with.

    Raises:
        ConfigError: There is none: the checkpoint itself is quantized.
    """
    from cluster.model.checkpoint import inspect_checkpoint

    changes: dict[str, Any] = {"quantization": "none"}
    if against not in _DTYPES:
        return model.model_copy(update={**changes, "path": against, "dtype": "auto"})
    if inspect_checkpoint(model.folder).is_quantized:
        raise ConfigError(
            f"against={against}: {model.folder} is quantized itself; give the folder of the model "
            "that it was made from",
            field="against",
        )
    return model.model_copy(update={**changes, "dtype": _DTYPES[against]})


def _prepare(settings: ClusterConfig) -> dict[str, Any]:
    """Return what the report says of the model, before it is loaded.

    Raises:
        ConfigError: Several workers are configured.
    """
    import torch

    from cluster.model.checkpoint import inspect_checkpoint

    parallel = settings.parallel
    if parallel.world_size != 1:
        raise ConfigError(
            f"parallel.tp={parallel.tp}, parallel.pp={parallel.pp}: a model is evaluated in one "
            "process; leave both at 1",
            field="parallel.tp",
        )
    if parallel.threads_per_worker:
        torch.set_num_threads(parallel.threads_per_worker)
    info = inspect_checkpoint(settings.model.folder)
    return {
        "model": str(settings.model.folder),
        "dtype": info.dtype_for(settings.model.dtype),
        "quantization": info.quantization_for(settings.model.quantization),
        "cache_dtype": settings.cache.dtype,
        "max_model_len": settings.model.max_model_len or info.max_model_len,
    }


def _run(
    settings: ClusterConfig,
    model: ModelConfig,
    windows: Sequence[Sequence[int]],
    num_prompts: int,
    num_continued: int,
) -> Evaluation:
    from cluster.model.evaluate import evaluate

    columns = (TextColumn(model.served_name), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), **bar_options()) as progress:
        task = progress.add_task("", total=None)
        return evaluate(
            model,
            settings.cache,
            windows,
            prompt_tokens=_PROMPT_TOKENS,
            num_prompts=num_prompts,
            num_continued=num_continued,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )


def _figures(result: Evaluation) -> dict[str, Any]:
    return {
        "num_tokens": result.num_tokens,
        "nats_per_token": result.nats_per_token,
        "perplexity": result.perplexity,
    }


def _finite(agreement: Agreement) -> dict[str, float | None]:
    return {k: None if math.isnan(v) else v for k, v in asdict(agreement).items()}


def _table(report: dict[str, Any]) -> Table:
    against = report.get("against")
    table = Table("", "model", *(["against"] if against else []))
    for name in ("model", "dtype", "quantization", "cache_dtype", "num_tokens"):
        other = [str(against.get(name, ""))] if against else []
        table.add_row(name.replace("_", " "), escape(str(report[name])), *other)
    for name in ("nats_per_token", "perplexity"):
        other = [f"{against[name]:.4f}"] if against else []
        table.add_row(name.replace("_", " "), f"{report[name]:.4f}", *other)
    if against:
        table.add_section()
        table.add_row("perplexity ratio", f"{against['perplexity_ratio']:.4f}")
        for name, key in (
            ("equal greedy choices", "choices"),
            ("equal greedy continuations", "continuations"),
            ("their tokens before a difference", "continued_tokens"),
        ):
            value = against[key]
            table.add_row(name, "none" if value is None else f"{value:.1%}")
    return table
