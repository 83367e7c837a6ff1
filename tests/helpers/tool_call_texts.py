"""Tool calls as models write them, the tools that they call, and the tokens of such texts."""

import json
import re

import pytest
from hypothesis import strategies as st
from mlx_lm.utils import load_tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from flashmoe.catalog import DEMO, find
from flashmoe.chat.special_tokens import SpecialTokens
from flashmoe.chat.tool_parsers import CoderCallParser, HermesCallParser
from flashmoe.chat.tools import read_tools

TOKENIZER = load_tokenizer(find(DEMO))
SPECIAL_TOKENS = SpecialTokens.from_tokenizer(TOKENIZER)

WORDS = {n: {"type": "string"} for n in "abc"}
TYPED = {
    "text": {"type": "string"},
    "count": {"type": "integer"},
    "ratio": {"type": "number"},
    "flag": {"type": "boolean"},
    "maybe": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
    "many": {"type": "array", "items": {"type": "string"}},
    "thing": {"type": "object"},
}
TOOLS = read_tools(
    [
        {"name": "words", "parameters": {"type": "object", "properties": WORDS}},
        {"name": "typed", "parameters": {"type": "object", "properties": TYPED}},
        {"name": "none"},
    ]
)


def coder(name, arguments):
    """Return the text of a call in the format of Qwen3.5, without the start and end markers."""
    body = ""
    for key, value in arguments.items():
        raw = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        body += f"<parameter={key}>\n{raw}\n</parameter>\n"
    return f"\n<function={name}>\n{body}</function>\n"


def hermes(name, arguments):
    """Return the text of a call in the format of Qwen3, without the start and end markers."""
    call = {"name": name, "arguments": arguments}
    return f"\n{json.dumps(call, ensure_ascii=False)}\n"


WRITERS = {CoderCallParser: coder, HermesCallParser: hermes}
BOTH = pytest.mark.parametrize("kind", [CoderCallParser, HermesCallParser], ids=["coder", "hermes"])


def read(kind, pieces, tools=TOOLS):
    """Feed the pieces of a call to a parser, and return its (name, arguments).

    The pieces of JSON that the parser gave on the way must add up to the arguments.
    """
    call = kind(tools)
    deltas = [piece for text in pieces for piece in call.feed(text)]
    name, arguments, rest = call.finish()
    assert call.name == name
    assert json.loads("".join([*deltas, rest])) == arguments
    return name, arguments


def cut(text, places):
    """Return the parts of a text that is cut at these places."""
    ends = sorted({min(p, len(text)) for p in places} | {len(text)})
    return [text[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]


CUTS = st.lists(st.integers(0, 200), max_size=8)
FRAGMENTS = ["</parameter>", "</function>", "<tool_call>", "\n", "a", " ", "<", '"', "\\", "{", "}"]
STRINGS = st.text(max_size=8) | st.lists(
    st.sampled_from([*FRAGMENTS, "é", "\U0001f600"]), max_size=6
).map("".join)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | STRINGS | st.floats(-1e9, 1e9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(STRINGS, inner, max_size=3),
    max_leaves=4,
)
VALUES = {
    "text": STRINGS,
    "count": st.integers(),
    "ratio": st.floats(allow_nan=False, allow_infinity=False),
    "flag": st.booleans(),
    "maybe": st.none() | st.integers(),
    "many": st.lists(STRINGS, max_size=3),
    "thing": st.dictionaries(STRINGS, JSON, max_size=3),
}
ARGUMENTS = st.fixed_dictionaries({}, optional=VALUES)


def unwritable(value):
    """Return whether the Coder format cannot write a value.

    It has no escapes, so a string cannot hold the end of a value.
    """
    return isinstance(value, str) and bool(
        re.search(r"(^|\n)</parameter>(\n|$)|</parameter>\s*</function>", value)
    )


LETTERS = bytes_to_unicode()


ADDED = TOKENIZER.get_added_vocab()
MARKERS = re.compile(f"({'|'.join(map(re.escape, ADDED))})")


def tokens_of(text, places=(), bytewise=False):
    """Return the tokens of a text that is cut at these places, or one token for each byte.

    Markers are one token in both cases.
    """
    tokens = []
    for part in MARKERS.split(text):
        if part in ADDED:
            tokens.append(ADDED[part])
        elif bytewise:
            tokens += TOKENIZER.convert_tokens_to_ids([LETTERS[b] for b in part.encode()])
        else:
            for piece in cut(part, places):
                tokens += TOKENIZER.encode(piece, add_special_tokens=False)
    return tokens
