"""Check the tools of a request, its tool_choice, and the calls that a model makes."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Any

from ..checkpoint.json_files import show
from ..errors import SettingError
from . import json_schema as schemas
from .object_variants import object_variants
from .raw_values import may_be_text
from .schema_rewrites import modern

log = logging.getLogger("flashmoe")

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
        variants: plain object schemas, one of which the arguments satisfy: `parameters` itself, or
            what its alternatives at the top allow; see `flashmoe.chat.object_variants`.
    """

    name: str
    parameters: dict
    definition: dict
    json_parameters: frozenset[str] = frozenset()
    variants: tuple[dict, ...] = ()

    def parameter_schemas(self, name: str) -> list[dict | bool]:
        """Return the standalone schemas that a parameter may have."""
        found: list[dict | bool] = []
        for variant in self.variants or (self.parameters,):
            if name in variant.get("properties", {}):
                schema = schemas.property_schema(variant, name)
                found += [] if schema in found else [schema]
        return found or [True]


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
        # Anthropic and MCP call it so.
        given = function.get("parameters") or function.get("input_schema")
        parameters = given or {"type": "object", "properties": {}}
        try:
            parameters = _without_odd_parts(modern(parameters), name)
        except RecursionError as e:
            raise SettingError(
                f"the parameter schema of tool {name!r} is nested too deeply: use a flatter schema"
            ) from e
        schemas.check_schema(parameters, f"the parameter schema of tool {name!r}")
        complete = {**function, "name": name, "parameters": given or parameters}
        complete.pop("input_schema", None)
        schema = _object_schema(parameters, name)
        try:
            variants = tuple(object_variants(schema))
            texts, listed = set(), set()
            for variant in variants:
                for parameter in variant.get("properties", {}):
                    listed.add(parameter)
                    if may_be_text(schemas.property_schema(variant, parameter)):
                        texts.add(parameter)
        except RecursionError as e:
            raise SettingError(
                f"tool {name!r}: a parameter is defined by itself, or nested too deeply: use a "
                "flatter schema"
            ) from e
        definition = {"type": "function", "function": complete}
        tools[name] = Tool(name, schema, definition, frozenset(listed - texts), variants)
    return tools


def _without_odd_parts(schema: Any, name: str) -> Any:
    """Return a parameter schema without what can neither be enforced nor checked.

    Agents send many tools with each request, and one odd schema must not stop all of them.
    """
    if isinstance(schema, dict) and (odd := schemas.unreadable_patterns(schema)):
        log.warning("tool %r: %s is not a regular expression: left out", name, show(odd[0]))
        schema = schemas.without_patterns(schema, odd)
    if isinstance(schema, dict) and schema.get("additionalProperties") is False:
        listed, required = schema.get("properties", {}), schema.get("required", [])
        if isinstance(listed, dict) and isinstance(required, list) and "$ref" not in schema:
            known = [r for r in required if not isinstance(r, str) or r in listed]
            plain = not {"anyOf", "oneOf", "allOf", "patternProperties"} & schema.keys()
            if plain and len(known) < len(required):
                log.warning("tool %r requires properties that it does not allow: left out", name)
                schema = {**schema, "required": known}
    return schema


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
