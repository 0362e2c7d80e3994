"""The deployment files agree with the package and with one another."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import ClusterConfig, load_config, parse_config

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILES = sorted(DEPLOY.glob("Dockerfile.c*[au]"))


def _instructions(dockerfile: Path) -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", dockerfile.read_text())
    lines = [line.strip() for line in text.splitlines()]
    parts = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    return [(name, rest) for name, rest in parts]


def _seconds(duration: str) -> float:
    return float(duration.removesuffix("s"))


@pytest.fixture
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / "docker-compose.yaml").read_text())
    return loaded


def test_deploy_has_a_dockerfile_for_each_device() -> None:
    assert [path.name for path in DOCKERFILES] == ["Dockerfile.cpu", "Dockerfile.cuda"]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfile_copies_what_exists(dockerfile: Path) -> None:
    stages = {"model"}  # a named build context, given on the command line
    ignored = (DEPLOY / f"{dockerfile.name}.dockerignore").read_text().splitlines()
    for name, rest in _instructions(dockerfile):
        if name == "FROM":
            stages.add(rest.split(" AS ")[-1])
        if name == "COPY" and (stage := re.match(r"--from=(\S+)", rest)):
            assert stage[1] in stages
        elif name == "COPY":
            for source in rest.split()[:-1]:
                assert (ROOT / source.rstrip("/")).exists(), f"{dockerfile.name}: {source}"
                assert f"!{source}" in ignored, f"{source} never enters the build"


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfile_ends_without_root(dockerfile: Path) -> None:
    users: dict[str, str] = {}
    stage = ""
    for name, rest in _instructions(dockerfile):
        if name == "FROM":
            base, _, alias = rest.partition(" AS ")
            stage = alias or "last"
            users[stage] = users.get(base, "root")
        elif name == "USER":
            users[stage] = rest
    assert users["last"] == users["with-model"] == "1000"  # the chart's runAsUser


def test_compose_starts_from_files_that_exist(compose: dict[str, Any]) -> None:
    gateway = compose["services"]["gateway"]
    build = gateway["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()
    for volume in gateway["volumes"]:
        source, target, mode = volume.split(":")
        assert (DEPLOY / source).is_file()
        assert target in gateway["command"] and mode == "ro"
    for service in compose["services"].values():
        assert service["healthcheck"]["test"]
        assert set(service.get("depends_on", {})) <= set(compose["services"])


def test_compose_fits_its_configuration(compose: dict[str, Any]) -> None:
    gateway = compose["services"]["gateway"]
    config = load_config(DEPLOY / "sluice.yaml")
    (port,) = gateway["ports"]
    assert port.endswith(f":{config.gateway.port}")
    assert config.gateway.host == "0.0.0.0"
    assert config.store.url.removeprefix("env:") in gateway["environment"]
    longest_s = max(config.gateway.drain_timeout_s, config.replica.drain_timeout_s)
    assert _seconds(gateway["stop_grace_period"]) > longest_s
    command = compose["services"]["redis"]["command"]
    memory = command[command.index("--maxmemory") + 1]
    assert int(memory.removesuffix("mb")) * 2**20 > config.store.max_bytes


def _serve_arguments() -> ClusterConfig:
    loaded = yaml.safe_load((DEPLOY / "ray-serve-config.yaml").read_text())
    (application,) = loaded["applications"]
    assert application["import_path"] == "cluster.gateway.app:build"
    return parse_config(application["args"])


def test_serve_config_is_a_configuration() -> None:
    config = _serve_arguments()
    assert config.gateway.host == config.replica.host == "0.0.0.0"
    assert config.replica.autoscaling is not None


@pytest.mark.integration
def test_serve_config_is_one_that_ray_reads() -> None:
    from ray.serve.schema import ServeDeploySchema

    loaded = yaml.safe_load((DEPLOY / "ray-serve-config.yaml").read_text())
    schema = ServeDeploySchema.model_validate(loaded)
    assert set(loaded) <= set(ServeDeploySchema.model_fields)  # Ray ignores unknown keys
    assert set(loaded["applications"][0]) <= set(type(schema.applications[0]).model_fields)
    assert schema.applications[0].route_prefix is None
