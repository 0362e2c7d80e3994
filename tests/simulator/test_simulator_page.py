from __future__ import annotations

import base64
import re
import sys

import pytest

from cluster.errors import ConfigError
from cluster.simulator.page import require_page, run_page, sweep_page
from cluster.simulator.report import make_report
from cluster.simulator.sweep import SweepPoint, knees
from tests.simulator.simulation_results import random_result, refused, request, result


def images_of(page: str) -> dict[str, str]:
    """Return the SVG of each chart by its title."""
    found = re.findall(r'<img src="data:image/svg\+xml;base64,([^"]+)" alt="([^"]+)">', page)
    return {title: base64.b64decode(data).decode() for data, title in found}


@pytest.fixture(scope="module")
def page() -> str:
    simulated = random_result(600)
    return run_page(simulated, make_report(simulated, usd_per_hour=2.5))


def points() -> list[SweepPoint]:
    report = make_report(random_result(50)).to_dict()
    goodput = {"slo": (1.0, 0.95, 0.8), "random": (0.8, 0.3, 0.0), "prefix": (1.0, 1.0, 1.0)}
    return [
        SweepPoint(policy, rate_scale, 0, {**report, "goodput": values[index]})
        for policy, values in goodput.items()
        for index, rate_scale in enumerate((1.0, 2.0, 3.0))
    ]


def test_page_needs_nothing_from_outside(page: str) -> None:
    for text in (page, *images_of(page).values()):
        assert not re.search(r'(src|href|url)\s*[=(]\s*["\']?(https?:)?//', text)
        assert "<script" not in text and "@import" not in text
    sources = re.findall(r'src="([^"]{0,30})', page)
    assert sources and all(source.startswith("data:image/svg+xml;base64,") for source in sources)


def test_page_shows_every_chart_of_a_full_run(page: str) -> None:
    charts = images_of(page)
    assert "Goodput over time, of every 20 s" in charts  # of ten minutes
    assert [title.split(":")[0].split(",")[0] for title in charts] == [
        "TTFT",
        "TPOT",
        "Goodput over time",
        "Load over time",
        "Replicas over time",
        "Load by replica",
        "TTFT from dispatch",
    ]
    for word in ("objectives, 2", "objective of the request"):
        assert word in next(iter(charts.values()))
    assert "objective, 0.05 s" in charts["TPOT: share of all requests that was at least so fast"]
    assert "queued at gateways" in charts["Load over time"]
    assert "as predicted" in charts["TTFT from dispatch: predicted and actual"]


def test_page_shows_figures_settings_and_groups(page: str) -> None:
    simulated = random_result(600)
    report = make_report(simulated)
    assert report.goodput is not None
    assert f"{report.goodput:.1%} of all requests" in page
    for text in ("tenant-2", "USD per million tokens", "&#34;seed&#34;: 7"):
        assert text in page


def test_page_escapes_what_it_is_given(page: str) -> None:
    assert "&lt;b&gt;" in page
    assert "<b>" not in page


def test_page_leaves_out_charts_without_figures() -> None:
    nothing = result([refused(0)], [], num_replicas_over_time=[])
    charts = images_of(run_page(nothing, make_report(nothing)))
    assert list(charts) == ["Goodput over time, of every 1 s"]


def test_page_of_no_requests_is_a_page() -> None:
    empty = result([], duration_s=0.0)
    assert "</html>" in run_page(empty, make_report(empty))


def test_page_draws_each_of_few_objectives() -> None:
    one = result([request(index) for index in range(3)])
    chart = next(iter(images_of(run_page(one, make_report(one))).values()))
    assert "objective, 2 s" in chart
    assert "objective of the request" not in chart


def test_page_has_the_same_bytes_for_the_same_result() -> None:
    simulated = random_result(60)
    report = make_report(simulated)
    assert run_page(simulated, report) == run_page(simulated, report)


def test_sweep_page_shows_the_rate_that_each_policy_holds() -> None:
    made = points()
    page = sweep_page(made, knees(made), {"num_replicas": 16})
    charts = images_of(page)
    goodput = next(iter(charts.values()))
    for text in ("slo, 2.33 x", "prefix, &gt;3.00 x", ">random<", ">90%<"):
        assert text in goodput, text
    assert [title.split(",")[0] for title in charts][1:] == [
        "Prefix hit rate",
        "TTFT p90",
        "Refused",
    ]
    for text in ("2.33 x", "above 3.00 x", "none", "95.0%", "num_replicas"):
        assert text in page


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_page_without_its_packages_says_what_to_install(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=r"pip install 'sluice\[plot\]'"):
        require_page()
