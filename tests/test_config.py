"""The configuration tree: files, overrides, and errors that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from cluster.config import ClusterConfig, load_config, parse_config
from cluster.errors import ConfigError


def test_file_and_overrides_are_merged(tmp_path: Path) -> None:
    file = tmp_path / "sluice.yaml"
    file.write_text("parallel: {tp: 2}\ngateway: {port: 1234, host: 0.0.0.0}\n")
    config = load_config(file, ["gateway.port=4321", "replica.autoscaling={max_replicas: 3}"])
    assert (config.parallel.tp, config.gateway.port, config.gateway.host) == (2, 4321, "0.0.0.0")
    assert config.replica.autoscaling is not None and config.replica.autoscaling.max_replicas == 3


def test_configuration_survives_plain_data() -> None:
    config = load_config(None, ["model.dtype=float32", "replica.autoscaling={}"])
    assert parse_config(config.model_dump()) == config


@pytest.mark.parametrize(
    ("override", "field", "words"),
    [
        ("gateway.prt=1", "gateway.prt", "known here: host, port"),
        ("nothing.at=1", "nothing", "known here: model"),
        ("gateway.port=-1", "gateway.port", "greater than or equal to 0"),
        ("gateway.port=70000", "gateway.port", "70000"),
        ("engine.step_timeout_s=.nan", "engine.step_timeout_s", "finite"),
        ("model.dtype=int3", "model.dtype", "int3"),
        ("gateway.port", "gateway.port", "expected a.b=value"),
        ("gateway.port.number=1", "gateway.port", "valid integer"),
        ("gateway.tls_cert=/cert.pem", "gateway", "set both or neither"),
        ("replica.autoscaling={min_replicas: 5, max_replicas: 2}", "replica.autoscaling", "above"),
    ],
)
def test_mistake_is_named(override: str, field: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    assert caught.value.field == field
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["- a list", "a: [", "\x00"])
def test_file_that_is_no_configuration_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "sluice.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"sluice\.yaml"):
        load_config(file)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")


def test_store_url_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE", "redis://elsewhere:6379/0")
    assert load_config(None, ["store.url=env:STORE"]).store.resolved_url.startswith("redis://e")
    monkeypatch.delenv("STORE")
    with pytest.raises(ConfigError, match="STORE is not set"):
        _ = load_config(None, ["store.url=env:STORE"]).store.resolved_url


def test_every_knob_says_what_it_is() -> None:
    def knobs(model: type[BaseModel]) -> None:
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                knobs(field.annotation)
            else:
                assert field.description, f"{model.__name__}.{name}"

    knobs(ClusterConfig)


def test_store_of_blocks_is_switched_off_as_yaml_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "sluice.yaml"
    path.write_text("store: {kv_url: off}\n")
    assert load_config(path).store.resolved_kv_url == "off"
    assert load_config(None, ["store.kv_url=off"]).store.resolved_kv_url == "off"
    assert load_config(None, []).store.resolved_kv_url == "embedded"
