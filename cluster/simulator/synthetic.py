"""Workloads by name: `mix64`, `sessions:turns=6,rate=2`, `hot_prefix:prefix=4000`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from pydantic import ValidationError

from cluster.errors import InvalidArgumentError
from cluster.simulator.mix import mix
from cluster.simulator.mix_draws import MixSpec
from cluster.simulator.sessions import SessionsSpec, sessions
from cluster.simulator.streams import (
    BurstSpec,
    HotPrefixSpec,
    OverloadSpec,
    PoissonSpec,
    SyntheticSpec,
    burst,
    hot_prefix,
    overload_classes,
    poisson,
)
from cluster.simulator.workload import Workload

_KINDS: Mapping[str, tuple[type[SyntheticSpec], Callable[..., Workload]]] = {
    "mix64": (MixSpec, mix),  # its default is that 64 % recur
    "sessions": (SessionsSpec, sessions),
    "hot_prefix": (HotPrefixSpec, hot_prefix),
    "poisson": (PoissonSpec, poisson),
    "burst": (BurstSpec, burst),
    "overload_classes": (OverloadSpec, overload_classes),
}

SPECS: Mapping[str, type[SyntheticSpec]] = {name: spec for name, (spec, _) in _KINDS.items()}
"""What can be said of each synthetic workload, by name: for help texts."""

_UNITS = ("_tokens_per_s", "_per_s", "_tokens", "_s")


def mix64(*, seed: int = 0) -> Workload:
    """Return the mix in which 64 % of prefix blocks recur: an hour at 3.4 requests per second."""
    return from_spec("mix64", seed=seed)


def from_spec(text: str, *, seed: int = 0) -> Workload:
    """Return the workload that a text describes: a name, then numbers that differ from defaults.

    Args:
        text: As `name` or `name:key=value,key=value`; keys may go without their unit.
        seed: Of all that is random, from 0 on.

    Raises:
        InvalidArgumentError: The name, a key or a value is not one, or there would be no request.
    """
    name, _, assignments = text.partition(":")
    if name not in _KINDS:
        raise InvalidArgumentError(
            f"workload {name!r} is unknown: take one of {', '.join(_KINDS)}", field="workload"
        )
    if seed < 0:
        raise InvalidArgumentError(f"seed={seed}, it is 0 or more: change it", field="seed")
    spec, make = _KINDS[name]
    try:
        workload = make(spec.model_validate(_values(text, spec, assignments)), seed=seed)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        raise InvalidArgumentError(
            f"workload {text}: {key}={first['input']}: {first['msg']}", field=key
        ) from None
    return replace(workload, name=text)


def _values(text: str, spec: type[SyntheticSpec], assignments: str) -> dict[str, str]:
    """Return the values by field, as text."""
    fields = {key: name for name in spec.model_fields for key in (_without_unit(name), name)}
    values: dict[str, str] = {}
    for assignment in assignments.split(",") if assignments else ():
        key, equals, value = (part.strip() for part in assignment.partition("="))
        field = fields.get(key)
        if field is None or not equals:
            raise InvalidArgumentError(
                f"workload {text}: {assignment!r} is no key=value of it: its keys are "
                f"{', '.join(spec.model_fields)}",
                field="workload",
            )
        if field in values:
            raise InvalidArgumentError(
                f"workload {text}: {field} comes twice: leave one out", field=field
            )
        values[field] = value
    return values


def _without_unit(name: str) -> str:
    return next((name.removesuffix(unit) for unit in _UNITS if name.endswith(unit)), name)
