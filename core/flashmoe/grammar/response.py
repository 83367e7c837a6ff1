"""Grammars that the answer must follow, as llguidance takes them: Lark rules with JSON schemas.

JSON is written with ", " and ": " and no other white space: a weak model given free white space
may write it for ever. A schema that llguidance cannot enforce whole is enforced as far as it can
be, and what comes out is held against the whole schema afterwards.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from functools import lru_cache

from llguidance import LLMatcher

from ..chat import json_schema as schemas
from ..errors import SettingError

log = logging.getLogger("flashmoe")

_LAYOUT = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}


@dataclass(frozen=True)
class Document:
    """A structured answer: the Lark rules of it (`start` is called `document`), and the schema
    that its JSON must satisfy, or None when it is no JSON."""

    rules: str
    schema: dict | bool | None


def document(wanted: dict) -> Document | None:
    """What `Request.response_format` asks for; None for plain text.

    Raises:
        SettingError: the schema or grammar is not one, or cannot be enforced.
    """
    kind = wanted["type"]
    if kind == "text":
        return None
    if kind == "regex":
        rules = f"document: DOCUMENT\nDOCUMENT: {regex(wanted['pattern'])}\n"
        _check(rules, "document", f"the pattern {wanted['pattern']!r}")
        return Document(rules, None)
    if kind == "lark":
        # Nested, so that its own `start` and names stay apart from ours.
        rules = f"document: %lark {{\n{wanted['grammar']}\n}}\n"
        _check(rules, "document", "the Lark grammar")
        return Document(rules, None)
    schema = {"type": "object"} if kind == "json_object" else wanted["schema"]
    schemas.check_schema(schema, "the schema of response_format")
    return Document(f"document: {json_rule(schema)}\n", schema)


def literal(text: str) -> str:
    """A Lark string for exactly this text."""
    return json.dumps(text)


def regex(pattern: str) -> str:
    """A Lark regex; slashes and line ends would end it."""
    escaped, backslash = "", False
    for c in pattern:
        escape = "" if backslash else "\\"
        escaped += {"/": f"{escape}/", "\n": f"{escape}n"}.get(c, c)
        backslash = c == "\\" and not backslash
    return f"/{escaped}/"


def json_rule(schema: dict | bool) -> str:
    """The Lark item for JSON that satisfies a schema, as far as that can be enforced.

    Raises:
        SettingError: nothing satisfies the schema, or llguidance cannot read it.
    """
    return _json_rule(json.dumps(schema))


@lru_cache(maxsize=256)
def _json_rule(text: str) -> str:
    schema = json.loads(text)
    if schema is False:
        raise SettingError("the schema is false: nothing satisfies it")
    for candidate in (schemas.closed(schema), schema):
        rule = _item(candidate)
        wrong = fault(f"start: {rule}\n")
        if wrong is None:
            return rule
    plain = schemas.without_patterns(schema, refuses_pattern)
    for candidate in (schemas.closed(plain), plain):
        rule = _item(candidate, lenient=True)
        if fault(f"start: {rule}\n") is None:
            log.warning("the grammar does not enforce the whole schema (%s)", wrong)
            return rule
    raise SettingError(f"the schema {text[:200]} cannot be enforced: {wrong}")


def _item(schema: dict | bool, lenient: bool = False) -> str:
    options = {**_LAYOUT, "lenient": True} if lenient else _LAYOUT
    return "%json " + json.dumps({**({} if schema is True else schema), "x-guidance": options})


@lru_cache(maxsize=256)
def refuses_pattern(pattern: str) -> bool:
    """Whether llguidance cannot hold strings to a `pattern` of JSON schema."""
    return fault(f"start: {_item({'type': 'string', 'pattern': pattern})}\n") is not None


def fault(lark: str) -> str | None:
    """What llguidance says against a grammar, in one line; None when nothing."""
    failed, messages = LLMatcher.validate_grammar_with_warnings(LLMatcher.grammar_from_lark(lark))
    if not failed:
        return None
    # The place in the grammar is left out: the grammar is ours, not the user's.
    text = re.split(r" \d+ \| ", " ".join(messages[0].split()))[0]
    return re.sub(r"^((at )?\d+\(\d+\): )*(failed to compile JSON schema: )?", "", text)


def _check(rules: str, start: str, what: str) -> None:
    wrong = fault(f"start: {start}\n{rules}")
    if wrong is not None:
        raise SettingError(f"{what} cannot be enforced: {wrong}")
