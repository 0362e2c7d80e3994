"""`sluice bench serve`: drive a serving cluster at any address and measure what clients see."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import grpc

from cluster.bench.aims import AimMix
from cluster.bench.load import LoadPlan, LoadRun, RequestShape
from cluster.bench.replay import ReplayPlan, ReplayRun, clipped
from cluster.bench.sender import OnRecord, Sender
from cluster.bench.statistics import (
    NO_OBJECTIVE,
    LatencyObjective,
    RequestRecord,
    summarize,
    summarize_classes,
)
from cluster.errors import InvalidArgumentError, UnavailableError
from cluster.rpc.connection import Metadata, Tls, channel_credentials, key_metadata
from cluster.rpc.sluice.v1 import inference_pb2 as pb
from cluster.rpc.sluice.v1.inference_pb2_grpc import InferenceStub

_CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class ServeBench:
    """One measurement."""

    address: str  # host:port of a gateway
    plan: LoadPlan | ReplayPlan
    shape: RequestShape = field(default_factory=RequestShape)  # of a replay: of its warm-up
    aims: AimMix = field(default_factory=AimMix)  # of a load; a replayed workload has its own
    num_warmup: int = 0  # requests before the measurement, not counted
    model: str = ""  # empty: the only one served
    tls: Tls | None = None  # None speaks plain text
    api_key: str | None = field(default=None, repr=False)  # of a tenant

    def __post_init__(self) -> None:
        shape = self.shape
        if shape.num_shared_prefix_tokens > shape.num_input_tokens:
            raise InvalidArgumentError(
                f"shared-prefix-tokens={shape.num_shared_prefix_tokens}, "
                f"limit={shape.num_input_tokens}: the prefix is part of input-tokens",
                field="shared-prefix-tokens",
            )

    @property
    def common_objective(self) -> LatencyObjective:
        """That of all requests; none where they differ."""
        is_one = isinstance(self.plan, LoadPlan) and len(self.aims.shares) == 1
        return self.aims.draw(0).objective if is_one else NO_OBJECTIVE


@dataclass(frozen=True, slots=True)
class ServeBenchResult:
    """What a measurement brought."""

    records: list[RequestRecord]
    figures: dict[str, Any]  # plain data, for JSON


async def run_serve_bench(
    bench: ServeBench, on_record: OnRecord = lambda record: None
) -> ServeBenchResult:
    """Run the warm-up and the measurement.

    Args:
        bench: What to do.
        on_record: Called as each measured request ends.

    Raises:
        InvalidArgumentError: Prompt and answer do not fit into the model's context.
        UnavailableError: Nothing answers at the address.
    """
    metadata = key_metadata(bench.api_key, bench.address, is_tls=bench.tls is not None)
    async with _channel(bench) as channel:
        stub = InferenceStub(channel)  # type: ignore[no-untyped-call]
        model = await _find_model(stub, bench, metadata)
        if bench.num_warmup:
            warmup = LoadPlan(bench.num_warmup, None, concurrency=min(4, bench.num_warmup))
            await LoadRun(stub, model, bench.shape, warmup, metadata=metadata).run()
        records = await _run(stub, model, bench, on_record, metadata)
    figures = {
        "address": bench.address,
        "model": model.name,
        **_load_figures(bench, model),
        "num_warmup": bench.num_warmup,
        "result": summarize(records),
        "classes": summarize_classes(records),
    }
    return ServeBenchResult(records, figures)


async def _run(
    stub: InferenceStub,
    model: pb.Model,
    bench: ServeBench,
    on_record: OnRecord,
    metadata: Metadata,
) -> list[RequestRecord]:
    if isinstance(bench.plan, ReplayPlan):
        return await ReplayRun(Sender(stub, on_record, metadata), model, bench.plan).run()
    run = LoadRun(
        stub,
        model,
        bench.shape,
        bench.plan,
        bench.num_warmup,
        on_record,
        metadata=metadata,
        aims=bench.aims,
    )
    return await run.run()


def _load_figures(bench: ServeBench, model: pb.Model) -> dict[str, Any]:
    if isinstance(bench.plan, ReplayPlan):
        lost = clipped(bench.plan.workload, model.max_model_len)
        return {"load": bench.plan.figures(), "clipped": lost}
    return {
        "load": asdict(bench.plan),
        "requests": asdict(bench.shape),
        "objectives": bench.aims.figures(),
    }


def _channel(bench: ServeBench) -> grpc.aio.Channel:
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    credentials = channel_credentials(bench.tls)
    if credentials is None:
        return grpc.aio.insecure_channel(bench.address, options=options)
    return grpc.aio.secure_channel(bench.address, credentials, options=options)


async def _find_model(stub: InferenceStub, bench: ServeBench, metadata: Metadata) -> pb.Model:
    try:
        response = await stub.ListModels(
            pb.ListModelsRequest(), timeout=_CONNECT_TIMEOUT_S, metadata=metadata
        )
    except grpc.aio.AioRpcError as error:
        raise UnavailableError(
            f"{bench.address}: {error.code().name}: {error.details()}; is `sluice serve` running?"
        ) from error
    named: list[pb.Model] = [model for model in response.models if bench.model in ("", model.name)]
    if len(named) != 1:
        names = ", ".join(model.name for model in response.models) or "none"
        raise InvalidArgumentError(
            f"model={bench.model!r}: name one of those served: {names}", field="model"
        )
    num_tokens = bench.shape.num_input_tokens + bench.shape.num_output_tokens
    if isinstance(bench.plan, ReplayPlan) and not bench.num_warmup:
        num_tokens = 0  # no request has this shape
    if num_tokens > named[0].max_model_len:
        raise InvalidArgumentError(
            f"input-tokens + output-tokens = {num_tokens}, limit={named[0].max_model_len} "
            f"(context of {named[0].name}): ask for fewer",
            field="input-tokens",
        )
    return named[0]
