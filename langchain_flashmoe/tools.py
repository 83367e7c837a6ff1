"""Convert tools, tool choices and response formats into the form that the engine takes.

They are read in all forms that LangChain and OpenAI have for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.utils.function_calling import convert_to_openai_tool

from .errors import InvalidRequest
from .schemas import AnswerSchema

_WORDS = {"auto": "auto", "none": "none", "any": "required", "required": "required"}


def openai_tools(tools: Sequence[Any], strict: bool | None = None) -> list[dict]:
    """Return tools as {"type": "function", "function": {...}}.

    Raises:
        InvalidRequest: one of them is not a tool, or is run by a server.
    """
    converted = []
    for tool in tools:
        try:
            definition = convert_to_openai_tool(tool, strict=strict)
        except ValueError as e:
            raise InvalidRequest(f"{tool!r} cannot be used as a tool: {e}") from e
        if "function" not in definition:
            kind = definition.get("type")
            raise InvalidRequest(
                f"a tool of type {kind!r} runs on a server, and this model runs on this machine: "
                "leave it out"
            )
        # The model need not see `strict`: the grammar is strict in any case.
        function = {k: v for k, v in definition["function"].items() if k != "strict"}
        converted.append({"type": "function", "function": function})
    return converted


def engine_tool_choice(choice: Any, tools: Sequence[dict]) -> str:
    """Return a `tool_choice` as the engine takes it: "auto", "none", "required", or a tool's name.

    Args:
        choice: a tool_choice in any form.
        tools: the tools of the request, as `openai_tools` returns them.

    Raises:
        InvalidRequest: there is no tool of that name.
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
        f"tool_choice={choice!r} is neither auto, none, any, required, a bool, nor the name of a "
        f"tool: the tools are {', '.join(names) or 'none'}"
    )


def engine_response_format(wanted: Any) -> dict | None:
    """Return a `response_format` as the engine takes it.

    Args:
        wanted: OpenAI's form, the engine's own form, a class, or a JSON schema.

    Raises:
        InvalidRequest: it has none of these forms.
    """
    if wanted is None or (isinstance(wanted, dict) and wanted.get("type") == "text"):
        return None
    if isinstance(wanted, dict) and wanted.get("type") == "json_schema":
        inner = wanted.get("json_schema", wanted)
        if not isinstance(inner, dict) or "schema" not in inner:
            raise InvalidRequest(
                f"response_format={wanted!r} has no schema: add it as json_schema={{'schema': ...}}"
            )
        return {"type": "json_schema", "schema": inner["schema"]}
    if isinstance(wanted, dict) and wanted.get("type") in ("json_object", "regex", "lark"):
        return wanted
    return {"type": "json_schema", "schema": AnswerSchema.from_any(wanted).json_schema}


def openai_response_format(schema: AnswerSchema | None) -> dict:
    """Return a schema as OpenAI's response_format; None allows any JSON object."""
    if schema is None:
        return {"type": "json_object"}
    return {
        "type": "json_schema",
        "json_schema": {"name": schema.name, "schema": schema.json_schema},
    }
