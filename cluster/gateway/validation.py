"""Requests as they enter: what is out of bounds is refused with the path of its field."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.config import GatewayConfig
from cluster.errors import InvalidArgumentError, NotFoundError
from cluster.rpc.sluice.v1 import cache_pb2, inference_pb2
from cluster.types import SamplingParams

_MAX_REQUEST_ID_CHARS = 128
_MAX_STOP_TOKEN_IDS = 128
HasPrompt = (
    inference_pb2.GenerateRequest | cache_pb2.RegisterPrefixRequest | cache_pb2.InspectCacheRequest
)
_UNSET = 0  # max_tokens that the client left to the server


@dataclass(frozen=True, slots=True)
class Limits:
    """What requests are held against."""

    model: str  # name of the model served
    max_model_len: int  # tokens, prompt and answer together
    vocab_size: int  # token ids are below this
    gateway: GatewayConfig


def check_model(name: str, limits: Limits) -> None:
    """Raise unless the model is served.

    Raises:
        NotFoundError: It is not.
    """
    if name and name != limits.model:
        raise NotFoundError(
            f"model={name[:100]!r} is not served here: ask for {limits.model!r}, or leave it empty"
        )


def check_request_id(request_id: str) -> None:
    """Raise unless the id may be used.

    Raises:
        InvalidArgumentError: It is too long or not printable.
    """
    if len(request_id) > _MAX_REQUEST_ID_CHARS or not request_id.isprintable():
        raise InvalidArgumentError(
            f"request_id has {len(request_id)} characters, limit={_MAX_REQUEST_ID_CHARS} printable "
            "ones: choose another, or leave it to the server",
            field="request_id",
        )


def check_prompt_given(message: HasPrompt) -> None:
    """Raise if there is nothing to continue.

    Raises:
        InvalidArgumentError: Neither text nor token ids, or none in them.
    """
    kind = message.WhichOneof("prompt")
    if kind is None:
        raise InvalidArgumentError("no prompt: give text or token_ids", field="prompt")
    if not (message.text if kind == "text" else message.token_ids.ids):
        raise InvalidArgumentError(f"{kind} is empty: give at least one token", field=kind)


def check_token_ids(token_ids: Sequence[int], limits: Limits, *, field: str) -> None:
    """Raise unless all token ids are in the vocabulary.

    Args:
        token_ids: At least one.
        limits: Have the vocabulary.
        field: Where the request has them, for the error.

    Raises:
        InvalidArgumentError: One is not.
    """
    if max(token_ids) >= limits.vocab_size:
        index = next(i for i, token in enumerate(token_ids) if token >= limits.vocab_size)
        raise _out_of_vocabulary(f"{field}[{index}]", token_ids[index], limits)


def read_sampling(
    message: inference_pb2.SamplingParams, limits: Limits, *, seed: int
) -> SamplingParams:
    """Return checked parameters; `fit_context` sets `max_tokens` where the client gave none.

    Args:
        seed: Used where the client gave none.

    Raises:
        InvalidArgumentError: A value is out of its range.
    """
    _check_ranges(message)
    _check_counts(message, limits)
    _check_stops(message, limits)

    def given(name: str, default: float) -> float:
        return getattr(message, name) if message.HasField(name) else default

    return SamplingParams(
        max_tokens=message.max_tokens if message.HasField("max_tokens") else _UNSET,
        min_tokens=message.min_tokens,
        temperature=given("temperature", 1.0),
        top_k=message.top_k,
        top_p=given("top_p", 1.0),
        min_p=message.min_p,
        repetition_penalty=given("repetition_penalty", 1.0),
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        seed=message.seed if message.HasField("seed") else seed,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        num_logprobs=message.logprobs if message.HasField("logprobs") else -1,
    )


def fit_context(
    sampling: SamplingParams,
    num_prompt_tokens: int,
    limits: Limits,
    *,
    prompt_field: str,
    num_prefix_tokens: int = 0,
) -> SamplingParams:
    """Return the parameters with `max_tokens` set, if prompt and answer fit the model's context.

    Args:
        sampling: As read.
        num_prompt_tokens: Those of a registered prefix included.
        limits: Have the model's context.
        prompt_field: Where the request has its own part of the prompt, for errors.
        num_prefix_tokens: Of the registered prefix.

    Raises:
        InvalidArgumentError: They do not. `prefix` is named where the prompt alone would fit.
    """
    limit = limits.max_model_len
    room = limit - num_prompt_tokens
    if room < 1:
        with_prefix = f", {num_prefix_tokens} of them the prefix's," if num_prefix_tokens else ","
        is_prefix = num_prefix_tokens > 0 and num_prompt_tokens - num_prefix_tokens < limit
        raise InvalidArgumentError(
            f"the prompt has {num_prompt_tokens} tokens{with_prefix} limit={limit - 1} "
            f"(max_model_len={limit} less one token of answer): shorten it",
            field="prefix" if is_prefix else prompt_field,
        )
    if sampling.max_tokens == _UNSET:
        max_tokens = min(limits.gateway.default_max_tokens, room)
        sampling = replace(sampling, max_tokens=max(max_tokens, min(sampling.min_tokens, room)))
    if sampling.max_tokens > room:
        raise InvalidArgumentError(
            f"the prompt's {num_prompt_tokens} tokens + max_tokens={sampling.max_tokens} = "
            f"{num_prompt_tokens + sampling.max_tokens}, limit={limit}: "
            f"ask for at most {room} tokens, or shorten the prompt",
            field="sampling.max_tokens",
        )
    if sampling.min_tokens > sampling.max_tokens:
        raise _bad("min_tokens", sampling.min_tokens, f"limit={sampling.max_tokens} (max_tokens)")
    return sampling


def _check_ranges(message: inference_pb2.SamplingParams) -> None:
    if not (message.temperature >= 0 and math.isfinite(message.temperature)):
        raise _bad("temperature", message.temperature, "it is a finite number, 0 or more")
    if message.HasField("top_p") and not 0 < message.top_p <= 1:
        raise _bad("top_p", message.top_p, "it is above 0 and at most 1")
    if not 0 <= message.min_p <= 1:
        raise _bad("min_p", message.min_p, "it is from 0 to 1")
    if message.HasField("repetition_penalty") and not 0 < message.repetition_penalty <= 2:
        raise _bad("repetition_penalty", message.repetition_penalty, "it is above 0 and at most 2")
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(message, name)
        if not -2 <= value <= 2:
            raise _bad(name, value, "it is from -2 to 2")


def _check_counts(message: inference_pb2.SamplingParams, limits: Limits) -> None:
    if message.HasField("max_tokens") and not 1 <= message.max_tokens <= limits.max_model_len:
        raise _bad(
            "max_tokens",
            message.max_tokens,
            f"it is from 1 to {limits.max_model_len}",
        )
    if message.min_tokens > limits.max_model_len:
        raise _bad("min_tokens", message.min_tokens, f"limit={limits.max_model_len} (the model's)")
    if message.top_k > limits.vocab_size:
        raise _bad(
            "top_k", message.top_k, f"limit={limits.vocab_size} (the vocabulary); 0 keeps all"
        )
    if message.logprobs > limits.gateway.max_logprobs:
        raise _bad("logprobs", message.logprobs, f"limit={limits.gateway.max_logprobs}")


def _check_stops(message: inference_pb2.SamplingParams, limits: Limits) -> None:
    gateway = limits.gateway
    if len(message.stop) > gateway.max_stop_strings:
        raise _bad("stop", f"{len(message.stop)} strings", f"limit={gateway.max_stop_strings}")
    for index, stop in enumerate(message.stop):
        num_bytes = len(stop.encode())
        if not 1 <= num_bytes <= gateway.max_stop_string_bytes:
            raise _bad(
                f"stop[{index}]",
                f"{num_bytes} bytes",
                f"it has from 1 to {gateway.max_stop_string_bytes} bytes",
            )
    if len(message.stop_token_ids) > _MAX_STOP_TOKEN_IDS:
        raise _bad(
            "stop_token_ids",
            f"{len(message.stop_token_ids)} tokens",
            f"limit={_MAX_STOP_TOKEN_IDS}",
        )
    for index, token_id in enumerate(message.stop_token_ids):
        if token_id >= limits.vocab_size:
            raise _out_of_vocabulary(f"sampling.stop_token_ids[{index}]", token_id, limits)


def _bad(name: str, value: object, allowed: str) -> InvalidArgumentError:
    shown = f"{value:g}" if isinstance(value, float) else value
    return InvalidArgumentError(
        f"{name}={shown}, {allowed}: change it or leave it out", field=f"sampling.{name}"
    )


def _out_of_vocabulary(field: str, token_id: int, limits: Limits) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{field}={token_id}, limit={limits.vocab_size - 1} (the vocabulary has "
        f"{limits.vocab_size} tokens): use ids of this model's tokenizer",
        field=field,
    )
