"""What the chart's RayService says to KubeRay, Ray and Sluice."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from helm_engines import Engine, Objects
from helm_values import CASES

from cluster.config import ClusterConfig, parse_config


def _spec(objects: Objects) -> dict[str, Any]:
    (found,) = (item for item in objects.values() if item["kind"] == "RayService")
    spec: dict[str, Any] = found["spec"]
    return spec


def _config(objects: Objects) -> ClusterConfig:
    (application,) = yaml.safe_load(_spec(objects)["serveConfigV2"])["applications"]
    assert application["import_path"] == "cluster.gateway.app:build"
    return parse_config(application["args"])


def _group(objects: Objects, name: str) -> dict[str, Any]:
    groups = _spec(objects)["rayClusterConfig"]["workerGroupSpecs"]
    return next(group for group in groups if group["groupName"] == name)


def _container(group: dict[str, Any]) -> dict[str, Any]:
    (container,) = group["template"]["spec"]["containers"]
    assert isinstance(container, dict)
    return container


def _pool(objects: Objects) -> tuple[int, int]:
    group = _group(objects, "worker")
    assert group["replicas"] == group["minReplicas"]
    return group["minReplicas"], group["maxReplicas"]


@pytest.mark.parametrize("case", CASES)
def test_serve_config_is_a_configuration(render: Engine, case: str) -> None:
    config = _config(render(CASES[case]))
    assert config.gateway.host == config.replica.host == "0.0.0.0"
    assert config.gateway.ray_resource in json.loads(
        yaml.safe_load(_group(render(CASES[case]), "gateway")["rayStartParams"]["resources"])
    )


def test_serve_config_passes_knobs_through(render: Engine) -> None:
    config = _config(render(CASES["gpu"]))
    assert (config.parallel.tp, config.parallel.pp, config.parallel.num_gpus_per_worker) == (
        4,
        2,
        1,
    )
    assert (config.replica.num_replicas, config.replica.autoscaling) == (3, None)
    assert config.cache.memory_bytes == 42949672960  # Helm writes it as a float
    scaled = _config(render(CASES["autoscaling"])).replica.autoscaling
    assert scaled is not None
    assert (scaled.min_replicas, scaled.max_replicas, scaled.target_load) == (1, 5, 12.5)


@pytest.mark.parametrize(
    ("gpus", "tp", "pp", "replicas", "pods"),
    [(1, 1, 1, 3, 3), (8, 2, 1, 3, 1), (8, 2, 1, 5, 2), (4, 4, 2, 3, 6), (8, 4, 2, 2, 2)],
)
def test_gpu_pool_holds_all_ranks(
    render: Engine, gpus: int, tp: int, pp: int, replicas: int, pods: int
) -> None:
    values = {
        "model": {"device": "cuda"},
        "parallel": {"tp": tp, "pp": pp},
        "replicas": replicas,
        "worker": {"gpusPerPod": gpus, "cpu": 16},
    }
    objects = render(values)
    assert _pool(objects) == (pods, pods)
    assert pods * gpus >= replicas * tp * pp
    limits = _container(_group(objects, "worker"))["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == str(gpus)
    assert "nvidia.com/gpu" not in _container(_group(objects, "gateway"))["resources"]["limits"]


def test_autoscaling_scales_pods_with_groups(render: Engine) -> None:
    objects = render(CASES["autoscaling"])
    assert _pool(objects) == (1, 5)
    cluster = _spec(objects)["rayClusterConfig"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["headGroupSpec"]["template"]["spec"]["automountServiceAccountToken"] is True


def test_service_selects_only_gateway_pods(render: Engine) -> None:
    objects = render(CASES["everything"])
    selector = objects["Service/models-gateway"]["spec"]["selector"]
    budget = objects["PodDisruptionBudget/models-gateway"]["spec"]["selector"]["matchLabels"]
    gateway = _group(objects, "gateway")
    labels = {**gateway["template"]["metadata"]["labels"], "ray.io/group": "gateway"}  # KubeRay's
    assert selector.items() <= labels.items()
    assert budget == selector
    # KubeRay's head Service selects by its own app.kubernetes.io/name: the chart leaves it alone.
    assert "app.kubernetes.io/name" not in labels
    (port,) = objects["Service/models-gateway"]["spec"]["ports"]
    names = {item["name"]: item["containerPort"] for item in _container(gateway)["ports"]}
    assert names[port["targetPort"]] == _config(objects).gateway.port


def test_gateway_is_ready_by_grpc_and_others_by_ray(render: Engine) -> None:
    objects = render({})
    gateway = _container(_group(objects, "gateway"))
    assert gateway["readinessProbe"]["grpc"] == {"port": 9000}
    for container in (gateway, _container(_group(objects, "worker"))):
        # No probe that follows the model's state may restart a pod: that is Serve's work.
        for probe in ("startupProbe", "livenessProbe"):
            assert container[probe]["httpGet"] == {"path": "/api/healthz", "port": 52365}
        startup = container["startupProbe"]
        assert startup["failureThreshold"] * startup["periodSeconds"] >= 300


def test_tls_reaches_gateway_and_probe(render: Engine) -> None:
    objects = render(CASES["mutual-tls"])
    container = _container(_group(objects, "gateway"))
    assert container["readinessProbe"]["tcpSocket"] == {"port": 9000}
    mounts = {item["name"]: item["mountPath"] for item in container["volumeMounts"]}
    gateway = _config(objects).gateway
    for path in (gateway.tls_cert, gateway.tls_key, gateway.tls_client_ca):
        assert path.startswith(mounts["tls"] + "/")
    (port,) = objects["Service/chat-gateway"]["spec"]["ports"]
    assert (port["port"], port["appProtocol"]) == (443, "https")


def test_grace_outlasts_the_longest_stream(render: Engine) -> None:
    objects = render({"drain": {"timeoutSeconds": 900}})
    for name in ("gateway", "worker"):
        pod = _group(objects, name)["template"]["spec"]
        script = _container(_group(objects, name))["lifecycle"]["preStop"]["exec"]["command"][-1]
        held = int(script.split("sleep ")[1])
        assert 900 < held < pod["terminationGracePeriodSeconds"]
        assert f"--deadline-remaining-seconds {held}" in script
    config = _config(objects)
    assert config.gateway.drain_timeout_s == config.replica.drain_timeout_s == 900
    assert _spec(objects)["rayClusterDeletionDelaySeconds"] > 900


@pytest.mark.parametrize(
    ("case", "secret", "key"),
    [("redis-url", "chat-redis", "url"), ("redis-secret", "shared-redis", "redis-url")],
)
def test_redis_url_stays_in_its_secret(render: Engine, case: str, secret: str, key: str) -> None:
    objects = render(CASES[case])
    assert _config(objects).store.url == "env:SLUICE_STORE_URL"
    head = _spec(objects)["rayClusterConfig"]["headGroupSpec"]
    for group in (head, _group(objects, "gateway"), _group(objects, "worker")):
        environment = {item["name"]: item for item in _container(group)["env"]}
        reference = environment["SLUICE_STORE_URL"]["valueFrom"]["secretKeyRef"]
        assert reference == {"name": secret, "key": key}
    without = {name: item for name, item in objects.items() if item["kind"] != "Secret"}
    assert "hunter2" not in json.dumps(without)
    assert ("Secret/chat-redis" in objects) == (case == "redis-url")


def test_kv_blocks_may_have_a_redis_of_their_own(render: Engine) -> None:
    objects = render(CASES["two-redis"])
    assert _config(objects).store.kv_url == "env:SLUICE_KV_STORE_URL"
    for name in ("gateway", "worker"):
        environment = {item["name"]: item for item in _container(_group(objects, name))["env"]}
        reference = environment["SLUICE_KV_STORE_URL"]["valueFrom"]["secretKeyRef"]
        assert reference == {"name": "shared-redis", "key": "kv"}
    assert _config(render(CASES["redis-secret"])).store.kv_url == ""
    assert _config(render(CASES["bare"])).store.kv_url == "off"


def test_control_plane_keeps_its_state_in_the_redis_that_is_named(render: Engine) -> None:
    options = _spec(render(CASES["gcs-redis"]))["rayClusterConfig"]["gcsFaultToleranceOptions"]
    reference = options["redisPassword"]["valueFrom"]["secretKeyRef"]
    assert (options["redisAddress"], reference) == (
        "rediss://gcs.example:6380",
        {"name": "gcs-redis", "key": "password"},
    )
    assert "externalStorageNamespace" not in options  # an upgrade's second cluster needs another
    assert "gcsFaultToleranceOptions" not in _spec(render({}))["rayClusterConfig"]


def test_tenants_are_mounted_where_gateways_read_them_and_nowhere_else(render: Engine) -> None:
    objects = render(CASES["tenants"])
    auth = _config(objects).auth
    assert (auth.tenants_file, auth.jwt_key_file, auth.jwt_algorithm, auth.jwt_audience) == (
        "/etc/sluice/auth/tenants.yaml",
        "/etc/sluice/auth/jwt.pem",
        "RS256",
        "chat",
    )
    mounts = {m["name"]: m for m in _container(_group(objects, "gateway"))["volumeMounts"]}
    assert mounts["auth"] == {"name": "auth", "mountPath": "/etc/sluice/auth", "readOnly": True}
    volumes = _group(objects, "gateway")["template"]["spec"]["volumes"]
    assert {"name": "auth", "secret": {"secretName": "tenants"}} in volumes
    head = _spec(objects)["rayClusterConfig"]["headGroupSpec"]
    for group in (head, _group(objects, "worker")):
        assert "auth" not in {m["name"] for m in _container(group)["volumeMounts"]}
    assert "Pod/chat-test-status" not in objects, "it has no credentials"
    assert _config(render({})).auth == ClusterConfig().auth


def test_metrics_of_each_gateway_are_scraped_and_published_by_no_service(render: Engine) -> None:
    objects = render(CASES["everything"])
    port = _config(objects).gateway.metrics_port
    (name,) = (
        item["name"]
        for item in _container(_group(objects, "gateway"))["ports"]
        if item["containerPort"] == port
    )
    monitored = objects["PodMonitor/models"]["spec"]["podMetricsEndpoints"]
    assert name in {endpoint["port"] for endpoint in monitored}
    (published,) = objects["Service/models-gateway"]["spec"]["ports"]
    assert published["targetPort"] == "grpc"
    grpc_rule, metrics_rule = objects["NetworkPolicy/models-gateway"]["spec"]["ingress"]
    assert [item["port"] for item in grpc_rule["ports"]] == [_config(objects).gateway.port]
    assert [item["port"] for item in metrics_rule["ports"]] == [port]
    assert metrics_rule["from"] == CASES["everything"]["networkPolicy"]["metrics"]
    assert _config(render(CASES["bare"])).gateway.metrics_port == 0


def test_kuberay_finds_the_port_that_it_insists_on(render: Engine) -> None:
    head = _container(_spec(render({}))["rayClusterConfig"]["headGroupSpec"])
    assert "serve" in {port["name"] for port in head["ports"]}


def test_weights_are_mounted_where_they_are_read(render: Engine) -> None:
    objects = render(CASES["gpu"])
    for name in ("gateway", "worker"):
        mounts = {m["name"]: m for m in _container(_group(objects, name))["volumeMounts"]}
        assert mounts["model"]["readOnly"] is True
        assert _config(objects).model.path.startswith(mounts["model"]["mountPath"] + "/")
        volumes = _group(objects, name)["template"]["spec"]["volumes"]
        shared = next(volume for volume in volumes if volume["name"] == "shared-memory")
        assert shared["emptyDir"]["medium"] == "Memory"


def test_helm_test_asks_the_service(render: Engine) -> None:
    pod = render({"gateway": {"service": {"port": 1234}}})["Pod/chat-test-status"]
    (container,) = pod["spec"]["containers"]
    assert container["command"] == ["sluice", "status", "--json"]
    assert {"name": "SLUICE_ADDRESS", "value": "chat-gateway.default.svc:1234"} in container["env"]


def test_helm_test_trusts_the_issuer_and_sees_no_key(render: Engine) -> None:
    pod = render(CASES["tls"])["Pod/chat-test-status"]
    assert "--ca-file=/etc/sluice/tls/ca.crt" in pod["spec"]["containers"][0]["command"]
    (volume,) = pod["spec"]["volumes"]
    assert volume["secret"]["items"] == [{"key": "ca.crt", "path": "ca.crt"}]
    assert "Pod/chat-test-status" not in render(CASES["mutual-tls"])
