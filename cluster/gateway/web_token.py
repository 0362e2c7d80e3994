"""Bearer tokens that others signed (JWT, RFC 7519): do they verify, and whom do they name."""

from __future__ import annotations

from typing import Any

import jwt

from cluster.config import AuthConfig
from cluster.errors import ConfigError, UnauthenticatedError

FIELD = "auth.jwt_key_file"
_MIN_SECRET_BYTES = 32  # as long as the hash (RFC 7518, section 3.2)


class WebTokens:
    """Verifies tokens with one key and one algorithm, whatever a token's own header says.

    Args:
        key: Content of `config.jwt_key_file`.
        config: Algorithm, audience, claim.

    Raises:
        ConfigError: The key does not fit the algorithm; without a word of its content.
    """

    def __init__(self, key: bytes, config: AuthConfig) -> None:
        self._config = config
        self._key = _prepared(key.strip(), config.jwt_algorithm)
        self._required = ["exp", config.jwt_tenant_claim]

    def tenant_name(self, token: str) -> str:
        """Return the name that a token vouches for.

        Raises:
            UnauthenticatedError: It does not verify, is over or not begun, is for another audience,
                or names nobody.
        """
        audience = self._config.jwt_audience or None
        try:
            claims = jwt.decode(
                token,
                self._key,
                algorithms=[self._config.jwt_algorithm],
                audience=audience,
                options={"require": self._required, "verify_aud": audience is not None},
            )
        except jwt.ExpiredSignatureError:
            raise UnauthenticatedError("the bearer token has expired: get a new one") from None
        except (jwt.PyJWTError, ValueError, TypeError, ArithmeticError, RecursionError):
            # Which check failed is nobody's business, and the text could repeat the token.
            raise UnauthenticatedError("the bearer token is none that is known here") from None
        name = claims[self._config.jwt_tenant_claim]
        return name if isinstance(name, str) else ""


def _prepared(key: bytes, algorithm: str) -> Any:
    if algorithm == "HS256" and len(key) < _MIN_SECRET_BYTES:
        raise ConfigError(
            f"{FIELD}: {len(key)} bytes, limit={_MIN_SECRET_BYTES} at the least for HS256: "
            "take a longer secret",
            field=FIELD,
        )
    if b"PRIVATE KEY" in key:
        raise ConfigError(
            f"{FIELD}: a private key: keep it where tokens are signed, give its public key here",
            field=FIELD,
        )
    try:
        return jwt.get_algorithm_by_name(algorithm).prepare_key(key)
    except (jwt.PyJWTError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{FIELD}: no key for {algorithm} ({type(error).__name__}): give a PEM public key, or "
            "set auth.jwt_algorithm to that of the key",
            field=FIELD,
        ) from None
