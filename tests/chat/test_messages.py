"""messages.py: what callers write, as templates take it; and each thing that is refused."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.chat.messages import ROLES, for_template
from flashmoe.errors import SettingError

ASK = {"role": "user", "content": "q"}


def calls(*ids, name="f", **arguments):
    """A turn of the assistant with a call for each id."""
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": i, "function": function} for i in ids]}


def result(of, content="r"):
    return {"role": "tool", "tool_call_id": of, "content": content}


def refuses(messages, text):
    with pytest.raises(SettingError) as caught:
        for_template(messages)
    assert text in str(caught.value)


# What is refused.


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ({}, "message 1 is {}: it needs a role of system, developer, user"),
        ({"role": "robot"}, "message 1 is {'role': 'robot'}"),
        ({"role": None}, "message 1 is {'role': None}"),
        ({"role": ["user"]}, "message 1 is {'role': ['user']}"),
        ({"role": {}}, "message 1 is {'role': {}}"),
        ("hello", "message 1 is 'hello'"),
        (None, "message 1 is None"),
    ],
)
def test_message_without_a_known_role_passes(message, shown):
    refuses([ASK, message, ASK], shown)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (3, "message 0 has content 3: it must be text"),
        ({"type": "text"}, "message 0 has content {'type': 'text'}: it must be text"),
        (b"x", "message 0 has content b'x': it must be text"),
        ([{"type": "image_url"}], "message 0 holds a block of type 'image_url': these models"),
        ([{"type": "text"}], "message 0 holds a block of type 'text'"),
        ([{"type": "text", "text": 3}], "message 0 holds a block of type 'text'"),
        ([3], "message 0 holds a block of type 'int'"),
        ([None], "message 0 holds a block of type 'NoneType'"),
    ],
)
@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_content_that_is_no_text_passes(role, content, text):
    refuses([{"role": role, "content": content}, ASK], text)


def test_reasoning_that_is_no_text_passes():
    refuses([ASK, {**calls("a"), "reasoning_content": 3}, result("a")], "message 1 has content 3")


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (3, "message 1 has a tool call without a name: 3"),
        ({}, "without a name: {}"),
        ({"function": None}, "without a name"),
        ({"function": "f"}, "without a name"),
        ({"function": {"name": 3}}, "without a name"),
        (
            {"name": "f", "arguments": "{"},
            "message 1 calls f with arguments that are not JSON: '{'",
        ),
        ({"name": "f", "arguments": '{"a": NaN}'}, "NaN is not JSON"),
        ({"name": "f", "arguments": '{"a": 1e999}'}, "1e999 is not JSON"),
        ({"name": "f", "arguments": "[" * 10**5}, "arguments that are not JSON"),
        ({"name": "f", "arguments": "3"}, "message 1 calls f with arguments 3: they must be an"),
        ({"name": "f", "arguments": "null"}, "with arguments None: they must be an object"),
        ({"name": "f", "arguments": []}, "with arguments []: they must be an object"),
        ({"name": "f", "arguments": 0}, "with arguments 0: they must be an object"),
        ({"name": "f", "id": ["a"]}, "message 1 has ['a'] for the id of a call: give text"),
        ({"name": "f", "id": 3}, "message 1 has 3 for the id of a call"),
    ],
)
def test_call_that_cannot_be_written_passes(call, text):
    refuses([ASK, {"role": "assistant", "tool_calls": [call]}, ASK], text)


@pytest.mark.parametrize("value", [{"id": "a"}, "f", 3])
def test_calls_that_are_no_list_pass(value):
    refuses([ASK, {"role": "assistant", "tool_calls": value}, ASK], "message 1 has tool_calls")


def test_result_with_an_id_that_is_no_text_passes():
    refuses([ASK, calls("a"), result(["a"])], "message 2 has ['a'] for the id of a call")


LONG = "x" * 10**6


@pytest.mark.parametrize(
    "message",
    [
        {"role": LONG},
        {"role": "user", "content": {LONG: 1}},
        {"role": "user", "content": [{"type": LONG}]},
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": LONG}]},
        {"role": "tool", "tool_call_id": [LONG]},
    ],
    ids=["role", "content", "block", "arguments", "id"],
)
def test_long_value_floods_the_message_of_an_error(message):
    with pytest.raises(SettingError) as caught:
        for_template([message])
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "user"}],
        [{"role": "user", "content": ""}],
        [{"role": "user", "content": " \n"}],
        [{"role": "user", "content": []}],
        [{"role": "system", "content": "s"}],
        [ASK, {"role": "assistant", "content": "a"}, {"role": "user", "content": "\t"}],
        [{"role": "user", "content": ""}, {"role": "system", "content": "s"}],
    ],
)
def test_empty_prompt_passes(messages):
    refuses(messages, "the prompt is empty: give the model something to answer")


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "s"}]])
def test_last_message_of_the_assistant_is_answered(system):
    answer = {"role": "assistant", "content": "a"}
    refuses([ASK, answer, *system], "the last message is the assistant's own: end with a message")


def test_empty_result_of_a_tool_counts_as_an_empty_prompt():
    assert for_template([ASK, calls("a"), result("a", "")])[-1]["content"] == ""


# Roles and content.


@pytest.mark.parametrize("role", ["system", "developer"])
def test_system_in_the_middle_stays_there(role):
    messages = [{"role": role, "content": "one"}, ASK, {"role": "developer", "content": "two"}, ASK]
    assert for_template(messages) == [{"role": "system", "content": "one\n\ntwo"}, ASK, ASK]


@pytest.mark.parametrize("content", ["", None, []])
def test_empty_system_becomes_a_turn(content):
    assert for_template([{"role": "system", "content": content}, ASK]) == [ASK]
    messages = [{"role": "system", "content": c} for c in (content, "s", content)]
    assert for_template([*messages, ASK])[0] == {"role": "system", "content": "s"}


def test_human_is_no_user():
    assert for_template([{"role": "human", "content": "q"}]) == [ASK]


def test_blocks_of_text_are_not_joined():
    content = ["a", {"type": "text", "text": "b"}, {"text": "c"}, {"type": "text", "text": ""}]
    assert for_template([{"role": "user", "content": content}])[0]["content"] == "abc"
    answer = {"role": "assistant", "content": content, "reasoning_content": content}
    turn = for_template([ASK, answer, ASK])[1]
    assert turn == {"role": "assistant", "content": "abc", "reasoning_content": "abc"}


def test_messages_are_changed_in_place():
    messages = [ASK, calls("b", "a", x=[1]), result("a"), result("b"), ASK]
    before = json.dumps(messages)
    for_template(messages)
    assert json.dumps(messages) == before


@pytest.mark.parametrize(
    ("message", "content"),
    [
        ({"content": "no such file", "error": True}, "Error: no such file"),
        ({"content": "Error: no such file", "error": True}, "Error: no such file"),
        ({"content": "", "error": True}, "Error: "),
        ({"content": "fine", "error": False}, "fine"),
        ({"content": "fine", "error": None}, "fine"),
        ({"content": [{"text": "bad"}], "error": True}, "Error: bad"),
    ],
)
def test_failed_result_looks_like_a_good_one(message, content):
    found = for_template([ASK, calls("a"), {"role": "tool", "tool_call_id": "a", **message}])
    assert found[-1]["content"] == content


def test_result_brings_keys_of_an_answer_to_the_template():
    more = {"name": "f", "tool_calls": None, "reasoning_content": 3, "error": False}
    found = for_template([ASK, calls("a"), {**result("a"), **more}])[-1]
    assert found == {"role": "tool", "content": "r", "tool_call_id": "a", "name": "f"}


# Calls.


@pytest.mark.parametrize("arguments", [{"a": [1, None]}, '{"a": [1, null]}', ' {"a":[1,null]}\n'])
@pytest.mark.parametrize("nested", [False, True])
def test_arguments_are_no_dict_to_the_template(arguments, nested):
    function = {"name": "f", "arguments": arguments}
    call = {"id": "c", "function": function} if nested else {"id": "c", **function}
    turn = for_template([ASK, {"role": "assistant", "tool_calls": [call]}, result("c")])[1]
    inner = {"name": "f", "arguments": {"a": [1, None]}}
    assert turn["tool_calls"] == [{"id": "c", "type": "function", "function": inner, **inner}]


@pytest.mark.parametrize("arguments", [{}, {"arguments": None}, {"arguments": ""}])
def test_call_without_arguments_is_refused(arguments):
    turn = {"role": "assistant", "tool_calls": [{"name": "f", **arguments}]}
    assert for_template([ASK, turn, result(None)])[1]["tool_calls"][0]["arguments"] == {}


def test_big_integer_in_arguments_loses_digits():
    call = {"name": "f", "arguments": '{"a": 12345678901234567890123}'}
    turn = for_template([ASK, {"role": "assistant", "tool_calls": [call]}, ASK])[1]
    assert turn["tool_calls"][0]["arguments"] == {"a": 12345678901234567890123}


@pytest.mark.parametrize("found", [None, []])
def test_no_calls_become_a_list(found):
    turn = for_template([ASK, {"role": "assistant", "content": "x", "tool_calls": found}, ASK])[1]
    assert turn == {"role": "assistant", "content": "x"}


# The order of results.


def contents(messages):
    return [m["content"] for m in for_template(messages) if m["role"] == "tool"]


def test_results_come_in_the_order_of_arrival():
    messages = [ASK, calls("a", "b", "c"), *(result(i, i) for i in "cab")]
    assert contents(messages) == ["a", "b", "c"]


def test_order_of_one_round_is_that_of_another():
    """The ids are used again, as by servers that number the calls of an answer."""
    first = [ASK, calls("a", "b"), result("b", "1b"), result("a", "1a")]
    second = [calls("b", "a"), result("a", "2a"), result("b", "2b")]
    assert contents([*first, *second]) == ["1a", "1b", "2b", "2a"]
    later = [{"role": "assistant", "content": "x"}, ASK, *second]
    assert contents([*first, *later]) == ["1a", "1b", "2b", "2a"]


def test_unknown_result_takes_the_place_of_a_known_one():
    messages = [ASK, calls("a", "b"), result("z", "z"), result("b", "b"), result(None, "-")]
    assert contents([*messages, result("a", "a")]) == ["a", "b", "z", "-"]


def test_results_without_calls_are_lost_or_moved():
    assert contents([ASK, result("b", "1"), result("a", "2")]) == ["1", "2"]
    messages = [ASK, calls("a", "b"), ASK, result("b", "1"), result("a", "2")]
    assert contents(messages) == ["1", "2"]
    assert [m["role"] for m in for_template(messages)][1:] == ["assistant", "user", "tool", "tool"]


def test_results_of_calls_with_one_id_change_places():
    messages = [ASK, calls("a", "b", "a"), result("b", "b"), result("a", "1"), result("a", "2")]
    assert contents(messages) == ["b", "1", "2"]
    messages = [ASK, calls(None, None), result(None, "1"), result(None, "2")]
    assert contents(messages) == ["1", "2"]


def test_system_among_results_parts_them():
    system = {"role": "system", "content": "s"}
    messages = [ASK, calls("a", "b"), result("b", "b"), system, result("a", "a")]
    assert contents(messages) == ["a", "b"]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_shuffled_results_differ_from_ordered_ones(rounds, rng: random.Random):
    ordered, shuffled = [ASK], [ASK]
    for number, count in enumerate(rounds):
        ids = [f"{number}.{i}" for i in range(count)]
        results = [result(i, i) for i in ids]
        ordered += [calls(*ids), *results]
        shuffled += [calls(*ids), *rng.sample(results, count)]
    assert for_template(shuffled) == for_template(ordered)


# Anything at all.

ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.just('{"a": 1}'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
FUNCTION = st.fixed_dictionaries(
    {}, optional={"name": st.just("f") | ANY, "arguments": ANY, "id": st.just("a") | ANY}
)
CALL = st.one_of(ANY, FUNCTION, st.fixed_dictionaries({"function": FUNCTION | ANY, "id": ANY}))
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(sorted(ROLES)) | ANY,
        "content": st.text(max_size=4) | ANY,
        "reasoning_content": ANY,
        "tool_calls": st.lists(CALL, max_size=3) | ANY,
        "tool_call_id": st.just("a") | ANY,
        "error": ANY,
    },
)


@settings(max_examples=150, deadline=None)
@given(st.lists(MESSAGE | ANY, max_size=4))
def test_hostile_messages_raise_something_else(messages):
    try:
        found = for_template(messages)
    except SettingError:
        return
    assert all(isinstance(m["content"], str) for m in found)
    assert all(isinstance(c["arguments"], dict) for m in found for c in m.get("tool_calls", []))
    assert [m["role"] for m in found].count("system") <= (found[0]["role"] == "system")
