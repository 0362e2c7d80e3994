"""The chart is rendered by Helm 3 (needs npm at first use: integration) and by Helm 4's engine."""

from __future__ import annotations

import pytest
from helm_engines import Engine, helm3, helm4


@pytest.fixture(
    params=[
        pytest.param(helm3, marks=pytest.mark.integration, id="helm3"),
        pytest.param(helm4, id="helm4"),
    ]
)
def render(request: pytest.FixtureRequest) -> Engine:
    """Render the chart with values."""
    engine: Engine = request.param
    return engine
