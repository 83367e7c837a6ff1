"""Schemas of structured output: pydantic 1 and 2, TypedDict, JSON schema, OpenAI functions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from langchain_core.utils.function_calling import convert_to_json_schema
from langchain_core.utils.pydantic import is_basemodel_subclass

from .errors import InvalidRequest


@dataclass(frozen=True)
class Schema:
    """name and description; json: the JSON schema; cls: the pydantic class that answers become, or
    None for dicts."""

    name: str
    description: str
    json: dict
    cls: type | None = None

    @classmethod
    def of(cls, schema: Any) -> Schema:
        """
        Raises:
            InvalidRequest: it is no schema in any of the known forms.
        """
        if isinstance(schema, type) and is_basemodel_subclass(schema):
            # Not LangChain's conversion: it writes out references, which may be endless.
            modern = hasattr(schema, "model_json_schema")
            return cls._named(schema.model_json_schema() if modern else schema.schema(), schema)
        if isinstance(schema, dict):
            function = schema.get("function", schema)
            if isinstance(function, dict) and isinstance(function.get("parameters"), dict):
                named = {"title": function.get("name"), "description": function.get("description")}
                return cls._named(named | function["parameters"])
            return cls._named(schema)
        try:
            return cls._named(convert_to_json_schema(schema))
        except (ValueError, TypeError) as e:
            raise InvalidRequest(
                f"{schema!r} is no schema: give a pydantic class, a TypedDict, a JSON schema or a "
                f"function as OpenAI describes it ({e})"
            ) from e

    @classmethod
    def _named(cls, json: dict, of: type | None = None) -> Schema:
        name = re.sub(r"[^\w.-]", "_", str(json.get("title") or "answer"))
        return cls(name, str(json.get("description") or ""), json, of)

    @property
    def tool(self) -> dict:
        """The schema as a function whose arguments are the answer."""
        function = {"name": self.name, "description": self.description, "parameters": self.json}
        return {"type": "function", "function": function}

    def make(self, value: Any) -> Any:
        """What a JSON value is to the user: an object of the class, or the value."""
        if self.cls is None:
            return value
        if hasattr(self.cls, "model_validate"):
            return self.cls.model_validate(value)
        return self.cls.parse_obj(value)
