"""The command tree, and what an error becomes: one line and an exit status.

Exit status: 0 done, 1 failed, 2 wrong arguments or configuration, 130 interrupted.
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from cluster.cli.bench import bench
from cluster.cli.config import show_config
from cluster.cli.generate import generate
from cluster.cli.model import model
from cluster.cli.serve import serve
from cluster.cli.status import status
from cluster.errors import InvalidArgumentError, SluiceError

INTERRUPTED = 130


class _OneLineErrors(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """Run the command; an error that Sluice raised on purpose ends it without a traceback."""
        try:
            return super().invoke(ctx)
        except SluiceError as error:
            typer.echo(f"sluice: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2 if isinstance(error, InvalidArgumentError) else 1) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(INTERRUPTED) from error


app = typer.Typer(
    cls=_OneLineErrors,
    help="Serve large language models on Ray: gRPC in, latency objectives kept.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(serve)
app.command()(generate)
app.command()(status)
app.command("config")(show_config)
app.add_typer(model, name="model")
app.add_typer(bench, name="bench")


def main() -> None:
    """Run the command line."""
    app(prog_name="sluice")
