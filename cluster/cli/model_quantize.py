"""`sluice model quantize`: write a checkpoint anew in fewer bits."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from cluster.cli.options import AsJson, bar_options, print_json
from cluster.config import ModelConfig


def quantize_model(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder, or 'demo'.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New or empty folder.")],
    scheme: Annotated[
        str, typer.Option(help="Of the layers: int8 or int4; the head becomes int8.")
    ],
    group_size: Annotated[
        int, typer.Option(help="Weights of a row that share a scale, for int4: 32, 64 or 128.")
    ] = 128,
    json: AsJson = False,
) -> None:
    """Quantize a checkpoint's linears; the result is in compressed-tensors format."""
    from cluster.model.checkpoint import inspect_checkpoint
    from cluster.model.quantization.writer import quantize_checkpoint

    folder = ModelConfig(path=source).folder
    inspect_checkpoint(folder)
    columns = (TextColumn(scheme), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, **bar_options()) as progress:
        task = progress.add_task(scheme, total=None)
        written = quantize_checkpoint(
            folder,
            out,
            scheme,
            group_size,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if json:
        group = group_size if scheme == "int4" else 0
        print_json({"path": str(out), "scheme": scheme, "group_size": group, **asdict(written)})
        return
    before, after = written.source_bytes / 2**20, written.weight_bytes / 2**20
    typer.echo(f"{out}: {written.num_quantized} weights, {before:.1f} MiB became {after:.1f} MiB")
