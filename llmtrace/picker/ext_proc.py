"""Envoy's external processing protocol: the messages of ``envoy.service.ext_proc.v3`` that an endpoint picker needs.

The messages are described here by field name, number and type, and made by protobuf at import. The published
Python packages of Envoy's API bring their own, older ``opentelemetry.proto`` modules, which overwrite those of
OpenTelemetry in the same environment. A contract test compares this description with the published one. Fields that
are left out here are skipped on reading.

Source: envoy/service/ext_proc/v3/external_processor.proto, envoy/config/core/v3/base.proto.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, struct_pb2

SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"
METHOD = f"/{SERVICE}/Process"
OVERWRITE = 2
"""HeaderValueOption.HeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD."""

_EXT_PROC = "envoy.service.ext_proc.v3"
_CORE = "envoy.config.core.v3"
_TYPE = "envoy.type.v3"

# Message -> field -> (number, type); a type is a scalar, or the full name of a message, with * when repeated.
MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    f"{_CORE}.HeaderValue": {"key": (1, "string"), "value": (2, "string"), "raw_value": (3, "bytes")},
    f"{_CORE}.HeaderMap": {"headers": (1, f"*{_CORE}.HeaderValue")},
    f"{_CORE}.HeaderValueOption": {"header": (1, f"{_CORE}.HeaderValue"), "append_action": (3, "enum")},
    f"{_CORE}.Metadata.FilterMetadataEntry": {"key": (1, "string"), "value": (2, "google.protobuf.Struct")},
    f"{_CORE}.Metadata": {"filter_metadata": (1, f"*{_CORE}.Metadata.FilterMetadataEntry")},
    f"{_TYPE}.HttpStatus": {"code": (1, "enum")},
    f"{_EXT_PROC}.HttpHeaders": {"headers": (1, f"{_CORE}.HeaderMap"), "end_of_stream": (3, "bool")},
    f"{_EXT_PROC}.HttpBody": {"body": (1, "bytes"), "end_of_stream": (2, "bool")},
    f"{_EXT_PROC}.HttpTrailers": {"trailers": (1, f"{_CORE}.HeaderMap")},
    f"{_EXT_PROC}.ProcessingRequest": {
        "request_headers": (2, f"{_EXT_PROC}.HttpHeaders"),
        "response_headers": (3, f"{_EXT_PROC}.HttpHeaders"),
        "request_body": (4, f"{_EXT_PROC}.HttpBody"),
        "response_body": (5, f"{_EXT_PROC}.HttpBody"),
        "request_trailers": (6, f"{_EXT_PROC}.HttpTrailers"),
        "response_trailers": (7, f"{_EXT_PROC}.HttpTrailers"),
        "metadata_context": (8, f"{_CORE}.Metadata"),
    },
    f"{_EXT_PROC}.HeaderMutation": {
        "set_headers": (1, f"*{_CORE}.HeaderValueOption"),
        "remove_headers": (2, "*string"),
    },
    f"{_EXT_PROC}.StreamedBodyResponse": {"body": (1, "bytes"), "end_of_stream": (2, "bool")},
    f"{_EXT_PROC}.BodyMutation": {"streamed_response": (3, f"{_EXT_PROC}.StreamedBodyResponse")},
    f"{_EXT_PROC}.CommonResponse": {
        "header_mutation": (2, f"{_EXT_PROC}.HeaderMutation"),
        "body_mutation": (3, f"{_EXT_PROC}.BodyMutation"),
        "clear_route_cache": (5, "bool"),
    },
    f"{_EXT_PROC}.HeadersResponse": {"response": (1, f"{_EXT_PROC}.CommonResponse")},
    f"{_EXT_PROC}.BodyResponse": {"response": (1, f"{_EXT_PROC}.CommonResponse")},
    f"{_EXT_PROC}.TrailersResponse": {"header_mutation": (1, f"{_EXT_PROC}.HeaderMutation")},
    f"{_EXT_PROC}.ImmediateResponse": {
        "status": (1, f"{_TYPE}.HttpStatus"),
        "headers": (2, f"{_EXT_PROC}.HeaderMutation"),
        "body": (3, "bytes"),
        "details": (5, "string"),
    },
    f"{_EXT_PROC}.ProcessingResponse": {
        "request_headers": (1, f"{_EXT_PROC}.HeadersResponse"),
        "response_headers": (2, f"{_EXT_PROC}.HeadersResponse"),
        "request_body": (3, f"{_EXT_PROC}.BodyResponse"),
        "response_body": (4, f"{_EXT_PROC}.BodyResponse"),
        "request_trailers": (5, f"{_EXT_PROC}.TrailersResponse"),
        "response_trailers": (6, f"{_EXT_PROC}.TrailersResponse"),
        "immediate_response": (7, f"{_EXT_PROC}.ImmediateResponse"),
        "dynamic_metadata": (8, "google.protobuf.Struct"),
    },
}
ONEOFS = {
    f"{_EXT_PROC}.ProcessingRequest": ("request", range(2, 8)),
    f"{_EXT_PROC}.ProcessingResponse": ("response", range(1, 8)),
    f"{_EXT_PROC}.BodyMutation": ("mutation", range(3, 4)),
}

_Field = descriptor_pb2.FieldDescriptorProto
# Enumerations are read and written as numbers: on the wire an enum is an int32.
_SCALARS = {
    "string": _Field.TYPE_STRING,
    "bytes": _Field.TYPE_BYTES,
    "bool": _Field.TYPE_BOOL,
    "enum": _Field.TYPE_INT32,
}


def _file() -> descriptor_pb2.FileDescriptorProto:
    """All messages as one file of a package of its own: the published names may be taken in the same process."""
    file = descriptor_pb2.FileDescriptorProto(
        name="llmtrace/picker/ext_proc.proto", syntax="proto3", dependency=[struct_pb2.DESCRIPTOR.name]
    )
    file.package = "llmtrace.ext_proc"
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=_local(name))
        oneof, members = ONEOFS.get(name, ("", range(0)))
        if oneof:
            message.oneof_decl.add(name=oneof)
        for field_name, (number, kind) in fields.items():
            field = message.field.add(name=field_name, number=number, label=_Field.LABEL_OPTIONAL)
            if kind.startswith("*"):
                field.label, kind = _Field.LABEL_REPEATED, kind[1:]
            if kind in _SCALARS:
                field.type = _SCALARS[kind]
            else:
                field.type = _Field.TYPE_MESSAGE
                known = kind.startswith("google.")
                field.type_name = f".{kind}" if known else f".{file.package}.{_local(kind)}"
            if number in members:
                field.oneof_index = 0
    return file


def _local(name: str) -> str:
    """The message's name in the one file: the published one without package, nested names joined."""
    return "".join(part for part in name.split(".") if part[0].isupper())


def _make() -> dict[str, Any]:
    pool = descriptor_pool.Default()
    pool.Add(_file())
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"llmtrace.ext_proc.{_local(name)}"))
        for name in MESSAGES
    }


CLASSES = _make()
"""Message classes by the full name of the published API."""

ProcessingRequest: Any = CLASSES[f"{_EXT_PROC}.ProcessingRequest"]
ProcessingResponse: Any = CLASSES[f"{_EXT_PROC}.ProcessingResponse"]
HeaderValueOption: Any = CLASSES[f"{_CORE}.HeaderValueOption"]
