"""What llguidance lets through, token by token, with the demo's tokenizer."""

from tool_call_texts import CONTROL, TOKENIZER, tokens_of

from flashmoe.grammar import response as grammars
from flashmoe.grammar.constraint import Matchers

MATCHERS = Matchers(TOKENIZER, CONTROL, len(TOKENIZER))
CALL_MARKERS = CONTROL.call_start, CONTROL.call_end


def accepts(lark, text, bytewise=False):
    """Whether a text is whole by a grammar."""
    matcher = MATCHERS.new(lark)
    taken = all(matcher.consume_token(t) for t in tokens_of(text, (), bytewise))
    return taken and matcher.is_accepting()


def document(kind, value):
    key = {"json_schema": "schema", "regex": "pattern", "lark": "grammar", "json_object": "x"}[kind]
    found = grammars.document({"type": kind, key: value})
    return f"start: document\n{found.rules}"
