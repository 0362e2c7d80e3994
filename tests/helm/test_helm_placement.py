"""What the application reserves with Ray fits the pods that the chart makes for it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from helm_engines import helm4
from helm_values import CASES

pytestmark = pytest.mark.integration  # imports Ray


def _serve(case: str) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """Return the application's arguments and the groups' rayStartParams."""
    (service,) = (item for item in helm4(CASES[case]).values() if item["kind"] == "RayService")
    arguments = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["args"]
    groups = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    return arguments, {group["groupName"]: group["rayStartParams"] for group in groups}


@pytest.mark.parametrize("case", ["default", "autoscaling"])
def test_each_gateway_pod_has_room_for_one_gateway_and_nothing_else(case: str) -> None:
    from cluster.gateway.app import build

    arguments, groups = _serve(case)
    asked = build(arguments)._bound_deployment.ray_actor_options
    offered = json.loads(yaml.safe_load(groups["gateway"]["resources"]))
    (resource,) = offered
    assert offered[resource] // asked["resources"][resource] == 1
    # A pod with CPUs to spare would attract the ranks of a model, and its memory is not for them.
    assert asked["num_cpus"] <= float(groups["gateway"]["num-cpus"]) == 0


@pytest.mark.parametrize("case", ["default", "autoscaling"])
def test_a_worker_pod_holds_a_whole_group_on_cpus(case: str) -> None:
    from cluster.config import parse_config
    from cluster.replica.placement import group_num_cpus

    arguments, groups = _serve(case)
    parallel = parse_config(arguments).parallel
    assert group_num_cpus(parallel) <= float(groups["worker"]["num-cpus"])
