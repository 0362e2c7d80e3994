"""The public services' messages as they come off the wire.

protobuf refuses a string that is not UTF-8, and gRPC then answers INTERNAL. Here the client learns
which field it is.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import FileDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message

from cluster.errors import InvalidArgumentError
from cluster.gateway.status import abort
from cluster.rpc.sluice.v1 import cache_pb2, inference_pb2

INFERENCE: ServiceDescriptor = inference_pb2.DESCRIPTOR.services_by_name["Inference"]
CACHE: ServiceDescriptor = cache_pb2.DESCRIPTOR.services_by_name["Cache"]
_FieldDescriptor = descriptor_pb2.FieldDescriptorProto


def add_service(service: ServiceDescriptor, servicer: object, server: grpc.aio.Server) -> None:
    """Register a servicer's methods, named as in the proto, with a server."""
    twins = descriptor_pool.DescriptorPool()
    _add_twins(service.file, twins)
    handlers = {}
    for method in service.methods:
        request, response = method.input_type, method.output_type
        twin = message_factory.GetMessageClass(twins.FindMessageTypeByName(request.full_name))
        kind = (
            grpc.unary_stream_rpc_method_handler
            if method.server_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        handlers[method.name] = kind(
            _refusing(getattr(servicer, method.name)),
            request_deserializer=_reader(message_factory.GetMessageClass(request), twin),
            response_serializer=message_factory.GetMessageClass(response).SerializeToString,
        )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service.full_name, handlers),)
    )


def _refusing(method: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    async def handle(request: Message | InvalidArgumentError, context: Any) -> Any:
        if isinstance(request, InvalidArgumentError):
            await abort(context, request)
        return await method(request, context)

    return handle


def _reader(
    message_class: type[Message], twin_class: type[Message]
) -> Callable[[bytes], Message | InvalidArgumentError]:
    """Return a deserializer that returns, not raises, what is wrong with the bytes."""

    def read(data: bytes) -> Message | InvalidArgumentError:
        try:
            return message_class.FromString(data)
        except DecodeError:
            return _malformed(data, twin_class)

    return read


def _malformed(data: bytes, twin_class: type[Message]) -> InvalidArgumentError:
    try:
        field = _first_bad_field(twin_class.FromString(data))
    except DecodeError:
        field = ""
    if not field:
        return InvalidArgumentError("the request is no message of this method: check the client")
    # The path within GenerateRequest, whichever of the two methods carries it.
    return InvalidArgumentError(
        f"{field} is not valid UTF-8: encode it as UTF-8", field=field.removeprefix("request.")
    )


def _first_bad_field(message: Message, prefix: str = "") -> str:
    """Return the path of the first field that is not UTF-8; empty if there is none."""
    for field, value in message.ListFields():
        for index, item in enumerate(value if field.is_repeated else [value]):
            path = f"{prefix}{field.name}" + (f"[{index}]" if field.is_repeated else "")
            if isinstance(item, bytes):
                try:
                    item.decode()
                except UnicodeDecodeError:
                    return path
            elif isinstance(item, Message) and (bad := _first_bad_field(item, f"{path}.")):
                return bad
    return ""


def _add_twins(source: FileDescriptor, pool: descriptor_pool.DescriptorPool) -> None:
    """Add a file's messages, and those it imports, with bytes in place of strings.

    Bytes accept anything.
    """
    for imported in source.dependencies:
        _add_twins(imported, pool)
    file = descriptor_pb2.FileDescriptorProto.FromString(source.serialized_pb)
    for message in file.message_type:
        for field in message.field:
            if field.type == _FieldDescriptor.TYPE_STRING:
                field.type = _FieldDescriptor.TYPE_BYTES
    pool.Add(file)
