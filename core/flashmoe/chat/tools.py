"""Check the tools of a request, its tool_choice, and the calls that a model makes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..checkpoint.json_files import show
from ..errors import SettingError
from . import json_schema as schemas
from .raw_values import may_be_text

#: Tool calls contain names without quotes, so a name must not look like a part of the format.
_NAME = re.compile(r"[^\s<>=\"'/\\{}]{1,128}")


@dataclass(frozen=True)
class Tool:
    """A function that the model may call.

    Attributes:
        parameters: the JSON schema of the arguments, an object without a reference at its top.
        definition: the complete definition, in the form that chat templates take.
        json_parameters: the names of the parameters that are written as JSON in all formats, since
            they are never strings.
    """

    name: str
    parameters: dict
    definition: dict
    json_parameters: frozenset[str] = frozenset()


def read_tools(definitions: list[dict]) -> dict[str, Tool]:
    """Check the tool definitions of a request, and return the tools by name.

    Raises:
        SettingError: names the tool and what is wrong with it.
    """
    tools: dict[str, Tool] = {}
    for definition in definitions:
        function = definition.get("function", definition) if isinstance(definition, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise SettingError(
                f"a tool has the name {show(name)}: use a name of 1 to 128 characters without "
                "spaces, quotes, slashes, braces, =, < and >"
            )
        if name in tools:
            raise SettingError(f"two tools are named {name!r}: rename one of them")
        parameters = function.get("parameters") or {"type": "object", "properties": {}}
        schemas.check_schema(parameters, f"the parameter schema of tool {name!r}")
        complete = {**function, "name": name, "parameters": parameters}
        schema = _object_schema(parameters, name)
        try:
            json_parameters = frozenset(
                parameter
                for parameter in schema.get("properties", {})
                if not may_be_text(schemas.property_schema(schema, parameter))
            )
        except RecursionError as e:
            raise SettingError(
                f"tool {name!r}: a parameter is defined by itself, or nested too deeply: use a "
                "flatter schema"
            ) from e
        definition = {"type": "function", "function": complete}
        tools[name] = Tool(name, schema, definition, json_parameters)
    return tools


def check_tool_choice(choice: str, tools: dict[str, Tool]) -> None:
    """Raise an error if the tools of the request do not allow its tool_choice.

    Raises:
        SettingError: there are no tools to choose from, or none of that name.
    """
    if choice in ("auto", "none"):
        return
    if not tools:
        raise SettingError(
            f"tool_choice={show(choice)} needs tools, and the request has none: add tools, or "
            "leave tool_choice out"
        )
    if choice != "required" and choice not in tools:
        raise SettingError(
            f"tool_choice={show(choice)} is neither auto, none, required nor the name of a tool: "
            f"the tools are {', '.join(tools)}"
        )


def call_error(name: str, arguments: dict, tools: dict[str, Tool]) -> str | None:
    """Return why a call cannot be made, in one line, or None if it can."""
    if name not in tools:
        known = _names(tools)
        return f"there is no tool {name!r}: the tools are {known}"
    error = schemas.validation_error(arguments, tools[name].parameters)
    return f"the arguments of {name} do not fit its schema: {error}" if error else None


def _names(tools: dict[str, Tool]) -> str:
    """Return the names of some tools for an error text."""
    names = [*tools][:20]
    return ", ".join([*names, "..."] if len(tools) > len(names) else names) or "none"


def _object_schema(parameters: dict, name: str) -> dict:
    """Return the parameter schema of a tool with the reference at its top resolved."""
    schema = schemas.resolve_reference(parameters)
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        kind = schema.get("type") if isinstance(schema, dict) else schema
        raise SettingError(
            f"the parameters of tool {name!r} have the type {kind!r}: their schema must be of type "
            "'object'"
        )
    if "$ref" in schema:
        raise SettingError(
            f"the parameters of tool {name!r} are {schema['$ref']!r}, a reference that cannot be "
            "followed: write the object in its place"
        )
    return {**schema, "type": "object"}
