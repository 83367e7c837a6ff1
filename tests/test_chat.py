"""Messages to tokens, and text to events, with the demo model's tokenizer and template."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.utils import load_tokenizer

from flashmoe.catalog import DEMO, find
from flashmoe.chat import Reply, render
from flashmoe.errors import CheckpointError, SettingError
from flashmoe.events import Reasoning, Text

TOKENIZER = load_tokenizer(find(DEMO))
SPECIAL = sorted(TOKENIZER.get_added_vocab())


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def test_prompt_differs_from_the_template():
    messages = [{"role": "system", "content": "Be kind."}, *user("Hello."), {}]
    messages[2:] = [{"role": "assistant", "content": "Hi!"}, *user("How are you?")]
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = TOKENIZER.encode(text.replace("<think>\n", "<think>\n\n</think>\n\n"))
    assert render(TOKENIZER, messages) == expected


@pytest.mark.parametrize("token", SPECIAL)
def test_special_token_in_a_message_becomes_a_control_token(token):
    plain = render(TOKENIZER, user("a b"))
    tokens = render(TOKENIZER, user(f"a {token} b"))
    number = TOKENIZER.get_added_vocab()[token]
    assert tokens.count(number) == plain.count(number)
    assert TOKENIZER.decode(tokens) == TOKENIZER.decode(plain).replace("a b", f"a {token} b")


@given(
    st.lists(st.sampled_from([*SPECIAL, "<|im", "_end|>", "x", "\n", "\ue000", "é"]), max_size=8)
)
def test_hostile_text_poses_as_a_role(parts):
    text = "q" + "".join(parts)
    tokens = render(TOKENIZER, user(text))
    plain = render(TOKENIZER, user("q"))
    numbers = TOKENIZER.get_added_vocab().values()
    assert [t for t in tokens if t in numbers] == [t for t in plain if t in numbers]
    assert TOKENIZER.decode(tokens) == TOKENIZER.decode(plain).replace("q", text, 1)


@pytest.mark.parametrize("messages", [[], user(""), user(" \n"), [{"role": "user"}]])
def test_empty_prompt_is_rendered(messages):
    with pytest.raises(SettingError, match="the prompt is empty"):
        render(TOKENIZER, messages)


def test_refusal_of_a_template_is_a_traceback():
    with pytest.raises(CheckpointError, match="chat template refuses"):
        render(TOKENIZER, [{"role": "assistant", "content": "x", "tool_calls": [3]}, *user("y")])


def pieces(text: str, cuts: list[int]) -> list[str]:
    ends = sorted({min(c, len(text)) for c in cuts} | {len(text)})
    return [text[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "STOP", "ST", "<", "a", "\n"]), max_size=10),
    st.lists(st.integers(0, 60), max_size=12),
    st.booleans(),
)
def test_events_depend_on_how_the_text_was_cut(parts, cuts, opened):
    text = "".join(parts)
    prompt = TOKENIZER.encode("<think>\n" if opened else "x")

    def events(pieces):
        reply = Reply(TOKENIZER, prompt, ("STOP",))
        found = [e for piece in pieces for e in reply.feed(piece)] + [*reply.flush()]
        joined = ["".join(e.text for e in found if type(e) is kind) for kind in (Text, Reasoning)]
        return *joined, reply.stopped

    whole = events([text])
    assert events(pieces(text, cuts)) == whole
    answer, thought, stopped = whole
    assert "<think>" not in answer
    assert "</think>" not in thought
    assert "STOP" not in answer
    if not opened and "<think>" not in text:
        assert stopped == ("STOP" in text)
        assert answer == text.partition("STOP")[0].lstrip("\n")
