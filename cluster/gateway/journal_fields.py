"""What the fields of a journal's entries may be."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.gateway.journal_entry import JournalError
from cluster.types import FinishReason, ServiceClass

_Natural = Annotated[int, Field(ge=0)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Fields(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SamplingFields(_Fields):
    """Of `SamplingParams`, those that are set: the others have its defaults, not these."""

    max_tokens: int = Field(1, ge=1)
    min_tokens: _Natural = 0
    temperature: _Finite = Field(0.0, ge=0)
    top_k: _Natural = 0
    top_p: _Finite = Field(1.0, gt=0, le=1)
    min_p: _Finite = Field(0.0, ge=0, le=1)
    repetition_penalty: _Finite = Field(1.0, gt=0)
    presence_penalty: _Finite = 0.0
    frequency_penalty: _Finite = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[_Natural, ...] = ()
    ignore_eos: bool = False
    num_logprobs: int = Field(-1, ge=-1)


class HeaderFields(_Fields):
    """Of a header."""

    request_id: str = Field(min_length=1)
    tenant: str
    prompt: bytes = Field(min_length=1)  # token ids, packed
    sampling: SamplingFields
    slo: tuple[_Seconds | None, _Seconds | None]  # ttft_s, tpot_s
    service_class: ServiceClass = Field(strict=False)  # by its value
    session: str
    arrived_unix_s: _Seconds


class ProgressFields(_Fields):
    """Of an entry of progress."""

    first_seq: _Natural
    runs: tuple[int, ...]  # for each event its number of tokens, in pairs
    ids: bytes = b""  # of the tokens, in the columns of `TokenColumns`
    logprob_runs: tuple[int, ...] = ()
    logprobs: bytes = b""
    top_ids: bytes = b""
    num_cached_tokens: _Natural = 0
    fingerprint: str = ""
    queued_s: _Seconds = 0.0
    ttft_s: _Seconds = 0.0


class EndFields(_Fields):
    """Of the last entry."""

    seq: int = Field(ge=-1)  # of the last event; -1 where it has failed
    reason: FinishReason | None = Field(strict=False)  # by its value
    error: str  # "CODE: message"; empty where there is a reason


_AnyFields = TypeVar("_AnyFields", bound=_Fields)


def read_fields(kind: type[_AnyFields], values: tuple[object, ...]) -> _AnyFields:
    """Return an entry's values by name; those at the end may be left out.

    Raises:
        JournalError: They are not what they may be. It repeats none of them: they are a client's.
    """
    names = list(kind.model_fields)
    if len(values) > len(names):
        raise JournalError(f"an entry has {len(values)} fields, limit={len(names)}")
    try:
        return kind.model_validate(dict(zip(names, values, strict=False)))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        path = ".".join(map(str, first["loc"]))
        raise JournalError(f"{path} of an entry cannot be: {first['type']}") from None
