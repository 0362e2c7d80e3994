"""Figures that are drawn without a screen and written to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.errors import ConfigError


def open_pyplot() -> Any:
    """Return matplotlib's pyplot, drawing into memory.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        message = "--plot needs matplotlib: pip install 'sluice[plot]'"
        raise ConfigError(message, field="plot") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def write_png(pyplot: Any, figure: Any, path: Path) -> None:
    """Write a figure and let go of it.

    Raises:
        ConfigError: The file cannot be written.
    """
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {path}: {error}", field="plot") from error
    finally:
        pyplot.close(figure)
