"""Tools of the Responses API, which become functions of chat completions, and back.

    function    the same, one level flatter
    custom      a function with one text, `input`; a grammar for it is described to the model
    namespace   functions of a group: the group's name is put before theirs

Other types (web_search, local_shell, ...) are tools that only OpenAI's service or a client's own
model has. They are left out: agents send them to every server.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from .openai_errors import invalid_field, short_repr

log = logging.getLogger("flashmoe")

_CUSTOM_SCHEMA = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
}


class ResponsesTools:
    """The tools of one request.

    Args:
        tools: the field `tools`.
        choice: the field `tool_choice`.

    Attributes:
        definitions: the tools as chat completions have them.
        choice: the tool_choice of chat completions.

    Raises:
        ApiError: 400, for a tool or choice that is not of the known form.
    """

    def __init__(self, tools: Any, choice: Any):
        self.definitions: list[dict] = []
        self._custom: set[str] = set()
        self._groups: dict[str, tuple[str, str]] = {}
        for tool in tools or ():
            self._add(tool, "")
        self.choice = self._choice(choice)

    def is_custom(self, name: str) -> bool:
        """Return whether the function of this name is a custom tool."""
        return name in self._custom

    def names(self, name: str) -> dict[str, str]:
        """Return the fields that name the function in a call: its name, and its group if any."""
        if name not in self._groups:
            return {"name": name}
        group, inner = self._groups[name]
        return {"name": inner, "namespace": group}

    def past_call(self, item: dict, text: Any) -> dict:
        """Return a call of the conversation in the form of chat completions.

        Args:
            text: its arguments, or the input of a custom tool.
        """
        name = item.get("name")
        if item.get("type") == "custom_tool_call":
            text = json.dumps({"input": text})
        if isinstance(item.get("namespace"), str) and isinstance(name, str):
            name = _joined(item["namespace"], name)
        function = {"name": name, "arguments": text}
        return {"id": item.get("call_id"), "type": "function", "function": function}

    def _add(self, tool: Any, group: str) -> None:
        kind = tool.get("type") if isinstance(tool, dict) else None
        if not isinstance(kind, str):
            raise invalid_field("tools", f"{short_repr(tool)} is not a tool: it needs a type")
        if kind == "namespace" and not group and isinstance(tool.get("tools"), list):
            for inner in tool["tools"]:
                self._add(inner, str(tool.get("name", "")))
            return
        if kind not in ("function", "custom"):
            log.warning("a tool of type %s is left out", short_repr(kind))
            return
        name = tool.get("name")
        function = {"name": name, "description": tool.get("description") or ""}
        if group and isinstance(name, str):
            function["name"] = _joined(group, name)
            self._groups[function["name"]] = group, name
        if kind == "custom":
            self._custom.add(str(function["name"]))
            function["parameters"] = _CUSTOM_SCHEMA
            wanted = tool.get("format")
            if isinstance(wanted, dict) and isinstance(wanted.get("definition"), str):
                syntax = wanted.get("syntax", "grammar")
                function["description"] += (
                    f"\n\nThe input must match this {syntax}:\n{wanted['definition']}"
                )
        else:
            function["parameters"] = tool.get("parameters")
        function = {k: v for k, v in function.items() if v is not None}
        self.definitions.append({"type": "function", "function": function})

    def _choice(self, choice: Any) -> Any:
        if not isinstance(choice, dict):
            return choice
        kind = choice.get("type")
        if kind in ("function", "custom"):
            return {"type": "function", "function": {"name": choice.get("name")}}
        if kind == "allowed_tools" and isinstance(choice.get("tools"), list):
            allowed = [t.get("name") for t in choice["tools"] if isinstance(t, dict)]
            self.definitions = [t for t in self.definitions if t["function"].get("name") in allowed]
            return choice.get("mode", "auto")
        raise invalid_field(
            "tool_choice",
            f"tool_choice={short_repr(choice)} is not supported: use auto, none, required, or an "
            'object such as {"type": "function", "name": ...}',
        )


def _joined(group: str, name: str) -> str:
    """Return the name of a function in a group, for the model."""
    return f"{group}{name}" if group.endswith("_") else f"{group}__{name}"
