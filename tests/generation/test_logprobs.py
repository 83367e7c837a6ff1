"""Test the log probabilities that come with the tokens of a text."""

import math

import pytest
from mlx_lm.utils import load_tokenizer

from flashmoe.catalog import DEMO, find
from flashmoe.engine import Engine
from flashmoe.errors import SettingError
from flashmoe.events import End, Logprobs, Text
from flashmoe.generation.logprobs import token_bytes
from flashmoe.requests import Request

ASK = [{"role": "user", "content": "Write a story about a dog."}]


@pytest.fixture(scope="module")
def engine():
    with Engine(find(DEMO)) as engine:
        yield engine


def answer(engine, **options):
    """Return the text, the Logprobs and the End of an answer."""
    options = {"max_tokens": 12, "temperature": 0} | options
    events = [*engine.stream(Request(ASK, **options))]
    text = "".join(e.text for e in events if isinstance(e, Text))
    return text, [e for e in events if isinstance(e, Logprobs)], events[-1]


def test_tokens_of_the_text_have_their_probabilities(engine):
    text, logprobs, end = answer(engine, logprobs=3)
    assert b"".join(e.token.data for e in logprobs).decode().strip() == text.strip()
    assert len(logprobs) == end.generated_tokens
    for event in logprobs:
        assert event.top[0] == event.token  # the likeliest one was taken
        values = [token.logprob for token in event.top]
        assert len(values) == 3
        assert sorted(values, reverse=True) == values
        assert sum(map(math.exp, values)) <= 1.00001
    assert answer(engine)[:2] == (text, [])
    _, plain, _ = answer(engine, logprobs=0)
    assert [e.token for e in plain] == [e.token for e in logprobs]
    assert not any(e.top for e in plain)


def test_forced_tokens_are_certain(engine):
    wanted = {"type": "regex", "pattern": "always the same [ab]"}
    text, logprobs, end = answer(engine, logprobs=2, response_format=wanted, think=False)
    assert "".join(e.token.text for e in logprobs) == text
    assert end.forced_tokens > 0
    certain = [e for e in logprobs if e.token.logprob == 0]
    assert len(certain) >= end.forced_tokens


def test_tokens_of_a_stop_string_have_none(engine):
    text, _, _ = answer(engine, max_tokens=30)
    word = text.split()[3]
    cut, fewer, end = answer(engine, logprobs=0, max_tokens=30, stop=(word,))
    assert isinstance(end, End)
    assert text.startswith(cut)
    assert "".join(e.token.text for e in fewer).strip() == cut.strip()


def test_tokens_of_the_reasoning_have_none(engine):
    text, logprobs, end = answer(engine, logprobs=0, think=True, thinking_budget=4, max_tokens=16)
    assert end.reasoning_tokens
    assert "".join(e.token.text for e in logprobs).strip() == text.strip()


def test_penalties_and_biases_change_the_answer(engine):
    text, logprobs, _ = answer(engine, max_tokens=24, logprobs=0)
    first = token_of(logprobs[0])
    assert not answer(engine, logit_bias={first: -100})[0].startswith(text[:3])
    _, same, _ = answer(engine, logit_bias={str(first): 100}, max_tokens=3, logprobs=0)
    assert [e.token.text for e in same] == [logprobs[0].token.text] * 3
    words = answer(engine, max_tokens=40)[0].split()
    varied = answer(engine, max_tokens=40, presence_penalty=2, frequency_penalty=2)[0].split()
    assert len(set(varied)) / len(varied) > len(set(words)) / len(words)


def token_of(event):
    tokenizer = load_tokenizer(find(DEMO))
    [token] = tokenizer.encode(event.token.text, add_special_tokens=False)
    return token


def test_bias_of_a_token_that_is_not_there_is_refused(engine):
    with pytest.raises(SettingError, match="logit_bias has the token 4000000: this model has"):
        answer(engine, logit_bias={4000000: 1})


def test_bytes_of_tokens_are_the_bytes_of_the_text():
    tokenizer = load_tokenizer(find(DEMO))
    text = "Été 日本 \U0001f600 <|im_end|> a\tb"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(token_bytes(tokenizer, token) for token in tokens).decode() == text
    assert token_bytes(tokenizer, 10**8) == b""
