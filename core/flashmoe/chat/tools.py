"""The tools of a request: their definitions, checked, and the calls that fit them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import SettingError
from . import json_schema as schemas

#: What formats write without quotes must not look like the format itself.
_NAME = re.compile(r"[^\s<>=\"'/\\{}]{1,128}")


@dataclass(frozen=True)
class Tool:
    """name, the JSON schema of its arguments, and the definition as a chat template takes it."""

    name: str
    parameters: dict
    definition: dict


def read_tools(definitions: list[dict]) -> dict[str, Tool]:
    """The tools of a request, by name.

    Raises:
        SettingError: names the tool and what is wrong with it.
    """
    tools: dict[str, Tool] = {}
    for definition in definitions:
        function = definition.get("function", definition) if isinstance(definition, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise SettingError(
                f"a tool has the name {name!r}: names are up to 128 characters without spaces, "
                "quotes, slashes, braces, = and <>"
            )
        if name in tools:
            raise SettingError(f"two tools are named {name!r}: rename one")
        parameters = function.get("parameters") or {"type": "object", "properties": {}}
        schemas.check_schema(parameters, f"the parameters of tool {name!r}")
        whole = {**function, "name": name, "parameters": parameters}
        tools[name] = Tool(name, _object(parameters, name), {"type": "function", "function": whole})
    return tools


def check_choice(choice: str, tools: dict[str, Tool]) -> None:
    """Refuse a tool_choice that the tools do not allow.

    Raises:
        SettingError
    """
    if choice in ("auto", "none"):
        return
    if not tools:
        raise SettingError(f"tool_choice={choice!r} needs tools, and the request has none")
    if choice != "required" and choice not in tools:
        raise SettingError(
            f"tool_choice={choice!r} is neither auto, none, required nor a tool: the tools are "
            f"{', '.join(tools)}"
        )


def fault(name: str, arguments: dict, tools: dict[str, Tool]) -> str | None:
    """Why a call cannot be made, in one line; None when it can."""
    if name not in tools:
        known = ", ".join(tools) or "none"
        return f"there is no tool {name!r}; the tools are: {known}"
    wrong = schemas.fault(arguments, tools[name].parameters)
    return f"the arguments of {name} do not fit its schema: {wrong}" if wrong else None


def _object(parameters: dict, name: str) -> dict:
    """The schema with the object at its top in plain sight."""
    found = schemas.resolved(parameters)
    if not isinstance(found, dict) or found.get("type", "object") != "object":
        raise SettingError(
            f"the parameters of tool {name!r} are of type "
            f"{found.get('type') if isinstance(found, dict) else found!r}: they must be an object"
        )
    if "$ref" in found:
        raise SettingError(
            f"the parameters of tool {name!r} are {found['$ref']!r}, which cannot be followed: "
            "write the object in its place"
        )
    return {**found, "type": "object"}
