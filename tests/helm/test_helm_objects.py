"""Every rendered object is one that an API server accepts, unknown fields included."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from helm_crd import crd_validator
from helm_engines import CHART, Engine, run_helm
from helm_values import CASES

CRD_FILES = {
    "RayService": ("ray.io_rayservices.yaml", "v1"),
    "PodMonitor": ("monitoring.coreos.com_podmonitors.yaml", "v1"),
}
KUBERNETES = ("1.27", "1.37")  # the oldest that the chart allows, the newest known


@cache
def _validator(kind: str) -> jsonschema.Draft202012Validator:
    return crd_validator(*CRD_FILES[kind])


def _pods(ray_service: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = ray_service["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [{"apiVersion": "v1", "kind": "Pod", **group["template"]} for group in groups]


@pytest.mark.parametrize("case", CASES)
def test_chart_core_objects_validate(render: Engine, case: str) -> None:
    objects = render(CASES[case])
    core = [item for item in objects.values() if item["kind"] not in CRD_FILES]
    assert core
    for version in KUBERNETES:
        for item in [*core, *_pods(objects[next(k for k in objects if "RayService" in k)])]:
            kubernetes_validate.validate(item, version, strict=True)


@pytest.mark.parametrize("case", CASES)
def test_chart_custom_resources_validate(render: Engine, case: str) -> None:
    custom = [item for item in render(CASES[case]).values() if item["kind"] in CRD_FILES]
    assert custom
    for item in custom:
        errors = [f"{e.json_path}: {e.message}" for e in _validator(item["kind"]).iter_errors(item)]
        assert not errors, "\n".join(errors)


def test_crd_check_finds_unknown_fields(render: Engine) -> None:
    good = render({})["RayService/chat"]
    for path in (
        ("spec",),
        ("spec", "rayClusterConfig"),
        ("spec", "rayClusterConfig", "headGroupSpec", "template", "spec"),
    ):
        bad = copy.deepcopy(good)
        node = bad
        for name in path:
            node = node[name]
        node["unheardOf"] = 1
        (error,) = _validator("RayService").iter_errors(bad)
        assert "unheardOf" in error.message


@pytest.mark.integration
@pytest.mark.parametrize("case", CASES)
def test_chart_lints_strictly(case: str) -> None:
    run_helm("lint", "--strict", str(CHART), values=CASES[case])
