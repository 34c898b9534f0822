"""How routes that read their own body describe it in /openapi.json."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route whose JSON body is `model`."""
    content = {"application/json": {"schema": model.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}


def upload_or_json_body(files_field: str, model: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route that takes an adapter's files, or `model` as JSON."""
    described = json_body(model)
    upload = {
        "type": "object",
        "required": ["id", files_field],
        "properties": {
            "id": {"type": "string"},
            "replace": {"type": "boolean", "default": False},
            files_field: {"type": "array", "items": {"type": "string", "format": "binary"}},
        },
    }
    described["requestBody"]["content"]["multipart/form-data"] = {"schema": upload}
    return described
