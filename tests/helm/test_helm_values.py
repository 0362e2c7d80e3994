"""Values that cannot work are refused when the chart is rendered, by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from helm_engines import CHART, Engine, RenderError

from cluster.config import AuthConfig, ClusterConfig, ModelConfig

# Knobs that the chart derives from its own values: nobody sets them twice.
OWN_KNOBS = {
    "model": set(ModelConfig.model_fields),
    "parallel": {"tp", "pp", "num_cpus_per_worker", "num_gpus_per_worker"},
    "replica": {"num_replicas", "autoscaling", "host", "start_timeout_s", "drain_timeout_s"},
    "gateway": {
        "host", "port", "num_replicas", "tls_cert", "tls_key", "tls_client_ca", "drain_timeout_s",
        "ray_resource", "metrics_port",
    },
    "auth": set(AuthConfig.model_fields),
    "store": {"url"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"replica": 2}, "replica"),
        ({"gateway": {"prot": 9000}}, "prot"),
        ({"replicas": -1}, "replicas"),
        ({"replicas": "two"}, "replicas"),
        ({"gateway": {"port": 70000}}, "port"),
        ({"gateway": {"service": {"port": 0}}}, "port"),
        ({"model": {"device": "tpu"}}, "device"),
        ({"worker": {"memory": "8GB"}}, "memory"),
        ({"redis": {"url": "http://redis"}}, "url"),
        ({"ray": {"gcs": {"redisAddress": "redis://:secret@host:6379"}}}, "redisAddress"),
        ({"fullnameOverride": "Upper"}, "fullnameOverride"),
        ({"config": {"cache": {"block_sise": 16}}}, "block_sise"),
        ({"config": {"cache": {"block_size": 0}}}, "block_size"),
        ({"config": {"store": {"url": "redis://:secret@host"}}}, "url"),
        ({"config": {"store": {"kv_url": "redis://:secret@host"}}}, "kv_url"),
        ({"config": {"auth": {"tenants_file": "/x"}}}, "auth"),
        ({"auth": {"jwtAlgorithm": "none"}}, "jwtAlgorithm"),
        ({"gateway": {"metricsPort": 70000}}, "metricsPort"),
    ],
)
def test_schema_refuses(render: Engine, values: dict[str, Any], said: str) -> None:
    with pytest.raises(RenderError, match=r"(?s)schema.*" + said):
        render(values)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"autoscaling": {"enabled": True, "minReplicas": 5, "maxReplicas": 2}},
            "autoscaling.minReplicas=5, autoscaling.maxReplicas=2",
        ),
        ({"model": {"device": "cuda"}}, "worker.gpusPerPod=0 with model.device=cuda"),
        ({"worker": {"gpusPerPod": 1}}, "worker.gpusPerPod=1 with model.device=cpu"),
        (
            {
                "model": {"device": "cuda"},
                "parallel": {"tp": 4},
                "worker": {"gpusPerPod": 6, "cpu": 9},
            },
            "worker.gpusPerPod=6, parallel.tp x parallel.pp = 4",
        ),
        (
            {
                "model": {"device": "cuda"},
                "parallel": {"tp": 4},
                "worker": {"gpusPerPod": 2, "cpu": 9},
            },
            "multiple of tp=4",
        ),
        ({"parallel": {"tp": 2, "pp": 2}}, "worker.cpu=2, needed 5"),
        ({"worker": {"sharedMemory": "9Gi"}}, "worker.sharedMemory=9Gi, worker.memory=8Gi"),
        (
            {"head": {"sharedMemory": "128Mi"}},
            "head.sharedMemory=128Mi, ray.objectStoreMemory=256Mi",
        ),
        (
            {"redis": {"url": "redis://a", "existingSecret": "b"}},
            "redis.url and redis.existingSecret are both set",
        ),
        ({"redis": {"kvKey": "kv"}}, "redis.kvKey=kv without redis.existingSecret"),
        (
            {
                "redis": {"existingSecret": "b", "kvKey": "kv"},
                "config": {"store": {"kv_url": "off"}},
            },
            "redis.kvKey and config.store.kv_url are both set",
        ),
        (
            {"ray": {"gcs": {"passwordSecret": "b"}}},
            "ray.gcs.passwordSecret=b without ray.gcs.redisAddress",
        ),
        ({"auth": {"jwtKey": "jwt.pem"}}, "auth.jwtKey=jwt.pem without auth.existingSecret"),
        ({"gateway": {"metricsPort": 9000}}, "gateway.metricsPort=9000 is gateway.port too"),
        (
            {"model": {"path": "/modelsx/a", "pvc": {"claimName": "weights"}}},
            "model.path=/modelsx/a is outside of model.pvc.mountPath=/models",
        ),
        ({"gateway": {"tls": {"clientCa": True}}}, "gateway.tls.clientCa=true without"),
        (
            {"gateway": {"service": {"headless": True, "type": "NodePort"}}},
            "gateway.service.headless=true with gateway.service.type=NodePort",
        ),
    ],
)
def test_checks_refuse(render: Engine, values: dict[str, Any], said: str) -> None:
    with pytest.raises(RenderError) as refused:
        render(values)
    assert said in str(refused.value)


def test_schema_knows_every_knob_of_the_configuration() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    sections = schema["properties"]["config"]["properties"]
    for name, field in ClusterConfig.model_fields.items():
        knobs = set(type(field.default).model_fields) - OWN_KNOBS.get(name, set())
        offered = set(sections.get(name, {}).get("properties", {}))
        assert offered == knobs, f"values.schema.json, config.{name}: add or drop {offered ^ knobs}"
    assert set(sections) <= set(ClusterConfig.model_fields)


def test_schema_closes_every_object_and_is_shipped() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    open_by_nature = {"affinity", "tolerations", "clients", "metrics", "global"}

    def walk(node: dict[str, Any], path: str) -> None:
        for name, child in node.get("properties", {}).items():
            if child.get("type") == "object" and name not in open_by_nature:
                assert "additionalProperties" in child, f"{path}.{name} takes unknown keys"
            walk(child, f"{path}.{name}")

    assert schema["additionalProperties"] is False
    walk(schema, "values")
    assert "schema" not in (CHART / ".helmignore").read_text()


def test_values_all_have_a_comment() -> None:
    lines = (CHART / "values.yaml").read_text().splitlines()
    assert yaml.safe_load("\n".join(lines))
    for number, line in enumerate(lines):
        key, separator, value = line.partition(":")
        if (
            line.lstrip().startswith("#")
            or not separator
            or key.strip().startswith("kubernetes.io")
        ):
            continue
        is_leaf = bool(value.strip())
        assert not is_leaf or lines[number - 1].lstrip().startswith("#"), f"no comment: {line}"
