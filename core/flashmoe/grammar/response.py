"""Write the grammars of response formats for llguidance: Lark rules that contain JSON schemas.

JSON is written with ", " and ": " and no other white space, because a weak model that may write any
white space may write it for ever. A schema that llguidance cannot enforce completely is enforced as
far as possible, and the answer is validated against the complete schema afterwards.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from functools import lru_cache

from llguidance import LLMatcher

from ..chat import json_schema as schemas
from ..chat.schema_rewrites import enforceable, modern
from ..checkpoint.json_files import show
from ..errors import SettingError

log = logging.getLogger("flashmoe")

_LAYOUT = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}


@dataclass(frozen=True)
class ResponseFormat:
    """A format that the answer must have.

    Attributes:
        rules: the Lark rules of the format, of which the first one is called `document`.
        schema: the JSON schema that the answer must satisfy; None for regexes and Lark grammars.
    """

    rules: str
    schema: dict | bool | None


def read_response_format(wanted: dict) -> ResponseFormat | None:
    """Return the format that a `Request.response_format` asks for, or None for plain text.

    Args:
        wanted: a response_format that `flashmoe.requests.check_request` has checked.

    Raises:
        SettingError: the schema or grammar is invalid, or cannot be enforced.
    """
    kind = wanted["type"]
    if kind == "text":
        return None
    if kind == "regex":
        rules = f"document: DOCUMENT\nDOCUMENT: {lark_regex(wanted['pattern'])}\n"
        _check_rules(rules, f"the pattern {show(wanted['pattern'])}")
        return ResponseFormat(rules, None)
    if kind == "lark":
        # The grammar is nested, so that its `start` and other names do not clash with ours.
        rules = f"document: %lark {{\n{wanted['grammar']}\n}}\n"
        _check_rules(rules, "the Lark grammar")
        return ResponseFormat(rules, None)
    schema = wanted.get("schema") if kind == "json_object" else wanted["schema"]
    try:
        schema = modern({"type": "object"} if schema is None else schema)
    except RecursionError as e:
        raise SettingError(
            "the schema of response_format is nested too deeply: use a flatter schema"
        ) from e
    schemas.check_schema(schema, "the schema of response_format")
    return ResponseFormat(f"document: {json_rule(schema)}\n", schema)


def lark_string(text: str) -> str:
    """Return the Lark string that matches exactly this text."""
    return json.dumps(text)


def lark_regex(pattern: str) -> str:
    """Return a pattern as a Lark regex, in which slashes and line ends must be escaped."""
    escaped, backslash = "", False
    for c in pattern:
        escape = "" if backslash else "\\"
        escaped += {"/": f"{escape}/", "\n": f"{escape}n"}.get(c, c)
        backslash = c == "\\" and not backslash
    return f"/{escaped}/"


def json_rule(schema: dict | bool) -> str:
    """Return the Lark item for JSON that satisfies a schema, as far as that can be enforced.

    Raises:
        SettingError: no value satisfies the schema, or llguidance cannot read it.
    """
    return _json_rule(json.dumps(schema))


@lru_cache(maxsize=256)
def _json_rule(text: str) -> str:
    schema = enforceable(json.loads(text))
    if schema is False:
        raise SettingError("the schema is false, so no value satisfies it: use another schema")
    for candidate in (schemas.close_objects(schema), schema):
        rule = _json_item(candidate)
        error = grammar_error(f"start: {rule}\n")
        if error is None:
            return rule
    plain = schemas.drop_patterns(schema, is_unsupported_pattern)
    for candidate in (schemas.close_objects(plain), plain):
        rule = _json_item(candidate, lenient=True)
        if grammar_error(f"start: {rule}\n") is None:
            log.warning("the grammar cannot enforce the complete schema (%s)", error)
            return rule
    raise SettingError(f"the schema {text[:200]} cannot be enforced: {error}")


def _json_item(schema: dict | bool, lenient: bool = False) -> str:
    """Return llguidance's Lark item for a schema.

    Args:
        lenient: leave out what llguidance cannot enforce.
    """
    options = {**_LAYOUT, "lenient": True} if lenient else _LAYOUT
    keywords = schema if isinstance(schema, dict) else {}
    return "%json " + json.dumps({**keywords, "x-guidance": options})


@lru_cache(maxsize=256)
def is_unsupported_pattern(pattern: str) -> bool:
    """Return whether llguidance cannot enforce this `pattern` of a JSON schema."""
    return (
        grammar_error(f"start: {_json_item({'type': 'string', 'pattern': pattern})}\n") is not None
    )


def grammar_error(lark: str) -> str | None:
    """Return llguidance's error for a Lark grammar, in one line, or None if it has none."""
    failed, messages = LLMatcher.validate_grammar_with_warnings(LLMatcher.grammar_from_lark(lark))
    if not failed:
        return None
    # The place in the grammar is left out, because users have not seen this grammar.
    text = re.split(r" \d+ \| ", " ".join(messages[0].split()))[0]
    text = re.sub(r"^((at )?\d+\(\d+\): )*(failed to compile JSON schema: )?", "", text)
    return text if len(text) <= 500 else text[:497] + "..."


def _check_rules(rules: str, what: str) -> None:
    """Raise a SettingError that names `what` if llguidance cannot enforce the rules."""
    error = grammar_error(f"start: document\n{rules}")
    if error is not None:
        raise SettingError(f"{what} cannot be enforced: {error}")
