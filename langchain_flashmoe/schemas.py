"""Schemas of structured output: pydantic 1 and 2, TypedDict, JSON schema, OpenAI functions; and
the parser that makes answers what the schema describes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.output_parsers import BaseCumulativeTransformOutputParser
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.utils.function_calling import convert_to_json_schema
from langchain_core.utils.json import parse_partial_json
from langchain_core.utils.pydantic import is_basemodel_subclass

from flashmoe import schemas

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


class SchemaParser(BaseCumulativeTransformOutputParser):
    """The answer of a message, by its schema. While it streams, what there is of it.

    Where LangChain's own parsers mend JSON that is cut short, or give None for a call that cannot
    be read, this one raises.

    Args:
        schema: None: any JSON object.
        from_call: the answer is the arguments of a call, not the text.
    """

    schema_: Schema | None = None
    from_call: bool = False

    @property
    def _type(self) -> str:
        return "flashmoe_schema"

    def parse(self, text: str) -> Any:
        return self.parse_result([ChatGeneration(message=AIMessage(text))])

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        """
        Raises:
            OutputParserException: the answer is not whole, or does not fit.
        """
        message = result[0].message
        under_way = isinstance(message, AIMessageChunk) and message.chunk_position != "last"
        if partial and under_way:
            try:
                value = self._partial(message)
                return None if value is None else self._made(value)
            except ValueError:
                return None
        try:
            return self._made(self._value(message))
        except (ValueError, RecursionError) as e:
            reason = message.response_metadata.get("finish_reason")
            ending = f" (finish_reason: {reason})" if reason else ""
            raise OutputParserException(
                f"there is no valid answer{ending}: {e}", llm_output=message.text
            ) from e

    def _made(self, value: Any) -> Any:
        return value if self.schema_ is None else self.schema_.make(value)

    def _partial(self, message: AIMessage) -> Any:
        if self.from_call:
            return message.tool_calls[0]["args"] if message.tool_calls else None
        return parse_partial_json(message.text) if message.text.strip() else None

    def _value(self, message: AIMessage) -> Any:
        if not self.from_call:
            return schemas.loads(message.text)
        if message.tool_calls:
            return message.tool_calls[0]["args"]
        broken = [call["error"] or call["args"] for call in message.invalid_tool_calls]
        raise ValueError("; ".join(map(str, broken)) or f"no call, but {message.text[:200]!r}")
