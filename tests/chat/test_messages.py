"""Test how messages of callers are checked and normalised for chat templates."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.chat.messages import ROLES, fold_system_messages, normalize_messages
from flashmoe.errors import SettingError

ASK = {"role": "user", "content": "q"}


def calls(*ids, name="f", **arguments):
    """Return a message of the assistant with one call for each id."""
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": i, "function": function} for i in ids]}


def result(of, content="r"):
    return {"role": "tool", "tool_call_id": of, "content": content}


SAID = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


def refuses(messages, text):
    with pytest.raises(SettingError) as caught:
        normalize_messages(messages)
    assert text in str(caught.value)


# Refused messages.


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ({}, "message 1 is {}: a message needs a role, one of system, developer, user"),
        ({"role": "robot"}, "message 1 is {'role': 'robot'}"),
        ({"role": None}, "message 1 is {'role': None}"),
        ({"role": ["user"]}, "message 1 is {'role': ['user']}"),
        ({"role": {}}, "message 1 is {'role': {}}"),
        ("hello", "message 1 is 'hello'"),
        (None, "message 1 is None"),
    ],
)
def test_message_without_a_known_role_is_refused(message, shown):
    refuses([ASK, message, ASK], shown)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (3, "message 0 has the content 3: give a string"),
        ({"type": "text"}, "message 0 has the content {'type': 'text'}: give a string"),
        (b"x", "message 0 has the content b'x': give a string"),
        ([{"type": "image_url"}], "message 0 has a block of type 'image_url': these models"),
        ([{"type": "text"}], "message 0 has a block of type 'text'"),
        ([{"type": "text", "text": 3}], "message 0 has a block of type 'text'"),
        ([3], "message 0 has a block of type 'int'"),
        ([None], "message 0 has a block of type 'NoneType'"),
    ],
)
@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_content_that_is_not_text_is_refused(role, content, text):
    refuses([{"role": role, "content": content}, ASK], text)


def test_reasoning_that_is_not_text_is_refused():
    refuses(
        [ASK, {**calls("a"), "reasoning_content": 3}, result("a")],
        "message 1 has the reasoning_content 3",
    )


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (3, "message 1 has a tool call without the name of a function: 3"),
        ({}, "without the name of a function: {}"),
        ({"function": None}, "without the name of a function"),
        ({"function": "f"}, "without the name of a function"),
        ({"function": {"name": 3}}, "without the name of a function"),
        ({"name": "f", "id": ["a"]}, "message 1 has the id ['a'] for a tool call: give a string"),
        ({"name": "f", "id": 3}, "message 1 has the id 3 for a tool call"),
    ],
)
def test_invalid_call_is_refused(call, text):
    refuses([ASK, {"role": "assistant", "tool_calls": [call]}, ASK], text)


@pytest.mark.parametrize("value", [{"id": "a"}, "f", 3])
def test_calls_that_are_not_a_list_are_refused(value):
    refuses([ASK, {"role": "assistant", "tool_calls": value}, ASK], "message 1 has the tool_calls")


def test_result_with_an_id_that_is_not_text_is_refused():
    refuses([ASK, calls("a"), result(["a"])], "message 2 has the id ['a'] for a tool call")


LONG = "x" * 10**6


@pytest.mark.parametrize(
    "message",
    [
        {"role": LONG},
        {"role": "user", "content": {LONG: 1}},
        {"role": "user", "content": [{"type": LONG}]},
        {"role": "assistant", "tool_calls": [{"name": 3, "arguments": LONG}]},
        {"role": "tool", "tool_call_id": [LONG]},
    ],
    ids=["role", "content", "block", "arguments", "id"],
)
def test_error_text_shortens_long_values(message):
    with pytest.raises(SettingError) as caught:
        normalize_messages([message])
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "user"}],
        [{"role": "user", "content": ""}],
        [{"role": "user", "content": " \n"}],
        [{"role": "user", "content": []}],
        [{"role": "system", "content": ""}],
        [ASK, {"role": "assistant", "content": "a"}, {"role": "user", "content": "\t"}],
        [{"role": "user", "content": ""}, {"role": "system", "content": ""}],
    ],
)
def test_empty_prompt_is_refused(messages):
    refuses(messages, "the prompt is empty: end with a message that the model can answer")


@pytest.mark.parametrize(
    "messages",
    [
        [SYSTEM],
        [SYSTEM, {"role": "user", "content": ""}],
        [SYSTEM, {"role": "user", "content": None}],
    ],
)
def test_system_message_alone_is_what_is_answered(messages):
    assert normalize_messages(messages) == [{"role": "user", "content": "s"}]


@pytest.mark.parametrize("start", [[], [SYSTEM]])
@pytest.mark.parametrize("rest", [[SAID], [calls("a"), result("a")]], ids=["answer", "call"])
def test_templates_get_a_message_of_the_user(start, rest):
    first, *others = normalize_messages([*start, *rest])
    assert first == {"role": "user", "content": "s" if start else ""}
    assert [m["role"] for m in others] == [m["role"] for m in rest]


def test_empty_message_after_a_late_system_message_is_dropped():
    messages = [ASK, SAID, SYSTEM, {"role": "user", "content": " "}]
    assert normalize_messages(messages) == [ASK, SAID, SYSTEM]


def test_empty_tool_result_is_accepted():
    assert normalize_messages([ASK, calls("a"), result("a", "")])[-1]["content"] == ""


# Roles and content.


@pytest.mark.parametrize("role", ["system", "developer"])
def test_system_messages_are_joined_at_the_start(role):
    messages = [{"role": role, "content": "one"}, {"role": "developer", "content": "two"}, ASK]
    assert normalize_messages(messages) == [{"role": "system", "content": "one\n\ntwo"}, ASK]


def test_late_system_messages_stay_where_they_stand():
    late = {"role": "developer", "content": "late"}
    messages = [SYSTEM, ASK, late, SAID, late, ASK]
    stays = {"role": "system", "content": "late"}
    assert normalize_messages(messages) == [SYSTEM, ASK, stays, SAID, stays, ASK]


def said_by_user(text):
    return {"role": "user", "content": text}


@pytest.mark.parametrize(
    ("messages", "folded"),
    [
        ([SYSTEM, ASK], [SYSTEM, ASK]),
        ([SYSTEM, ASK, SYSTEM], [SYSTEM, said_by_user("q\n\ns")]),
        ([ASK, SYSTEM, SYSTEM, ASK], [said_by_user("q\n\ns\n\ns"), ASK]),
        ([ASK, SAID, SYSTEM], [ASK, SAID, said_by_user("s")]),
        ([ASK, SAID, SYSTEM, ASK], [ASK, SAID, said_by_user("s\n\nq")]),
        ([ASK, SAID, SYSTEM, SYSTEM, SAID], [ASK, SAID, said_by_user("s\n\ns"), SAID]),
        (
            [ASK, calls("a"), result("a"), SYSTEM, SAID],
            [ASK, calls("a"), result("a"), said_by_user("s"), SAID],
        ),
    ],
)
def test_late_system_messages_become_text_of_the_user(messages, folded):
    assert fold_system_messages([{"content": "", **m} for m in messages]) == [
        {"content": "", **m} for m in folded
    ]


@given(st.lists(st.sampled_from([ASK, SAID, SYSTEM]), min_size=1, max_size=8))
def test_longer_conversation_keeps_the_folded_messages_before_an_answer(messages):
    """Otherwise the model would read them again in each turn."""
    ends = [i for i, m in enumerate(messages) if m is SAID]
    whole = fold_system_messages(messages)
    for end in ends:
        begun = fold_system_messages(messages[:end])
        assert whole[: len(begun)] == begun


@pytest.mark.parametrize("content", ["", None, []])
def test_empty_system_message_is_dropped(content):
    assert normalize_messages([{"role": "system", "content": content}, ASK]) == [ASK]
    messages = [{"role": "system", "content": c} for c in (content, "s", content)]
    assert normalize_messages([*messages, ASK])[0] == {"role": "system", "content": "s"}


def test_role_human_means_user():
    assert normalize_messages([{"role": "human", "content": "q"}]) == [ASK]


def test_text_blocks_are_joined():
    content = ["a", {"type": "text", "text": "b"}, {"text": "c"}, {"type": "text", "text": ""}]
    assert normalize_messages([{"role": "user", "content": content}])[0]["content"] == "abc"
    answer = {"role": "assistant", "content": content, "reasoning_content": content}
    turn = normalize_messages([ASK, answer, ASK])[1]
    assert turn == {"role": "assistant", "content": "abc", "reasoning_content": "abc"}


def test_messages_are_not_changed_in_place():
    messages = [ASK, calls("b", "a", x=[1]), result("a"), result("b"), ASK]
    before = json.dumps(messages)
    normalize_messages(messages)
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
def test_failed_result_starts_with_error(message, content):
    messages = normalize_messages(
        [ASK, calls("a"), {"role": "tool", "tool_call_id": "a", **message}]
    )
    assert messages[-1]["content"] == content


def test_result_keeps_only_the_keys_of_a_result():
    more = {"name": "f", "tool_calls": None, "reasoning_content": 3, "error": False}
    message = normalize_messages([ASK, calls("a"), {**result("a"), **more}])[-1]
    assert message == {"role": "tool", "content": "r", "tool_call_id": "a", "name": "f"}


# Calls.


@pytest.mark.parametrize("arguments", [{"a": [1, None]}, '{"a": [1, null]}', ' {"a":[1,null]}\n'])
@pytest.mark.parametrize("nested", [False, True])
def test_arguments_reach_the_template_as_a_dict(arguments, nested):
    function = {"name": "f", "arguments": arguments}
    call = {"id": "c", "function": function} if nested else {"id": "c", **function}
    turn = normalize_messages([ASK, {"role": "assistant", "tool_calls": [call]}, result("c")])[1]
    inner = {"name": "f", "arguments": {"a": [1, None]}}
    assert turn["tool_calls"] == [{"id": "c", "type": "function", "function": inner, **inner}]


@pytest.mark.parametrize("arguments", [{}, {"arguments": None}, {"arguments": ""}])
def test_call_without_arguments_has_an_empty_dict(arguments):
    turn = {"role": "assistant", "tool_calls": [{"name": "f", **arguments}]}
    assert normalize_messages([ASK, turn, result(None)])[1]["tool_calls"][0]["arguments"] == {}


def test_big_integer_in_arguments_keeps_all_digits():
    call = {"name": "f", "arguments": '{"a": 12345678901234567890123}'}
    turn = normalize_messages([ASK, {"role": "assistant", "tool_calls": [call]}, ASK])[1]
    assert turn["tool_calls"][0]["arguments"] == {"a": 12345678901234567890123}


@pytest.mark.parametrize("tool_calls", [None, []])
def test_empty_tool_calls_are_left_out(tool_calls):
    answer = {"role": "assistant", "content": "x", "tool_calls": tool_calls}
    turn = normalize_messages([ASK, answer, ASK])[1]
    assert turn == {"role": "assistant", "content": "x"}


# History is taken as it comes.


CUT = '{"path": "filter'
NOT_MADE = "The call was not made: its arguments are not complete JSON."


@pytest.mark.parametrize(
    "arguments",
    [CUT, "<function=f>\n<parameter=a>\n", '{"a": NaN}', '{"a": 1e999}', "3", "null", "[" * 10**5],
)
@pytest.mark.parametrize("nested", [False, True])
def test_call_whose_arguments_are_no_object_becomes_text(arguments, nested):
    function = {"name": "f", "arguments": arguments}
    call = {"id": "c", "type": "function", "function": function} if nested else function
    for content in ("", "So:"):
        answer = {"role": "assistant", "content": content, "tool_calls": [call]}
        turn = normalize_messages([ASK, answer, ASK])[1]
        text = f"[This call of f was not made: {arguments}]"
        assert turn == {"role": "assistant", "content": f"{content}\n\n{text}" if content else text}


@pytest.mark.parametrize("arguments", [[], 0, ["a"]])
def test_call_with_arguments_of_another_type_becomes_text(arguments):
    answer = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}
    assert "tool_calls" not in normalize_messages([ASK, answer, ASK])[1]


@pytest.mark.parametrize("name", ["f", None])
def test_call_with_an_error_becomes_text(name):
    call = {"id": "c", "name": name, "arguments": '{"a": 1}', "error": "no such tool"}
    turn = normalize_messages([ASK, {"role": "assistant", "tool_calls": [call]}, ASK])[1]
    assert turn["content"].endswith('was not made: {"a": 1}]')
    assert "tool_calls" not in turn


def test_result_of_a_call_that_became_text_says_so():
    answer = calls("good", "cut")
    answer["tool_calls"][1] = {"id": "cut", "function": {"name": "f", "arguments": CUT}}
    messages = [ASK, answer, result("cut", "Invalid JSON"), result("good")]
    _, turn, *results = normalize_messages(messages)
    assert [call["id"] for call in turn["tool_calls"]] == ["good"]
    assert [r["content"] for r in results] == ["r", f"Error: Invalid JSON\n\n{NOT_MADE}"]


@pytest.mark.parametrize("arguments", [" ", "\n\t"])
def test_blank_arguments_are_an_empty_dict(arguments):
    turn = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}
    assert normalize_messages([ASK, turn, ASK])[1]["tool_calls"][0]["arguments"] == {}


def test_half_a_surrogate_pair_in_arguments_is_replaced():
    turn = {
        "role": "assistant",
        "tool_calls": [{"name": "f", "arguments": '{"a\\ud83d": "\\ude00"}'}],
    }
    arguments = normalize_messages([ASK, turn, ASK])[1]["tool_calls"][0]["arguments"]
    assert arguments == {"a\ufffd": "\ufffd"}


@pytest.mark.parametrize(
    ("content", "thought", "rest"),
    [
        ("<think>\nhm\n</think>\n\ny", "hm", "y"),
        ("\n<think>hm</think>y", "hm", "y"),
        ("<think>a</think>\n<think>b</think>y", "a\n\nb", "y"),
        ("<think>\ncut off", "cut off", ""),
        ("[THINK]hm[/THINK]y", "hm", "y"),
        ("<think></think>\n\ny", None, "y"),
        ("y <think>hm</think>", None, "y <think>hm</think>"),
        ("so: </think>", None, "so: </think>"),
        ("  y", None, "  y"),
    ],
)
def test_thought_at_the_start_of_a_content_is_a_thought(content, thought, rest):
    answer = {"role": "assistant", "content": content}
    turn = normalize_messages([ASK, answer, ASK], ("[THINK]", "[/THINK]"))[1]
    assert (turn.get("reasoning_content"), turn["content"]) == (thought, rest)
    given = normalize_messages([ASK, {**answer, "reasoning_content": "own"}, ASK])[1]
    assert given["reasoning_content"] == "own"
    asked = normalize_messages([{"role": "user", "content": content}])[0]
    assert asked["content"] == content


def test_blocks_of_thoughts_and_refusals_are_taken_from_the_assistant():
    blocks = [
        {"type": "thinking", "thinking": "hm"},
        {"type": "refusal", "refusal": "No"},
        {"type": "output_text", "text": "."},
    ]
    turn = normalize_messages([ASK, {"role": "assistant", "content": blocks}, ASK])[1]
    assert turn == {"role": "assistant", "content": "No.", "reasoning_content": "hm"}
    refuses([{"role": "user", "content": blocks[:1]}], "a block of type 'thinking'")


# The order of results.


def contents(messages):
    return [m["content"] for m in normalize_messages(messages) if m["role"] == "tool"]


def test_results_are_put_in_the_order_of_their_calls():
    messages = [ASK, calls("a", "b", "c"), *(result(i, i) for i in "cab")]
    assert contents(messages) == ["a", "b", "c"]


def test_results_of_each_round_follow_the_calls_of_that_round():
    """Servers that number the calls of each answer use the same ids again in each round."""
    first = [ASK, calls("a", "b"), result("b", "1b"), result("a", "1a")]
    second = [calls("b", "a"), result("a", "2a"), result("b", "2b")]
    assert contents([*first, *second]) == ["1a", "1b", "2b", "2a"]
    later = [{"role": "assistant", "content": "x"}, ASK, *second]
    assert contents([*first, *later]) == ["1a", "1b", "2b", "2a"]


def test_unknown_results_follow_the_known_ones():
    messages = [ASK, calls("a", "b"), result("z", "z"), result("b", "b"), result(None, "-")]
    assert contents([*messages, result("a", "a")]) == ["a", "b", "z", "-"]


def test_results_without_calls_keep_their_order():
    assert contents([ASK, result("b", "1"), result("a", "2")]) == ["1", "2"]
    messages = [ASK, calls("a", "b"), ASK, result("b", "1"), result("a", "2")]
    assert contents(messages) == ["1", "2"]
    assert [m["role"] for m in normalize_messages(messages)][1:] == [
        "assistant",
        "user",
        "tool",
        "tool",
    ]


def test_results_with_the_same_id_keep_their_order():
    messages = [ASK, calls("a", "b", "a"), result("b", "b"), result("a", "1"), result("a", "2")]
    assert contents(messages) == ["b", "1", "2"]
    messages = [ASK, calls(None, None), result(None, "1"), result(None, "2")]
    assert contents(messages) == ["1", "2"]


def test_system_message_among_results_does_not_separate_them():
    system = {"role": "system", "content": "s"}
    messages = [ASK, calls("a", "b"), result("b", "b"), system, result("a", "a")]
    assert contents(messages) == ["a", "b"]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_shuffled_results_are_put_in_order(rounds, rng: random.Random):
    ordered, shuffled = [ASK], [ASK]
    for number, count in enumerate(rounds):
        ids = [f"{number}.{i}" for i in range(count)]
        results = [result(i, i) for i in ids]
        ordered += [calls(*ids), *results]
        shuffled += [calls(*ids), *rng.sample(results, count)]
    assert normalize_messages(shuffled) == normalize_messages(ordered)


# Arbitrary messages.

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
def test_hostile_messages_are_normalised_or_refused(messages):
    try:
        messages = normalize_messages(messages)
    except SettingError:
        return
    assert all(isinstance(m["content"], str) for m in messages)
    assert all(isinstance(c["arguments"], dict) for m in messages for c in m.get("tool_calls", []))
    folded = fold_system_messages(messages)
    assert "system" not in [m["role"] for m in folded[1:]]
    assert "user" in [m["role"] for m in messages]
