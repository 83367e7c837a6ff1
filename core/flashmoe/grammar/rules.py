"""Read what a request demands of its answer: its tools, its format, and the grammars of both.

Schemas, patterns and grammars come from clients, so all of this runs in a helper process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..bounded import calls
from ..chat.special_tokens import SpecialTokens
from ..chat.tools import Tool, check_tool_choice, read_tools
from ..errors import LimitError, SettingError
from ..requests import Request


@dataclass(frozen=True)
class OutputRules:
    """What the answer to a request must look like.

    Attributes:
        tools: the tools that may be called, by name.
        structured: the answer must have a response format.
        schema: the JSON schema of the response format; None where it has none.
        answer_grammar: the Lark grammar of the whole answer; None where there is none.
        call_grammar: the Lark grammar of a call after its start marker, in an answer without a
            grammar; None where there is none.
    """

    tools: dict[str, Tool] = field(default_factory=dict)
    structured: bool = False
    schema: dict | bool | None = None
    answer_grammar: str | None = None
    call_grammar: str | None = None


def output_rules(request: Request, special: SpecialTokens) -> OutputRules:
    """Return the rules of a request's answer.

    Raises:
        SettingError: a tool, the tool_choice or the response format is invalid, cannot be enforced,
            or takes too much time or memory to check.
    """
    demands = request.tool_choice, request.response_format, request.parallel_tool_calls
    if not request.tools and request.response_format is None:
        check_tool_choice(request.tool_choice, {})
        return OutputRules()
    markers = special.tool_parser, special.call_start, special.call_end
    rules = _bounded(_write, request.tools, *demands, request.constrain, *markers)
    return OutputRules(**{**rules, "tools": _tools(rules["tools"])})


def checked_tools(definitions: list[dict]) -> dict[str, Tool]:
    """Return the tools of a request by name.

    Raises:
        SettingError: a definition is invalid, or takes too much time or memory to check.
    """
    return _tools(_bounded(_read_tools, definitions)) if definitions else {}


def check_response_format(wanted: dict) -> None:
    """Check a response format without its tools.

    Raises:
        SettingError: it is invalid, cannot be enforced, or takes too much time or memory to check.
    """
    _bounded(_check_response_format, wanted)


def _bounded(function: Callable, *args: Any) -> Any:
    try:
        return calls.call(function, *args)
    except LimitError as e:
        raise SettingError(
            f"checking the tools and the response format {e}: use smaller and simpler schemas, "
            "patterns and grammars"
        ) from e


def _tools(written: list[list]) -> dict[str, Tool]:
    return {
        name: Tool(name, parameters, definition, frozenset(json_parameters), tuple(variants))
        for name, parameters, definition, json_parameters, variants in written
    }


# What follows runs in a helper process, where llguidance and jsonschema can be ended.


def _read_tools(definitions: list[dict]) -> list[list]:
    return [
        [t.name, t.parameters, t.definition, sorted(t.json_parameters), [*t.variants]]
        for t in read_tools(definitions).values()
    ]


def _check_response_format(wanted: dict) -> None:
    from .response import read_response_format

    read_response_format(wanted)


def _write(
    definitions: list[dict],
    choice: str,
    wanted: dict | None,
    parallel: bool,
    constrain: bool,
    tool_parser: str | None,
    call_start: int,
    call_end: int,
) -> dict[str, Any]:
    """Return the fields of `OutputRules` as JSON has them."""
    from .response import read_response_format  # late: llguidance is not needed by most requests
    from .tool_calls import tool_call_rules

    tools = read_tools(definitions)
    check_tool_choice(choice, tools)
    document = read_response_format(wanted) if wanted else None
    fields = {
        "tools": _read_tools(definitions),
        "structured": document is not None,
        "schema": document.schema if document is not None else None,
    }
    # ChatTemplate.build_prompt refuses tools where there is no parser.
    if not constrain or (tools and tool_parser is None):
        return fields
    rules, starts = "", []
    if tools and choice != "none":
        assert tool_parser is not None
        chosen = {choice: tools[choice]} if choice in tools else tools
        rules = tool_call_rules(chosen, tool_parser, call_start, call_end)
        if document is None and choice == "auto":
            return {**fields, "call_grammar": f"start: body\n{rules}"}
        several = parallel and choice not in tools
        starts.append('call ("\\n" call)*' if several else "call")
    if document is not None and (choice in ("auto", "none") or not tools):
        starts.append("document")
        rules += document.rules
    grammar = f"start: {' | '.join(starts)}\n{rules}" if starts else None
    return {**fields, "answer_grammar": grammar}
