"""The OpenAPI document, from the types of the bodies."""

from collections.abc import Mapping
from typing import Any

import msgspec

_TEMPLATE = "#/components/schemas/{name}"
_ERRORS = {
    400: "A field is wrong; the message names it, its limit and the way out.",
    401: "The API key is missing or unknown.",
    403: "A page of another site called, or a name that is not loopback without API keys.",
    404: "There is no such model, or it cannot do this.",
    405: "The path takes another method.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    429: "The queue is full, or a limit of the API key is reached; Retry-After says when to ask.",
    500: "The server failed; its log tells why under the number in the message.",
    503: "The server is loading or shutting down.",
}
_GETS = {
    "/v1/models": "List the models.",
    "/tokenizer_info": "Tell the special tokens and the chat template.",
    "/health": "Tell that the process lives.",
    "/ready": "Tell whether requests are taken.",
    "/version": "Tell the version.",
}


def document(
    bodies: Mapping[str, type[msgspec.Struct]], version: str, keyed: bool
) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of the API.

    ``bodies``: the type of the body of each path. ``keyed``: whether requests need an API key.
    """
    kinds = list(dict.fromkeys(bodies.values()))
    found, components = msgspec.json.schema_components(kinds, ref_template=_TEMPLATE)
    schema_of = dict(zip(kinds, found, strict=True))
    error = {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                },
            }
        },
    }
    refusals = {
        str(status): {
            "description": text,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
        }
        for status, text in _ERRORS.items()
    }
    answered = {
        "200": {
            "description": "The answer; server-sent events where stream is true.",
            "content": {
                "application/json": {"schema": {"type": "object"}},
                "text/event-stream": {"schema": {"type": "string"}},
            },
        }
    }
    paths: dict[str, Any] = {
        path: {
            "post": {
                "operationId": path.strip("/").replace("/", "_"),
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": schema_of[kind]}},
                },
                "responses": answered | refusals,
            }
        }
        for path, kind in bodies.items()
    }
    for path, summary in _GETS.items():
        paths[path] = {
            "get": {
                "operationId": "get_" + path.strip("/").replace("/", "_"),
                "summary": summary,
                "responses": answered | refusals,
            }
        }
    told: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "mtnlg_jax", "version": version},
        "paths": paths,
        "components": {"schemas": {**components, "Error": error}},
    }
    if keyed:
        told["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        told["security"] = [{"key": []}]
    return told
