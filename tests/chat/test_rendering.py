"""Test that a chat template ends within limits, whatever it does."""

import pytest
from mlx_lm.utils import load_tokenizer

from flashmoe.bounded import calls
from flashmoe.catalog import DEMO, find
from flashmoe.chat.rendering import render
from flashmoe.chat.special_tokens import SpecialTokens
from flashmoe.chat.template import ChatTemplate
from flashmoe.errors import CheckpointError, LimitError, SettingError

HELLO = [{"role": "user", "content": "Hello!"}]
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def rendered(template, messages=HELLO, **limits):
    (text,) = calls.call(render, template, [messages], None, [{}], **limits)
    return text


@pytest.mark.parametrize(
    ("template", "wrong"),
    [
        (LOOPS, "takes more than 0.5 seconds"),
        ("{% for i in range(9**9) %}{% endfor %}", "refuses the messages: Range too big"),
        ("{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}"
         "{% endfor %}", "memory|seconds"),
        ("{{ 'a' * 10**10 }}", "takes more than 0.25 GB of memory"),
        ("{{ 'a'.ljust(10**10) }}", "takes more than 0.25 GB of memory"),
        ("{{ '%10000000000d' % 1 }}", "memory|refuses"),
        ("{{ 9 ** (9 ** 9) }}", "takes more than 0.5 seconds"),
        ("{{ ('a' * 30 + 'b') | replace('', 'a' * 10**8) }}", "memory|seconds"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses the messages: maximum recur"),
        ("{{ ''.__class__.__mro__ }}", "refuses the messages: access to attribute '__class__'"),
        ("{{ raise_exception('x' * 10**6) }}", r"refuses the messages: x{297}\.\.\.$"),
        ("{{", "refuses the messages: unexpected 'end of template'"),
    ],
)  # fmt: skip
def test_template_is_ended_or_refused(template, wrong):
    with pytest.raises((LimitError, CheckpointError, SettingError), match=wrong) as caught:
        rendered(template, seconds=0.5, nbytes=256 << 20)
    assert len(str(caught.value)) < 500
    assert rendered("{{ messages[0].content }}") == "Hello!"


def test_prompt_without_an_end_is_refused():
    with pytest.raises(SettingError, match="writes 11000000 characters, more than 10000000"):
        rendered("{{ 'a' * 11000000 }}", seconds=20)


def chat_template(text):
    tokenizer = load_tokenizer(find(DEMO))
    tokenizer._tokenizer.chat_template = text
    return ChatTemplate(tokenizer, SpecialTokens.from_tokenizer(tokenizer))


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (LOOPS, "rendering the checkpoint's chat template takes more than .* shorten the messages"),
        ("", "the checkpoint's chat template writes nothing for these messages"),
        ("{{ undefined_function() }}", "refuses the messages: 'undefined_function' is undefined"),
    ],
)
def test_prompt_of_a_bad_template_is_an_error(text, wrong):
    with pytest.raises((CheckpointError, SettingError), match=wrong):
        chat_template(text).build_prompt(HELLO)
