"""`sluice config`: the effective configuration, each knob with meaning, range and default."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import UnionType
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.cli.options import AsJson, ConfigFile, Overrides, print_json
from cluster.config import ClusterConfig, load_config


@dataclass(frozen=True, slots=True)
class Knob:
    """One leaf of the configuration tree."""

    path: str  # as `--set` takes it
    value: Any  # the effective one
    default: Any
    allowed: str  # range, pattern or choices; empty: all of its type
    description: str  # meaning and unit

    @property
    def is_changed(self) -> bool:
        """Whether the value differs from the default."""
        return bool(self.value != self.default)


def show_config(
    config: ConfigFile = None, overrides: Overrides = None, json: AsJson = False
) -> None:
    """Print the effective configuration with meaning, unit, range and default of every knob."""
    knobs = list(list_knobs(load_config(config, overrides)))
    if json:
        print_json({knob.path: asdict(knob) for knob in knobs})
        return
    table = Table("knob", "value", "default", "allowed", "meaning", row_styles=["", "dim"])
    for knob in knobs:
        value = f"[bold]{escape(str(knob.value))}[/]" if knob.is_changed else str(knob.value)
        default = str(knob.default) if knob.is_changed else ""
        table.add_row(knob.path, value, default, escape(knob.allowed), knob.description)
    Console().print(table)


def list_knobs(config: ClusterConfig) -> Iterator[Knob]:
    """Yield every knob of a configuration, in the order of the sections."""
    yield from _section_knobs("", config, type(config)())


def _section_knobs(prefix: str, section: BaseModel, defaults: BaseModel) -> Iterator[Knob]:
    for name, info in type(section).model_fields.items():
        path = f"{prefix}{name}"
        value, default = getattr(section, name), getattr(defaults, name)
        if isinstance(value, BaseModel):
            # An optional section that is off by default shows the defaults of its own fields.
            own_defaults = default if isinstance(default, BaseModel) else type(value)()
            yield from _section_knobs(f"{path}.", value, own_defaults)
        else:
            yield Knob(path, value, default, _allowed(info), info.description or "")


def _allowed(info: FieldInfo) -> str:
    """Return the bounds that pydantic enforces, as a reader writes them."""
    choices = [arg for arg in typing.get_args(info.annotation) if isinstance(arg, str)]
    if choices:
        return " | ".join(choices)
    if isinstance(info.annotation, UnionType):
        return "a section, or null"
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "pattern": "matches"}
    bounds = []
    for constraint in info.metadata:
        for name, sign in signs.items():
            limit = getattr(constraint, name, None)
            if limit is not None:
                bounds.append(f"{sign} {limit}")
    return ", ".join(bounds)
