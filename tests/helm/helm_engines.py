"""Two engines that render the chart: the pinned binary (Helm 3), helm-python-sdk (Helm 4)."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "sluice"
RELEASE = "chat"
KUBE_VERSION = "1.31.0"  # Helm 3.10 would assume 1.25, which the chart refuses

Values = dict[str, Any]
Objects = dict[str, dict[str, Any]]
Engine = Callable[[Values], Objects]


class RenderError(Exception):
    """The engine refused the values; the message is the engine's."""


def run_helm(*args: str, values: Values | None = None) -> str:
    """Return what the pinned helm prints; skip where it cannot be had."""
    command = [str(ROOT / "scripts" / "helm"), *args]
    if values is not None:
        command += ["--values", "-"]
    text = json.dumps(values or {})
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=180)
    if done.returncode == 69:
        pytest.skip(done.stderr.strip())
    if done.returncode:
        raise RenderError(done.stdout + done.stderr)
    return done.stdout


def helm3(values: Values) -> Objects:
    """Render with the pinned binary."""
    text = run_helm("template", RELEASE, str(CHART), "--kube-version", KUBE_VERSION, values=values)
    return _by_name([text])


def helm4(values: Values) -> Objects:
    """Render with the engine of Helm 4; skip where its package is not installed."""
    sdk = pytest.importorskip("helm_python", reason="helm-python-sdk is not installed (dev extra)")
    try:
        files = sdk.Chart.load(CHART).render(values, name=RELEASE, namespace="default")
    except (sdk.HelmValuesError, sdk.HelmRenderError) as error:
        raise RenderError(str(error)) from error
    return _by_name([text for name, text in files.items() if not name.endswith("NOTES.txt")])


def _by_name(texts: list[str]) -> Objects:
    found: Objects = {}
    for text in texts:
        for document in yaml.safe_load_all(text):
            if document:
                key = f"{document['kind']}/{document['metadata']['name']}"
                assert key not in found, f"{key} is rendered twice"
                found[key] = document
    return found
