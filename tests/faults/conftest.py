"""The one fixture of this room."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fault_scene import Scene, running_scene


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Two groups, four tenants, a Redis that fails; started once per file."""
    with running_scene(tmp_path_factory.mktemp("faults")) as scene:
        yield scene
