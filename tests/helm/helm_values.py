"""Values files that cover the chart's branches."""

from __future__ import annotations

from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "gpu": {
        "model": {"device": "cuda", "path": "/models/llama-70b", "pvc": {"claimName": "weights"}},
        "parallel": {"tp": 4, "pp": 2},
        "replicas": 3,
        "worker": {
            "gpusPerPod": 4,
            "cpu": 8,
            "memory": "512Gi",
            "sharedMemory": "64Gi",
            "nodeSelector": {"gpu": "h100"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        },
        "config": {"cache": {"memory_bytes": 42949672960}, "engine": {"max_num_seqs": 256}},
    },
    "redis-url": {"redis": {"url": "rediss://:hunter2@redis.example:6380/0"}},
    "redis-secret": {"redis": {"existingSecret": "shared-redis", "key": "redis-url"}},
    "two-redis": {"redis": {"existingSecret": "shared-redis", "kvKey": "kv"}},
    "gcs-redis": {
        "ray": {"gcs": {"redisAddress": "rediss://gcs.example:6380", "passwordSecret": "gcs-redis"}}
    },
    "tenants": {"auth": {"existingSecret": "tenants", "jwtKey": "jwt.pem", "jwtAudience": "chat"}},
    "autoscaling": {
        "autoscaling": {"enabled": True, "minReplicas": 1, "maxReplicas": 5, "targetLoad": 12.5},
        "parallel": {"tp": 2},
        "worker": {"cpu": 3},
    },
    "tls": {"gateway": {"tls": {"existingSecret": "gateway-tls"}}},
    "mutual-tls": {
        "gateway": {
            "tls": {"existingSecret": "gateway-tls", "clientCa": True},
            "service": {"type": "LoadBalancer", "port": 443, "annotations": {"a/b": "c"}},
        }
    },
    "everything": {
        "fullnameOverride": "models",
        "image": {"tag": "nightly", "pullSecrets": ["registry"]},
        "gateway": {
            "replicas": 3,
            "service": {"headless": True},
            "podAnnotations": {"a": "b"},
            "affinity": {
                "podAntiAffinity": {
                    "requiredDuringSchedulingIgnoredDuringExecution": [
                        {
                            "labelSelector": {"matchLabels": {"ray.io/group": "gateway"}},
                            "topologyKey": "kubernetes.io/hostname",
                        }
                    ]
                }
            },
        },
        "networkPolicy": {
            "enabled": True,
            "clients": [{"podSelector": {"matchLabels": {"app": "chat-ui"}}}],
            "metrics": [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}],
        },
        "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "serviceAccount": {"annotations": {"cloud/role": "reader"}},
    },
    "bare": {
        "serviceAccount": {"create": False},
        "podDisruptionBudget": {"enabled": False},
        "ray": {"auth": "disabled", "upgrade": "None"},
        "gateway": {"metricsPort": 0},
        "config": {"store": {"kv_url": "off"}},
    },
}
