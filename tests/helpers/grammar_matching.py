"""Matches texts with Lark grammars in llguidance, token by token of the demo's tokenizer."""

from tool_call_texts import SPECIAL_TOKENS, TOKENIZER, tokens_of

from flashmoe.grammar import response as grammars
from flashmoe.grammar.constraint import MatcherFactory

MATCHER_FACTORY = MatcherFactory(TOKENIZER, SPECIAL_TOKENS, len(TOKENIZER))
CALL_MARKERS = SPECIAL_TOKENS.call_start, SPECIAL_TOKENS.call_end


def accepts(lark, text, bytewise=False):
    """Return whether a grammar accepts a text from its beginning to its end.

    bytewise: give the text as one token for each byte, not as the tokenizer splits it.
    """
    matcher = MATCHER_FACTORY.create(lark)
    consumed = all(matcher.consume_token(t) for t in tokens_of(text, (), bytewise))
    return consumed and matcher.is_accepting()


def document(kind, value):
    """Return the Lark grammar of a response format, such as ("regex", pattern)."""
    key = {"json_schema": "schema", "regex": "pattern", "lark": "grammar", "json_object": "x"}[kind]
    response = grammars.read_response_format({"type": kind, key: value})
    return f"start: document\n{response.rules}"
