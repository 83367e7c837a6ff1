"""Read the schemas of structured output in all forms that LangChain takes.

The forms are classes of pydantic 1 and 2, TypedDicts, JSON schemas and functions of OpenAI.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from langchain_core.utils.function_calling import convert_to_json_schema
from langchain_core.utils.pydantic import is_basemodel_subclass

from .errors import InvalidRequest


@dataclass(frozen=True)
class AnswerSchema:
    """The schema of a structured answer.

    Attributes:
        name: the name of the class or function, "answer" if there is none.
        description: the description that the schema has, or "".
        json_schema: the JSON schema.
        model_class: the pydantic class of which answers become objects; None: they stay dicts.
    """

    name: str
    description: str
    json_schema: dict
    model_class: type[Any] | None = None

    @classmethod
    def from_any(cls, schema: Any) -> AnswerSchema:
        """Read a schema in any of the known forms.

        Raises:
            InvalidRequest: the schema has none of these forms.
        """
        if isinstance(schema, type) and is_basemodel_subclass(schema):
            return cls._named(_pydantic_schema(schema), schema)
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
                f"{schema!r} is not a schema: give a pydantic class, a TypedDict, a JSON schema or "
                f"a function definition of OpenAI ({e})"
            ) from e

    @classmethod
    def _named(cls, json_schema: dict, model_class: type[Any] | None = None) -> AnswerSchema:
        name = re.sub(r"[^\w.-]", "_", str(json_schema.get("title") or "answer"))
        return cls(name, str(json_schema.get("description") or ""), json_schema, model_class)

    @property
    def tool(self) -> dict:
        """The schema as a function whose arguments are the answer."""
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": self.json_schema,
        }
        return {"type": "function", "function": function}

    def build(self, value: Any) -> Any:
        """Return an object of the pydantic class for a JSON value, or the value without a class.

        Raises:
            ValueError: the class refuses the value.
        """
        if self.model_class is None:
            return value
        if hasattr(self.model_class, "model_validate"):
            return self.model_class.model_validate(value)
        return self.model_class.parse_obj(value)


def _pydantic_schema(model_class: type[Any]) -> dict:
    """Return the JSON schema of a class of pydantic 1 or 2.

    LangChain's conversion is not used: it replaces references by their targets, without end where
    a class refers to itself.
    """
    if hasattr(model_class, "model_json_schema"):
        return model_class.model_json_schema()
    return model_class.schema()
