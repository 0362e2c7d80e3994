"""The command tree, and what an error becomes: one line and an exit status.

Exit status: 0 done, 1 failed, 2 wrong arguments or configuration, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from cluster.cli.bench import bench
from cluster.cli.cache import cache
from cluster.cli.config import show_config
from cluster.cli.drain import drain
from cluster.cli.explain import explain
from cluster.cli.generate import generate
from cluster.cli.model import model
from cluster.cli.prefix import prefix
from cluster.cli.serve import serve
from cluster.cli.simulate import simulate
from cluster.cli.status import status
from cluster.errors import InvalidArgumentError, SluiceError

INTERRUPTED = 130

# Typer brings a click of its own, or uses the installed one: this is the parent in either.
_UsageError: type[typer.BadParameter] = typer.BadParameter.__mro__[1]


class _OneLineErrors(TyperGroup):
    def main(self, *args: Any, **options: Any) -> NoReturn:
        """Run a command line; what ends it early becomes one line and an exit status."""
        try:
            exit_status = super().main(*args, **{**options, "standalone_mode": False})
        except _UsageError as error:
            exit_status = _report_usage(error)
        except SluiceError as error:
            exit_status = _report(str(error), 2 if isinstance(error, InvalidArgumentError) else 1)
        except typer.Abort:
            exit_status = INTERRUPTED
        if exit_status == INTERRUPTED:
            _report("interrupted", INTERRUPTED)
        sys.exit(exit_status if isinstance(exit_status, int) else 0)


def _report_usage(error: typer.BadParameter) -> int:
    message = error.format_message()
    if not message:  # no arguments at all: the help was printed
        return error.exit_code
    hint = f"; see `{error.ctx.command_path} --help`" if error.ctx else ""
    return _report(f"{message.rstrip('.')}{hint}", error.exit_code)


def _report(message: str, status: int) -> int:
    typer.echo(f"sluice: {' '.join(message.split())}", err=True)
    return status


app = typer.Typer(
    cls=_OneLineErrors,
    help="Serve large language models on Ray: gRPC in, latency objectives kept.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(serve)
app.command()(generate)
app.command()(explain)
app.command()(status)
app.command()(drain)
app.command()(simulate)
app.command("config")(show_config)
app.add_typer(prefix, name="prefix")
app.add_typer(cache, name="cache")
app.add_typer(model, name="model")
app.add_typer(bench, name="bench")


def main() -> None:
    """Run the command line."""
    # Commands start Ray, which forks: what gRPC does in the child may crash, and what was started
    # then ends by SIGALRM three seconds later.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    app(prog_name="sluice")
