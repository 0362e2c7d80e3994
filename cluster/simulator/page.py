"""One self-contained HTML page of a simulation or of a sweep: tables, charts, settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from cluster.errors import ConfigError
from cluster.simulator.chart import Chart, require_matplotlib
from cluster.simulator.record import SimulationResult
from cluster.simulator.report import Report
from cluster.simulator.sweep import Knee, SweepPoint
from cluster.simulator.tables import TextTable, report_tables, sweep_tables

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px;
         margin: 2rem auto; padding: 0 1rem; }
  h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
  th, td { padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
  th { font-weight: 600; }
  th:first-child, td:first-child { text-align: left; padding-left: 0; }
  .wide { overflow-x: auto; }
  figure { margin: 0; } img { max-width: 100%; height: auto; }
  pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: 13px; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for table in tables %}
<section>
<h2>{{ table.title }}</h2>
<div class="wide"><table>
{% if table.columns | select | list %}
<tr>{% for name in table.columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% endif %}
{% for row in table.rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
</section>
{% endfor %}
{% for chart in charts %}
<section>
<h2>{{ chart.title }}</h2>
<figure><img src="{{ chart.uri }}" alt="{{ chart.title }}"></figure>
</section>
{% endfor %}
<section>
<h2>Settings</h2>
<pre>{{ settings }}</pre>
</section>
</body>
</html>
"""


def require_page() -> None:
    """Do nothing where pages can be made: asked before a long simulation, not after it.

    Raises:
        ConfigError: matplotlib or Jinja2 is not installed.
    """
    require_matplotlib()
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        message = "a page needs Jinja2: pip install 'sluice[plot]'"
        raise ConfigError(message, field="html") from error


def run_page(result: SimulationResult, report: Report) -> str:
    """Return the page of one simulation.

    Raises:
        ConfigError: matplotlib or Jinja2 is not installed.
    """
    require_page()
    from cluster.simulator.run_charts import run_charts

    title = f"Simulation of {report.workload}: {report.policy} at {report.rate_scale:g} x its rate"
    settings = {"seed": report.seed, "num_gateways": report.num_gateways, **report.settings}
    return _render(title, report_tables(report), run_charts(result), settings)


def sweep_page(
    points: Sequence[SweepPoint], knees: Mapping[str, Knee], settings: Mapping[str, object]
) -> str:
    """Return the page of a sweep.

    Args:
        points: At least one.
        knees: Of each policy.
        settings: What all points share.

    Raises:
        ConfigError: matplotlib or Jinja2 is not installed.
    """
    require_page()
    from cluster.simulator.sweep_charts import sweep_charts

    title = f"Sweep over {points[0].report['workload']}: {', '.join(knees)}"
    return _render(title, sweep_tables(points, knees), sweep_charts(points, knees), settings)


def _render(
    title: str,
    tables: Sequence[TextTable],
    charts: Sequence[Chart],
    settings: Mapping[str, object],
) -> str:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_TEMPLATE).render(
        title=title,
        tables=tables,
        charts=charts,
        settings=json.dumps(settings, indent=2, default=str),
    )
