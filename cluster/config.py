"""Every knob, in one tree of frozen models: read from one YAML file, changed with `--set a.b=c`.

Unknown keys are errors. Each field states its unit, range and default; `sluice config` prints it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from cluster.errors import ConfigError

DEMO_MODEL_PATH = Path(__file__).parent / "model" / "demo"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(_Section):
    """Which model, and in what precision."""

    path: str = Field(
        "demo", description="folder in transformers' format; 'demo' is the shipped one"
    )
    name: str = Field("", description="what clients call it; empty: the folder's name")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of weights and KV cache; auto: the checkpoint's"
    )
    max_model_len: int = Field(
        0, ge=0, description="tokens, prompt + answer; 0: the model's own limit"
    )
    device: Literal["cpu", "cuda"] = Field("cpu", description="where workers compute")
    quantization: Literal["none", "int8", "int4", "fp8"] = Field(
        "none",
        description="of the linears at load: int8 (weights per channel, activations per token), "
        "int4 (weights in groups), fp8 (GPU); a quantized checkpoint brings its own",
    )
    quantization_group_size: Literal[32, 64, 128] = Field(
        128, description="weights of a row that share one scale, int4"
    )

    @property
    def folder(self) -> Path:
        """Folder of the checkpoint."""
        return DEMO_MODEL_PATH if self.path == "demo" else Path(self.path)

    @property
    def served_name(self) -> str:
        """Name that clients ask for."""
        return self.name or ("sluice-demo" if self.path == "demo" else self.folder.name)


class CacheConfig(_Section):
    """The paged KV cache of one replica."""

    block_size: int = Field(16, ge=1, le=512, description="tokens per block")
    num_blocks: int = Field(0, ge=0, description="blocks per replica; 0: from memory_bytes")
    memory_bytes: int = Field(
        256 * 2**20, ge=2**20, description="KV cache of one worker, bytes, where num_blocks is 0"
    )
    prefix_caching: bool = Field(True, description="reuse blocks of prompts seen before")
    dtype: Literal["auto", "int8"] = Field(
        "auto",
        description="of keys and values; int8 has a scale per token and head: half the bytes",
    )
    host_memory_bytes: int = Field(
        128 * 2**20,
        ge=0,
        description="host tier of one worker, bytes: blocks that left the KV cache, and those on "
        "their way to and from the store; 0: neither host tier nor blocks in the store",
    )


class LatencyConfig(_Section):
    """The objective of one service class."""

    ttft_s: float = Field(0.0, ge=0, description="seconds to the first token; 0: no objective")
    tpot_s: float = Field(0.0, ge=0, description="seconds per further token; 0: no objective")
    weight: float = Field(
        1.0,
        ge=1e-6,
        le=1e6,
        description="share of the class, relative to the others', of the tokens that are computed "
        "while all of them have more than they get",
    )
    on_miss: Literal["refuse", "degrade", "queue"] = Field(
        "queue",
        description="what becomes of a request whose objective cannot be met: refuse it with a "
        "time to try again, degrade it to no objective, or queue it and try all the same",
    )


class EngineConfig(_Section):
    """Continuous batching in one replica."""

    max_num_seqs: int = Field(64, ge=1, le=4096, description="sequences in one step")
    max_num_batched_tokens: int = Field(
        512, ge=1, description="token budget of one step; longer prompts are computed in chunks"
    )
    max_num_waiting: int = Field(1024, ge=1, description="requests that may wait in a replica")
    step_timeout_s: float = Field(
        120.0, gt=0, description="a step that takes longer ends the group"
    )
    tpot_reserve: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of the tightest TPOT objective that a step leaves free for what is not "
        "foreseen",
    )
    min_prefill_tokens: int = Field(
        16,
        ge=1,
        description="prompt tokens that a step may take however tight the objectives are, so that "
        "prompts do not starve",
    )
    order: Literal["slack", "fcfs"] = Field(
        "slack",
        description="of prompts: slack computes first what is due first and can still be met, "
        "within fair shares; fcfs is the order of arrival, for comparison",
    )
    fair_burst_tokens: int = Field(
        8192,
        ge=1,
        description="tokens, by weight, that a class or tenant may get before one that got less "
        "and waits too; small: fair in the short run, large: more objectives met",
    )
    late_weight: float = Field(
        0.1,
        ge=1e-6,
        description="share, relative to the weights of the classes, of prompts that cannot meet "
        "their objective any more: they do not stop, and stop nobody",
    )
    interactive: LatencyConfig = Field(
        LatencyConfig(ttft_s=1.0, tpot_s=0.1, weight=8.0, on_miss="refuse"),
        description="objective of the class, and of requests with one of their own",
    )
    standard: LatencyConfig = Field(
        LatencyConfig(ttft_s=5.0, tpot_s=0.25, weight=4.0), description="objective of the class"
    )
    batch: LatencyConfig = Field(LatencyConfig(), description="objective of the class")


class ParallelConfig(_Section):
    """How one copy of the model is split."""

    tp: int = Field(1, ge=1, le=64, description="tensor-parallel ranks per stage")
    pp: int = Field(1, ge=1, le=64, description="pipeline stages")
    threads_per_worker: int = Field(0, ge=0, description="torch threads; 0: cores / workers, >= 1")
    num_cpus_per_worker: float = Field(1.0, ge=0, description="logical CPUs reserved with Ray")
    num_gpus_per_worker: float = Field(0.0, ge=0, description="GPUs reserved with Ray")

    @property
    def world_size(self) -> int:
        """Workers of one replica group."""
        return self.tp * self.pp


class AutoscalingConfig(_Section):
    """How many replica groups; `min_replicas == max_replicas` is a fixed number."""

    min_replicas: int = Field(1, ge=1, description="groups at the least")
    max_replicas: int = Field(1, ge=1, description="groups at the most")
    target_load: float = Field(
        8.0, gt=0, description="running + waiting requests that one group should have"
    )
    upscale_delay_s: float = Field(5.0, ge=0, description="overload must last this long")
    downscale_delay_s: float = Field(30.0, ge=0, description="idleness must last this long")
    metrics_interval_s: float = Field(2.0, gt=0, description="between two looks at the load")

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> AutoscalingConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas={self.min_replicas} is above max_replicas={self.max_replicas}: "
                "raise the one or lower the other"
            )
        return self


class ReplicaConfig(_Section):
    """Life of a replica group under Ray Serve."""

    num_replicas: int = Field(1, ge=1, description="groups, where autoscaling is not set")
    autoscaling: AutoscalingConfig | None = Field(None, description="set to scale with load")
    host: str = Field("127.0.0.1", description="address that leaders listen on and publish")
    lease_ttl_s: float = Field(
        5.0, gt=0.5, description="a leader that is silent this long is forgotten"
    )
    load_interval_s: float = Field(0.1, gt=0, description="between two pushed load reports")
    heartbeat_timeout_s: float = Field(
        1.5,
        gt=0.2,
        description="a process of a group that is silent this long, though it has a processor, "
        "ends the group; a leader that is silent this long loses its requests to other replicas",
    )
    stuck_timeout_s: float = Field(
        4.0,
        gt=0.2,
        description="a step that uses no processor for this long, though its processes answer, "
        "ends the group",
    )
    start_timeout_s: float = Field(300.0, gt=0, description="to load the model and join the group")
    drain_timeout_s: float = Field(
        30.0, ge=0, description="running streams may finish in this time"
    )
    warm_up_timeout_s: float = Field(
        5.0,
        ge=0,
        description="a new group loads the hottest blocks of the store for so long before it "
        "takes requests; 0: not at all",
    )


class GatewayConfig(_Section):
    """The public gRPC service."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(9000, ge=0, le=65535, description="0 takes a free one (one gateway only)")
    num_replicas: int = Field(1, ge=1, description="gateway processes; they share the port")
    tls_cert: str = Field("", description="PEM file; empty serves plain text")
    tls_key: str = Field("", description="PEM file of the certificate's key")
    tls_client_ca: str = Field("", description="PEM file; set to demand client certificates")
    max_message_bytes: int = Field(4 * 2**20, ge=1024, description="one request or event")
    keepalive_s: float = Field(30.0, gt=0, description="ping an idle connection this often")
    heartbeat_timeout_s: float = Field(
        3.0,
        gt=0.2,
        description="a gateway that stands still this long, though it has a processor, is ended: "
        "its clients go on at another one",
    )
    stuck_timeout_s: float = Field(
        10.0,
        gt=1.0,
        description="a gateway whose event loop stands still this long, though its threads run, "
        "ends",
    )
    max_inflight_requests: int = Field(1024, ge=1, description="queued and running, per gateway")
    max_queued_requests: int = Field(512, ge=0, description="waiting for a replica, per gateway")
    max_queued_tokens: int = Field(
        2**22, ge=1, description="prompt tokens waiting for a replica, per gateway"
    )
    rate_limit_on_error: Literal["open", "closed"] = Field(
        "open",
        description="whether requests of tenants with limits pass (open) or are refused (closed) "
        "while the store, which counts them, does not answer",
    )
    queue_timeout_s: float = Field(
        30.0, gt=0, description="a request without a replica waits this long"
    )
    max_attempts: int = Field(
        8, ge=1, description="replicas that a request is given to, one after the other, at the most"
    )
    max_detach_s: float = Field(
        600.0, ge=0, description="a request may go on for so long while nobody listens"
    )
    journal_interval_s: float = Field(
        0.1, gt=0, description="between two writes of what live requests have become, seconds"
    )
    default_max_tokens: int = Field(128, ge=1, description="where a request names none")
    max_stop_strings: int = Field(16, ge=0, description="per request")
    max_stop_string_bytes: int = Field(256, ge=1, description="of each, UTF-8")
    max_logprobs: int = Field(20, ge=0, description="likeliest tokens reported per position")
    drain_timeout_s: float = Field(30.0, ge=0, description="streams may finish in this time")
    metrics_port: int = Field(
        0, ge=0, le=65535, description="Prometheus metrics over HTTP on this port; 0: none"
    )
    max_prefixes: int = Field(256, ge=0, description="registered prefixes, of all tenants together")
    max_prefix_tokens: int = Field(32768, ge=1, description="of one registered prefix")
    max_prefix_tokens_total: int = Field(
        262144,
        ge=1,
        description="of all registered prefixes together: gateways read them in one reply of the "
        "store; one tenant may have half, as of max_prefixes",
    )
    ray_resource: str = Field(
        "", description="gateways run on Ray nodes that have this custom resource; empty: anywhere"
    )

    @model_validator(mode="after")
    def _tls_is_complete(self) -> GatewayConfig:
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("tls_cert and tls_key go together: set both or neither")
        return self


class AuthConfig(_Section):
    """Who may call. Without a tenants file anybody may, and all are one tenant."""

    tenants_file: str = Field(
        "", description="YAML file of tenants, their keys and groups; empty: no authentication"
    )
    jwt_key_file: str = Field(
        "", description="PEM public key or shared secret that bearer tokens are signed with"
    )
    jwt_algorithm: Literal["RS256", "ES256", "EdDSA", "HS256"] = Field(
        "RS256", description="the only one accepted"
    )
    jwt_audience: str = Field("", description="that a token must name; empty: none is asked for")
    jwt_tenant_claim: str = Field("sub", description="claim that names the tenant")


class RouterConfig(_Section):
    """The global scheduler of every gateway."""

    policy: Literal[
        "slo",
        "prefix",
        "prefix_approx",
        "least_tokens",
        "least_requests",
        "power_of_two",
        "round_robin",
        "session_hash",
        "random",
    ] = Field(
        "slo",
        description="slo: predicted latency, cached prefix, hot spots; the others for comparison",
    )
    admission: Literal["on", "off"] = Field(
        "on",
        description="on: a request whose objective cannot be met is treated as its class's on_miss "
        "says; off: everything is admitted",
    )
    miss_probability: float = Field(
        0.01,
        gt=0,
        lt=1,
        description="of the admitted requests so many may miss their objective: more, and the "
        "quantile of predictions that decides rises up to the ninetieth; fewer, and it falls down "
        "to the median",
    )
    hot_window_s: float = Field(
        20.0, gt=0, description="uses of a prefix in this time say how hot it is"
    )
    max_index_bytes: int = Field(
        256 * 2**20, ge=2**16, description="of the prefix index; blocks beyond are not indexed"
    )
    max_decisions: int = Field(1024, ge=1, description="newest decisions kept for `sluice explain`")

    @field_validator("admission", mode="before")
    @classmethod
    def _admission_is_a_word(cls, value: object) -> object:
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value  # YAML's


class StoreConfig(_Section):
    """What replicas share."""

    url: str = Field(
        "embedded",
        description="'embedded', redis://, rediss://, unix://, or env:NAME to read it from there",
    )
    namespace: str = Field(
        "sluice", pattern=r"^[a-zA-Z0-9_.-]{1,64}$", description="prefix of keys"
    )
    kv_url: str = Field(
        "",
        description="of KV blocks, where they have a store of their own, in the forms of url; "
        "empty: the same store; 'off': no blocks are stored",
    )
    timeout_s: float = Field(0.5, gt=0, description="deadline of one call")
    max_inflight_calls: int = Field(
        64, ge=1, description="calls of one process on their way; more fail at once"
    )
    max_bytes: int = Field(512 * 2**20, ge=2**20, description="budget for KV blocks, bytes")
    journal_ttl_s: float = Field(
        600.0, gt=0, description="journals of requests are kept this long after the last write"
    )
    journal_bytes: int = Field(
        64 * 2**20,
        ge=2**16,
        description="budget for journals, bytes; the oldest finished ones make room first",
    )
    kv_ttl_s: float = Field(3600.0, gt=0, description="KV blocks are kept this long after a use")
    kv_write_after_uses: int = Field(
        2,
        ge=1,
        description="a block is written at its so manieth use, so that unique prompts are not; "
        "blocks of registered prefixes always are",
    )
    kv_chunk_bytes: int = Field(
        4 * 2**20, ge=2**16, description="of blocks that travel in one call, bytes"
    )
    kv_inflight_bytes: int = Field(
        64 * 2**20,
        ge=2**20,
        description="of blocks of one worker on their way to the store, bytes; more are dropped",
    )

    @field_validator("kv_url", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: object) -> object:
        return "off" if value is False else value  # as YAML reads it

    @property
    def resolved_url(self) -> str:
        """The URL itself, which may hold a password: never to be logged.

        Raises:
            ConfigError: The environment variable that `url` names is not set.
        """
        return _resolve(self.url, "store.url")

    @property
    def resolved_kv_url(self) -> str:
        """Where KV blocks go, 'off' if nowhere; it may hold a password: never to be logged.

        Raises:
            ConfigError: The environment variable that `kv_url` names is not set.
        """
        return _resolve(self.kv_url, "store.kv_url") if self.kv_url else self.resolved_url


def _resolve(url: str, field: str) -> str:
    if not url.startswith("env:"):
        return url
    name = url.removeprefix("env:")
    if not os.environ.get(name):
        raise ConfigError(f"{field}={url}: the environment variable {name} is not set", field=field)
    return os.environ[name]


class ClusterConfig(_Section):
    """The whole configuration."""

    model: ModelConfig = ModelConfig()
    cache: CacheConfig = CacheConfig()
    engine: EngineConfig = EngineConfig()
    parallel: ParallelConfig = ParallelConfig()
    replica: ReplicaConfig = ReplicaConfig()
    gateway: GatewayConfig = GatewayConfig()
    auth: AuthConfig = AuthConfig()
    router: RouterConfig = RouterConfig()
    store: StoreConfig = StoreConfig()

    @property
    def writes_blocks(self) -> bool:
        """Whether replicas write blocks to a store, if there is one: they do from host memory."""
        return self.cache.prefix_caching and self.cache.host_memory_bytes > 0


def load_config(path: Path | None = None, overrides: list[str] | None = None) -> ClusterConfig:
    """Return the configuration of a YAML file with overrides applied.

    Args:
        path: The file; None starts from the defaults.
        overrides: Items ``a.b=value``; the value is read as YAML.

    Raises:
        ConfigError: The file or a value cannot be used; `field` names the first offending key.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = yaml.safe_load(path.read_text()) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"configuration file {path}: {error}", field=str(path)) from error
        if not isinstance(tree, dict):
            raise ConfigError(f"configuration file {path}: expected keys and values at the top")
    for item in overrides or []:
        _apply_override(tree, item)
    return parse_config(tree)


def parse_config(tree: dict[str, Any]) -> ClusterConfig:
    """Return the configuration held in plain data, as Serve passes application arguments.

    Raises:
        ConfigError: A key is unknown or a value outside of its range.
    """
    try:
        return ClusterConfig.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"{field}: unknown key; {_known_keys(field)}", field=field) from error
        got = f"{first['input']!r}"[:80]
        raise ConfigError(f"{field}={got}: {first['msg']}", field=field) from error


def _apply_override(tree: dict[str, Any], item: str) -> None:
    key, separator, text = item.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {item}: expected a.b=value", field=key)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {item}: {error}", field=key) from error
    *parents, leaf = key.split(".")
    node = tree
    for name in parents:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {item}: {name} is a value, not a section", field=key)
    node[leaf] = value


def _known_keys(field: str) -> str:
    model: type[BaseModel] = ClusterConfig
    for name in field.split(".")[:-1]:
        info = model.model_fields.get(name)
        if info is None or not isinstance(info.annotation, type):
            return "see `sluice config`"
        model = info.annotation
    return f"known here: {', '.join(model.model_fields)}"
