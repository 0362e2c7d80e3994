"""`sluice model random | info | quantize | eval`: make models, look at them, score them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from cluster.cli.model_eval import evaluate_model
from cluster.cli.model_quantize import quantize_model
from cluster.cli.options import AsJson, bar_options, print_json
from cluster.config import DEMO_MODEL_PATH, ModelConfig

if TYPE_CHECKING:
    from cluster.model.model_info import ModelInfo

model = typer.Typer(help="Make, inspect, quantize and score models.", no_args_is_help=True)
model.command("quantize")(quantize_model)
model.command("eval")(evaluate_model)


@model.command("random")
def random_model(
    shape: Annotated[str, typer.Option(help="tiny, llama-0.5b, llama-1b, llama-3b, llama-8b.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="New or empty folder.")],
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="The same seed gives the same weights.")] = 0,
    json: AsJson = False,
) -> None:
    """Write a model of a well-known shape with random weights, for benchmarks."""
    from cluster.model.random_models import write_random_model

    columns = (TextColumn(shape), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, **bar_options()) as progress:
        task = progress.add_task(shape, total=None)
        num_bytes = write_random_model(
            shape,
            out,
            dtype=dtype,
            seed=seed,
            tokenizer_from=DEMO_MODEL_PATH,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if json:
        print_json({"path": str(out), "shape": shape, "dtype": dtype, "weight_bytes": num_bytes})
    else:
        typer.echo(f"{out}: {num_bytes / 2**20:.0f} MiB of {dtype} weights")


@model.command("info")
def model_info(
    path: Annotated[str, typer.Argument(help="Folder of a checkpoint, or 'demo'.")] = "demo",
    json: AsJson = False,
) -> None:
    """Print what a checkpoint is: architecture, sizes, context."""
    from cluster.model.checkpoint import inspect_checkpoint

    info = inspect_checkpoint(ModelConfig(path=path).folder)
    if json:
        print_json(asdict(info))
    else:
        Console().print(_info_table(info))


def _info_table(info: ModelInfo) -> Table:
    heads = f"{info.num_heads} of {info.head_dim}, {info.num_kv_heads} for keys and values"
    quantization = info.quantization
    if info.quantization_group_size:
        quantization += f" in groups of {info.quantization_group_size}"
    rows = {
        "folder": info.folder,
        "family": info.model_type,
        "weights": f"{info.weight_bytes / 2**20:.1f} MiB, {info.dtype}",
        "quantization": quantization,
        "context": f"{info.max_model_len} tokens",
        "vocabulary": f"{info.vocab_size} tokens",
        "layers": str(info.num_layers),
        "hidden size": str(info.hidden_size),
        "heads": heads,
        "pipeline stages": f"up to {info.num_layers}" if info.can_be_staged else "1 only",
    }
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, escape(value))
    return table
