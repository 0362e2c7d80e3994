"""Who a caller is: by key, by certificate, by token; and never by what the call says."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from tenant_files import KEYS, auth_config, bearer, make_key, sha256, sign, write_tenants

from cluster.clock import VirtualClock
from cluster.config import AuthConfig
from cluster.errors import ConfigError, UnauthenticatedError
from cluster.gateway.identity import Authenticator, Caller
from cluster.gateway.rate_limit import NO_LIMITS, RateLimits

PLAIN: dict[str, Any] = {}


def _certified(*names: str, common_name: str = "agent") -> dict[str, Any]:
    return {
        "transport_security_type": [b"ssl"],
        "x509_common_name": [common_name.encode()],
        "x509_subject_alternative_name": [name.encode() for name in names],
    }


def test_without_a_tenants_file_everybody_is_one_caller() -> None:
    authenticator = Authenticator(AuthConfig())
    assert authenticator.authenticate([], PLAIN) == Caller("", b"", True)
    assert authenticator.authenticate(bearer("x"), _certified("alice.example")) == Caller()


def test_key_gives_its_tenant_and_nobody_else(tmp_path: Path) -> None:
    authenticator = Authenticator(auth_config(tmp_path))
    callers = {name: authenticator.authenticate(bearer(KEYS[name]), PLAIN) for name in KEYS}
    assert [caller.tenant for caller in callers.values()] == [*KEYS]
    assert [caller.is_admin for caller in callers.values()] == [False, False, False, True]
    assert all(len(caller.salt) == 16 for caller in callers.values())


@pytest.mark.parametrize(
    "value",
    [
        f"Basic {KEYS['alice']}",
        "Bearer",
        "Bearer  ",
        "",
        KEYS["alice"],
        b"Bearer x",
        "Bearer wrong",
    ],
)
def test_wrong_credentials_are_refused_beside_right_ones_too(
    tmp_path: Path, value: str | bytes
) -> None:
    authenticator = Authenticator(auth_config(tmp_path))
    for metadata in ([("authorization", value)], [*bearer(KEYS["bob"]), ("authorization", value)]):
        with pytest.raises(UnauthenticatedError):
            authenticator.authenticate(metadata, PLAIN)
    with pytest.raises(UnauthenticatedError):
        authenticator.authenticate([("authorization", value)], _certified("bob.example"))


def test_hash_of_a_key_is_not_the_key(tmp_path: Path) -> None:
    authenticator = Authenticator(auth_config(tmp_path))
    with pytest.raises(UnauthenticatedError):
        authenticator.authenticate(bearer(sha256(KEYS["alice"])), PLAIN)


def test_client_cannot_name_its_tenant(tmp_path: Path) -> None:
    authenticator = Authenticator(auth_config(tmp_path))
    asked = [(key, "alice") for key in ("tenant", "x-tenant", "sluice-tenant", "salt", "user")]
    with pytest.raises(UnauthenticatedError, match="no credentials"):
        authenticator.authenticate(asked, PLAIN)
    assert authenticator.authenticate([*asked, *bearer(KEYS["carol"])], PLAIN).tenant == "carol"


def test_certificate_gives_its_tenant(tmp_path: Path) -> None:
    authenticator = Authenticator(auth_config(tmp_path))
    by_key = authenticator.authenticate(bearer(KEYS["carol"]), PLAIN)
    assert authenticator.authenticate([], _certified("a", "carol.example")) == by_key
    assert authenticator.authenticate([], _certified(common_name="carol.example")) == by_key
    assert authenticator.authenticate(bearer(KEYS["carol"]), _certified("other")) == by_key
    with pytest.raises(UnauthenticatedError, match="no credentials"):
        authenticator.authenticate([], _certified("mallory.example"))


def test_credentials_of_different_tenants_are_refused(tmp_path: Path) -> None:
    authenticator = Authenticator(auth_config(tmp_path))
    for metadata, context in (
        (bearer(KEYS["alice"]), _certified("carol.example")),
        (bearer(KEYS["alice"]) + bearer(KEYS["bob"]), PLAIN),  # one group, and still two tenants
        ([], _certified("alice.example", common_name="bob.example")),
    ):
        with pytest.raises(UnauthenticatedError, match="different tenants"):
            authenticator.authenticate(metadata, context)
    both = authenticator.authenticate(bearer(KEYS["alice"]) * 2, _certified("alice.example"))
    assert both.tenant == "alice"


def test_salt_is_shared_in_a_group_and_by_nobody_else(tmp_path: Path) -> None:
    entries = [
        {"name": "a", "key_sha256": [sha256("a")], "group": "g"},
        {"name": "b", "key_sha256": [sha256("b")], "group": "g"},
        {"name": "g", "key_sha256": [sha256("g")]},  # called like the group, not in it
        {"name": "c", "key_sha256": [sha256("c")], "group": "h"},
        {"name": "d", "key_sha256": [sha256("d")]},
        {"name": "d2", "key_sha256": [sha256("d2")]},
    ]
    config = AuthConfig(tenants_file=str(write_tenants(tmp_path, entries)))
    salts = {
        name: Authenticator(config).authenticate(bearer(name), PLAIN).salt
        for name in ("a", "b", "g", "c", "d", "d2")
    }
    assert salts["a"] == salts["b"]
    assert len(set(salts.values())) == 5
    assert b"" not in salts.values()
    # Replicas and gateways outlive one another: the salt of a name is the same in all of them.
    assert salts["d"].hex() == "8123cf1d8774e50d24782ebeb051961b"


def test_caller_has_the_weight_and_the_limits_of_its_tenant(tmp_path: Path) -> None:
    entries = [
        {"name": "plain", "key_sha256": [sha256("plain")]},
        {
            "name": "paying",
            "key_sha256": [sha256("paying")],
            "weight": 4,
            "requests_per_minute": 600,
            "tokens_per_minute": 10**6,
            "max_streams": 50,
        },
    ]
    config = AuthConfig(tenants_file=str(write_tenants(tmp_path, entries)))
    authenticator = Authenticator(config)
    plain, paying = (authenticator.authenticate(bearer(n), PLAIN) for n in ("plain", "paying"))
    assert (
        (plain.weight, plain.limits) == (Caller().weight, NO_LIMITS) == (1.0, RateLimits(0, 0, 0))
    )
    assert (paying.weight, paying.limits) == (4.0, RateLimits(600, 10**6, 50))


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA", "HS256"])
def test_token_gives_its_tenant_by_every_algorithm(tmp_path: Path, algorithm: str) -> None:
    key, public = make_key(algorithm)
    (tmp_path / "key").write_bytes(public)
    config = auth_config(
        tmp_path, jwt_key_file=str(tmp_path / "key"), jwt_algorithm=algorithm, jwt_tenant_claim="t"
    )
    authenticator = Authenticator(config)
    by_key = authenticator.authenticate(bearer(KEYS["bob"]), PLAIN)
    token = sign(key, algorithm, t="bob", sub="alice", aud="whatever")
    assert authenticator.authenticate(bearer(token), PLAIN) == by_key
    with pytest.raises(UnauthenticatedError, match="different tenants"):
        authenticator.authenticate(bearer(token) + bearer(KEYS["alice"]), PLAIN)
    for tenant in (["bob"], {"bob": 1}, 7, None, "", "BOB"):
        with pytest.raises(UnauthenticatedError, match="none that is known"):
            authenticator.authenticate(bearer(sign(key, algorithm, t=tenant)), PLAIN)
    if algorithm in ("RS256", "HS256"):
        sibling = sign(key, algorithm.replace("256", "512"), t="bob")
        with pytest.raises(UnauthenticatedError, match="none that is known"):
            authenticator.authenticate(bearer(sibling), PLAIN)
    other, _ = make_key("RS256" if algorithm == "HS256" else algorithm)
    foreign = sign(other, "RS256" if algorithm == "HS256" else algorithm, t="bob")
    with pytest.raises(UnauthenticatedError, match="none that is known"):
        authenticator.authenticate(bearer(foreign), PLAIN)


def test_tokens_that_must_not_pass(tmp_path: Path) -> None:
    key, public = make_key("ES256")
    (tmp_path / "key").write_bytes(public)
    config = auth_config(
        tmp_path,
        jwt_key_file=str(tmp_path / "key"),
        jwt_algorithm="ES256",
        jwt_audience="sluice",
    )
    authenticator = Authenticator(config)
    good = {"sub": "alice", "aud": "sluice"}
    assert authenticator.authenticate(bearer(sign(key, "ES256", **good)), PLAIN).tenant == "alice"
    head, body, _ = sign(key, "ES256", **good).split(".")
    _, forged, signature = sign(key, "ES256", sub="bob", aud="sluice").split(".")
    deep = "W1tb" * 4000  # brackets, opened and never closed
    tokens = {
        "expired": sign(key, "ES256", expires_in_s=-5.0, **good),
        "without end": sign(key, "ES256", expires_in_s=None, **good),
        "not yet": sign(key, "ES256", nbf=2**40, **good),
        "other audience": sign(key, "ES256", sub="alice", aud="else"),
        "no audience": sign(key, "ES256", sub="alice"),
        "no tenant": sign(key, "ES256", aud="sluice"),
        "unknown tenant": sign(key, "ES256", sub="mallory", aud="sluice"),
        "alg none": sign(None, "none", **good),
        "alg by the public key": sign(b"x" * 32, "HS256", **good),
        "no signature": f"{head}.{body}.",
        "other body": f"{head}.{body}.{signature}",
        "other head": f"{deep}.{forged}.{signature}",
        "dots": "..",
    }
    for name, token in tokens.items():
        with pytest.raises(UnauthenticatedError) as refused:
            authenticator.authenticate(bearer(token), PLAIN)
        assert ("expired" in str(refused.value)) == (name == "expired"), name
        assert len(token) < 3 or token not in str(refused.value)


def test_file_is_read_again_when_it_changes_and_a_broken_one_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = VirtualClock()
    authenticator = Authenticator(auth_config(tmp_path), clock=clock)
    authenticator.authenticate(bearer(KEYS["carol"]), PLAIN)
    path = write_tenants(tmp_path, [{"name": "dave", "key_sha256": [sha256("new key")]}])
    clock.advance(0.9)
    authenticator.authenticate(bearer(KEYS["carol"]), PLAIN)  # not looked at yet
    clock.advance(0.2)
    assert authenticator.authenticate(bearer("new key"), PLAIN).tenant == "dave"
    with pytest.raises(UnauthenticatedError):
        authenticator.authenticate(bearer(KEYS["carol"]), PLAIN)
    path.write_text("tenants: [{name: dave, key_sha256: [sk-in-clear-text]}]")
    for _ in range(3):
        clock.advance(1.1)
        assert authenticator.authenticate(bearer("new key"), PLAIN).tenant == "dave"
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert "tenants.0.key_sha256.0" in errors[0].getMessage()
    path.unlink()
    clock.advance(1.1)
    assert authenticator.authenticate(bearer("new key"), PLAIN).tenant == "dave"
    write_tenants(tmp_path)
    clock.advance(1.1)
    assert authenticator.authenticate(bearer(KEYS["carol"]), PLAIN).tenant == "carol"
    assert "clear-text" not in caplog.text


BROKEN = {
    "nothing": ("", "the top"),
    "a list": ("[sk-secret]", "the top"),
    "nobody": ("tenants: []", "tenants: "),
    "no yaml": ("tenants:\n- name: [sk-secret\nx", ": no YAML"),
    "not text": ("\x00sk-secret", "no YAML"),
    "unknown key": ("tenants: [{name: a, key: sk-secret}]", "tenants.0.(a name"),
    "key in place of a field": ("tenants: [{name: a, sk-secret: x}]", "tenants.0.(a name"),
    "key at the top": ("sk-secret: 1\ntenants: [{name: a}]", "(a name that is no field): E"),
    "bad name": ("tenants: [{name: 'sk secret'}]", "tenants.0.name: "),
    "clear key": ("tenants: [{name: a, key_sha256: [sk-secret]}]", "tenants.0.key_sha256.0"),
    "weight 0": ("tenants: [{name: a, weight: 0}]", "tenants.0.weight: Input should be g"),
    "weight too large": ("tenants: [{name: a, weight: 1.0e+7}]", "tenants.0.weight: Input"),
    "weight NaN": ("tenants: [{name: a, weight: .nan}]", "tenants.0.weight: Input"),
    "weight as text": ("tenants: [{name: a, weight: sk-secret}]", "tenants.0.weight: Input"),
    "negative limit": (
        "tenants: [{name: a, requests_per_minute: -1}]",
        "tenants.0.requests_per_minute: Input should be greater than or equal to 0",
    ),
    "half a token": (
        "tenants: [{name: a, tokens_per_minute: 0.5}]",
        "tenants.0.tokens_per_minute: Input should be a valid integer",
    ),
    "yes for a number": (
        "tenants: [{name: a, max_streams: true}]",
        "tenants.0.max_streams: Input should be a valid integer",
    ),
    "limit too large": (
        "tenants: [{name: a, max_streams: 1000000000001}]",
        "tenants.0.max_streams: Input should be less than or equal to 1000000000000",
    ),
    "name twice": ("tenants: [{name: a}, {name: a}]", "'a' is there twice"),
    "key twice": (
        f"tenants: [{{name: a, key_sha256: [{'Ab' * 32}]}}, "
        f"{{name: b, key_sha256: [{'aB' * 32}]}}]",
        "a key of 'b' is there twice",
    ),
    "certificate twice": (
        "tenants: [{name: a, certificate: [x]}, {name: b, certificate: [x]}]",
        "certificate's name of 'b' is there twice",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file_is_named_and_not_repeated(tmp_path: Path, case: str) -> None:
    text, said = BROKEN[case]
    path = tmp_path / "tenants.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        Authenticator(AuthConfig(tenants_file=str(path)))
    assert refused.value.field == "auth.tenants_file"
    assert said in str(refused.value)
    error: BaseException | None = refused.value
    while error is not None:  # a traceback would show what the error came from
        assert "secret" not in str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def test_missing_files_are_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"auth.tenants_file: No such file"):
        Authenticator(AuthConfig(tenants_file=missing))
    with pytest.raises(ConfigError, match=r"auth.jwt_key_file: No such file"):
        Authenticator(auth_config(tmp_path, jwt_key_file=missing))
    with pytest.raises(ConfigError, match=r"auth.jwt_key_file without auth.tenants_file"):
        Authenticator(AuthConfig(jwt_key_file=missing))


@pytest.mark.parametrize(
    ("algorithm", "content", "said"),
    [
        ("HS256", b"short\n", "5 bytes, limit=32"),
        ("RS256", b"no key at all, only a text that is long enough", "no key for RS256"),
        ("RS256", make_key("ES256")[1], "no key for RS256"),
        ("EdDSA", make_key("ES256")[1], "no key for EdDSA"),
        ("ES256", b"-----BEGIN PRIVATE KEY-----\nabc", "a private key"),
        ("HS256", make_key("ES256")[1], "no key for HS256"),
    ],
)
def test_key_that_does_not_fit_its_algorithm_is_refused(
    tmp_path: Path, algorithm: str, content: bytes, said: str
) -> None:
    (tmp_path / "key").write_bytes(content)
    config = auth_config(tmp_path, jwt_key_file=str(tmp_path / "key"), jwt_algorithm=algorithm)
    with pytest.raises(ConfigError, match=f"auth.jwt_key_file: {said}"):
        Authenticator(config)


def test_weight_of_a_tenant_is_that_of_its_callers(tmp_path: Path) -> None:
    tenants = [
        {"name": "alice", "key_sha256": [sha256(KEYS["alice"])], "weight": 2.5},
        {"name": "bob", "key_sha256": [sha256(KEYS["bob"])]},
    ]
    path = write_tenants(tmp_path, tenants)
    authenticator = Authenticator(AuthConfig(tenants_file=str(path)))
    weights = [authenticator.weight_of(name) for name in ("alice", "bob", "mallory", "")]
    assert weights == [2.5, 1.0, 1.0, 1.0]
    assert Authenticator(AuthConfig()).weight_of("alice") == 1.0


def test_salt_of_a_tenant_is_that_of_its_callers(tmp_path: Path) -> None:
    authenticator = Authenticator(auth_config(tmp_path))
    for name, key in KEYS.items():
        assert authenticator.salt_of(name) == authenticator.authenticate(bearer(key), PLAIN).salt
    assert authenticator.salt_of("mallory") is None
    assert authenticator.salt_of("") is None, "a prefix registered before tenants were"
    assert Authenticator(AuthConfig()).salt_of("") == b""
    assert Authenticator(AuthConfig()).salt_of("alice") is None


def test_callers_do_not_show_their_salt(tmp_path: Path) -> None:
    caller = Authenticator(auth_config(tmp_path)).authenticate(bearer(KEYS["alice"]), PLAIN)
    assert str(caller.salt) not in repr(caller)
    assert "alice" in repr(caller)
