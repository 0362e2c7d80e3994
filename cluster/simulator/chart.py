"""Charts that are drawn without a screen and become images inside of a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Chart:
    """An image that a page carries in itself."""

    title: str  # above it, and in place of it where it cannot be seen
    uri: str  # `data:` with the image


def require_matplotlib() -> None:
    """Do nothing where charts can be drawn.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        message = "a page needs matplotlib: pip install 'sluice[plot]'"
        raise ConfigError(message, field="html") from error


def new_axes(num_panels: int = 1) -> tuple[Any, list[Any]]:
    """Return an empty figure and its panels, side by side.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2 * num_panels, 3.6), layout="constrained")
    panels = figure.subplots(1, num_panels, squeeze=False)[0]
    for axes in panels:
        axes.grid(visible=True, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(panels)


def scale_log(axes: Any, *names: str) -> None:
    """Make axes of a panel (`x`, `y`) logarithmic, with plain numbers at 1, 2, 5 of a decade."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    for name in names:
        axes.set(**{f"{name}scale": "log"})
        axis = getattr(axes, f"{name}axis")
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FormatStrFormatter("%g"))
        axis.set_minor_formatter(NullFormatter())


def to_chart(title: str, figure: Any) -> Chart:
    """Return a figure as an image; one figure always gives the same bytes."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    # Text stays text: the browser's font draws it, and the page is a fraction of the size.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", dpi=120, metadata={"Date": None})
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return Chart(title, f"data:image/svg+xml;base64,{encoded}")


def shares(values: Sequence[float], total: int) -> tuple[list[float], list[float]]:
    """Return values in order, and what share of `total` is at most as large as each."""
    ordered = sorted(values)
    return ordered, [(index + 1) / total for index in range(len(ordered))]
