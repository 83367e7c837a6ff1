"""Tools, the choice of them and formats of answers, in all forms of LangChain and OpenAI, as the
engine takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.utils.function_calling import convert_to_openai_tool

from .errors import InvalidRequest
from .schemas import Schema

_WORDS = {"auto": "auto", "none": "none", "any": "required", "required": "required"}


def openai_tools(tools: Sequence[Any], strict: bool | None = None) -> list[dict]:
    """Tools as {"type": "function", "function": {...}}.

    Raises:
        InvalidRequest: one of them is no tool.
    """
    found = []
    for tool in tools:
        try:
            definition = convert_to_openai_tool(tool, strict=strict)
        except ValueError as e:
            raise InvalidRequest(f"{tool!r} cannot be made a tool: {e}") from e
        if "function" not in definition:
            kind = definition.get("type")
            raise InvalidRequest(f"a tool of type {kind!r} runs on a server: leave it out")
        # Not for the model: the grammar is strict in any case.
        function = {k: v for k, v in definition["function"].items() if k != "strict"}
        found.append({"type": "function", "function": function})
    return found


def engine_choice(choice: Any, tools: Sequence[dict]) -> str:
    """A `tool_choice` as the engine takes it: "auto", "none", "required", or a name.

    Raises:
        InvalidRequest: it names no tool.
    """
    names = [tool["function"]["name"] for tool in tools]
    if choice is None:
        return "auto"
    if isinstance(choice, bool):
        return "required" if choice else "none"
    if isinstance(choice, dict):
        kind = choice.get("type", "function")
        if kind in _WORDS:
            return _WORDS[kind]
        inner = choice.get("function")
        choice = (inner if isinstance(inner, dict) else choice).get("name", choice)
    if isinstance(choice, str):
        if choice in names:
            return choice
        if choice in _WORDS:
            return _WORDS[choice]
    raise InvalidRequest(
        f"tool_choice={choice!r} is neither auto, none, any, required, a bool, nor a tool: the "
        f"tools are {', '.join(names) or 'none'}"
    )


def engine_format(wanted: Any) -> dict | None:
    """A `response_format` as the engine takes it: from OpenAI's form, the engine's own, a class or
    a JSON schema.

    Raises:
        InvalidRequest: it is none of these.
    """
    if wanted is None or (isinstance(wanted, dict) and wanted.get("type") == "text"):
        return None
    if isinstance(wanted, dict) and wanted.get("type") == "json_schema":
        inner = wanted.get("json_schema", wanted)
        if not isinstance(inner, dict) or "schema" not in inner:
            raise InvalidRequest(f"response_format={wanted!r} has no schema")
        return {"type": "json_schema", "schema": inner["schema"]}
    if isinstance(wanted, dict) and wanted.get("type") in ("json_object", "regex", "lark"):
        return wanted
    return {"type": "json_schema", "schema": Schema.of(wanted).json}


def response_format(schema: Schema | None) -> dict:
    """OpenAI's form of a schema; None: any JSON object."""
    if schema is None:
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": schema.name, "schema": schema.json}}
