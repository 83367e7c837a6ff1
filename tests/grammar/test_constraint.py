"""Test that answers under a grammar fit the request at any bit width, or end in an error."""

import json
import re

import mlx.core as mx
import pytest
from example_tools import ADD
from grammar_matching import MATCHER_FACTORY
from mlx_lm.utils import load_tokenizer
from schemas import outcome, random_root, requantise_experts, request_of
from tool_call_texts import TOKENIZER
from toys import write_chat_toy

from flashmoe.catalog import DEMO, find
from flashmoe.chat.special_tokens import SpecialTokens
from flashmoe.chat.tools import read_tools
from flashmoe.engine import Engine
from flashmoe.errors import OutputError, SettingError
from flashmoe.events import End, Reasoning, Text, ToolCall, ToolCallStart
from flashmoe.grammar.constraint import Constraint, MatcherFactory
from flashmoe.grammar.numbers import NumberGuard
from flashmoe.grammar.rules import output_rules
from flashmoe.requests import Request


@pytest.fixture(scope="module")
def two_bits(tmp_path_factory):
    path = requantise_experts(find(DEMO), tmp_path_factory.mktemp("low") / "demo", 2)
    with Engine(path, slots=64) as engine:
        yield engine


def ask(engine, text="Hello.", **options):
    """Return the text, the tool calls, all events and the `End` of one greedy answer."""
    options = {"temperature": 0.0, "max_tokens": 120} | options
    events = [*engine.stream(Request([{"role": "user", "content": text}], **options))]
    assert isinstance(events[-1], End)
    calls = [e for e in events if isinstance(e, ToolCall)]
    return "".join(e.text for e in events if isinstance(e, Text)), calls, events, events[-1]


def schema(schema: dict | bool) -> dict:
    return {"type": "json_schema", "schema": schema}


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
}
NOW = {"name": "now", "description": "The time now"}


@pytest.mark.parametrize("kind", ["schema", "tool"])
def test_answer_fits_a_random_schema(engine, two_bits, kind):
    """benchmarks/schemas.py runs 200 random schemas, and shows the rate without a grammar."""
    for which, which_engine in (("4 bits", engine), ("2 bits", two_bits)):
        counts = {"valid": 0, "cut short": 0}
        for seed in range(1000, 1007):
            root = random_root(seed)
            request = request_of(root, kind, seed, constrain=True, max_tokens=80)
            result, _ = outcome(which_engine, request, root)
            assert result in counts, f"{result} at {which}, seed {seed}: {json.dumps(root)}"
            counts[result] += 1
        assert counts["valid"] >= 4


def test_two_bit_checkpoint_reports_two_bits(two_bits):
    assert ask(two_bits, max_tokens=3)[-1].bits == 2


def test_document_cut_short_raises_output_error(engine):
    with pytest.raises(OutputError, match=r"cut short: max_tokens=6 was reached"):
        ask(engine, response_format=schema(PERSON), max_tokens=6)
    with pytest.raises(OutputError, match="a stop string ended the answer"):
        ask(engine, response_format=schema(PERSON), stop=("age",))
    with pytest.raises(OutputError, match="inside the reasoning"):
        ask(engine, response_format=schema(PERSON), think=True, max_tokens=4)


def test_model_may_reason_before_a_document(engine):
    text, _, events, end = ask(
        engine, "Who is Anna?", response_format=schema(PERSON), think=True, thinking_budget=20
    )
    assert "".join(e.text for e in events if isinstance(e, Reasoning))
    assert end.reasoning_tokens >= 5
    value = json.loads(text)
    assert sorted(value) == ["age", "name"]
    assert text == json.dumps(value, ensure_ascii=False), "white space is not flexible"


def test_forced_tokens_take_no_steps(engine):
    _, _, _, end = ask(engine, response_format=schema(PERSON))
    assert end.forced_tokens >= 6
    assert end.steps == end.generated_tokens - end.forced_tokens


def test_forced_tokens_count_towards_max_tokens(engine):
    whole = ask(engine, response_format=schema(PERSON))[0]
    for limit in (1, 2, 3):
        events = []
        request = Request(
            [{"role": "user", "content": "Hello."}],
            response_format=schema(PERSON),
            temperature=0.0,
            max_tokens=limit,
        )
        with pytest.raises(OutputError):
            events.extend(engine.stream(request))
        text = "".join(e.text for e in events if isinstance(e, Text))
        assert whole.startswith(text)
        assert len(text) < 8 * limit


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        ({"type": "json_object"}, r"\{.*\}"),
        ({"type": "regex", "pattern": r"(yes|no), \d{2}/\d{2}"}, r"(yes|no), \d{2}/\d{2}"),
        ({"type": "lark", "grammar": 'start: A ("+" A){2}\nA: /[0-9]{1,2}/'}, r"\d+\+\d+\+\d+"),
        (schema({"enum": ["red", "green"]}), r'"(red|green)"'),
        (schema(True), r".+"),
    ],
)
def test_answer_fits_the_response_format(engine, wanted, pattern):
    try:
        text = ask(engine, response_format=wanted, temperature=1.0, seed=5)[0]
    except OutputError:
        assert wanted["type"] == "json_object" or wanted == schema(True)
        return
    assert re.fullmatch(pattern, text)


def test_text_format_leaves_the_answer_unconstrained(engine):
    assert ask(engine, response_format={"type": "text"})[0] == ask(engine)[0]


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"type": "yaml"}, "type is one of text, json_object"),
        ({"type": "regex"}, "has no valid 'pattern'"),
        ({"type": "regex", "pattern": "(?=a)"}, "look-ahead"),
        ({"type": "lark", "grammar": "start: A"}, 'unknown name: "A"'),
        (schema({"type": "strng"}), "not a valid JSON schema: at type"),
        (schema(False), "no value satisfies it"),
        (schema({"type": "integer", "minimum": 3, "maximum": 2}), "Unsatisfiable"),
        (schema({"$ref": "http://example.com/schema"}), "not fetch"),
    ],
)
def test_bad_response_format_raises_setting_error(engine, wanted, words):
    with pytest.raises(SettingError, match=re.escape(words)):
        ask(engine, response_format=wanted)


def test_keyword_outside_the_grammar_is_checked_afterwards(engine, caplog):
    """The grammar leaves the keyword out with a warning; the whole answer is checked against it."""
    unique = {"type": "array", "items": {"const": 7}, "minItems": 2, "maxItems": 2}
    assert ask(engine, response_format=schema(unique))[0] == "[7, 7]"
    with pytest.raises(OutputError, match=r"non-unique elements.*'uniqueItems'"):
        ask(engine, response_format=schema({**unique, "uniqueItems": True}))
    assert 'Unimplemented keys: ["uniqueItems"]' in caplog.text


def test_tool_choice_is_obeyed(engine):
    tools = [ADD, NOW]
    _, calls, events, end = ask(engine, tools=tools, tool_choice="required")
    assert calls
    assert {c.name for c in calls} <= {"add", "now"}
    assert all(c.error is None for c in calls)
    assert end.finish_reason == "tool_calls"
    for name in ("add", "now"):
        _, calls, events, _ = ask(engine, tools=tools, tool_choice=name)
        assert [c.name for c in calls] == [name]
        assert [type(e) for e in events].count(ToolCallStart) == 1
    question = "What is 3 plus 4? Use the tool."
    _, (call,), _, end = ask(engine, question, tools=[ADD])
    assert call.arguments == {"a": 3, "b": 4}
    assert (end.generated_tokens, end.steps) == (25, 6), "the README says so"
    assert ask(engine, question, tools=[ADD], tool_choice="none")[1] == []


def test_model_may_reason_before_a_required_call(engine):
    _, (call,), events, end = ask(
        engine, "What is 8 plus 9?", tools=[ADD], tool_choice="add", think=True, thinking_budget=30
    )
    assert call.error is None
    assert end.reasoning_tokens >= 5
    assert any(isinstance(e, Reasoning) for e in events)


def test_parallel_calls_are_numbered_and_can_be_disabled(tmp_path):
    """A model with random weights calls several times for some seeds; the demo never does."""
    options = {"tools": [ADD], "tool_choice": "required", "max_tokens": 400, "temperature": 1.0}
    path = write_chat_toy(tmp_path / "toy", num_experts=12)
    with Engine(path, slots=12, prompt_store=0) as engine:
        answers = [ask(engine, "Add.", seed=seed, **options) for seed in range(6)]
        most = max(answers, key=lambda answer: len(answer[1]))
        _, calls, events, _ = most
        assert len(calls) > 1, "no answer has several calls: the test needs other seeds"
        assert [c.index for c in calls] == list(range(len(calls)))
        assert len({c.id for c in calls}) == len(calls)
        starts = [e.index for e in events if isinstance(e, ToolCallStart)]
        assert starts == list(range(len(calls)))
        seed = answers.index(most)
        _, calls, _, _ = ask(engine, "Add.", seed=seed, parallel_tool_calls=False, **options)
        assert len(calls) == 1


def test_call_cut_short_is_reported_with_its_error(engine):
    _, (call,), _, end = ask(engine, tools=[ADD], tool_choice="add", max_tokens=14)
    assert call.arguments is None
    assert "max_tokens=14 was reached" in call.error
    assert "<function=add>" in call.text
    assert end.finish_reason == "length"


def test_call_without_tools_stays_out_of_the_text(engine):
    """The demo was trained to call tools, so it tries to even if the request has none."""
    messages = [
        {"role": "user", "content": "What is 3 plus 4? Use the tool add."},
        {"role": "assistant", "tool_calls": [{"id": "1", "name": "add", "arguments": {"a": 3}}]},
        {"role": "tool", "tool_call_id": "1", "content": "7"},
        {"role": "user", "content": "What is 5 plus 6? Use the tool add."},
    ]
    events = [*engine.stream(Request(messages, temperature=0.0, max_tokens=60))]
    text = "".join(e.text for e in events if isinstance(e, Text))
    assert "tool_call>" not in text
    for call in (e for e in events if isinstance(e, ToolCall)):
        assert "there is no tool" in call.error


def test_response_format_and_tools_work_together(engine):
    options = {"tools": [ADD], "response_format": schema(PERSON)}
    _, calls, _, _ = ask(engine, "What is 3 plus 4? Use the tool.", **options)
    assert calls[0].arguments == {"a": 3, "b": 4}
    text, calls, _, _ = ask(engine, "Who is Anna?", tool_choice="none", **options)
    assert calls == []
    assert set(json.loads(text)) == {"name", "age"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tool_choice": "required"}, "needs tools"),
        ({"tools": [ADD], "tool_choice": "sub"}, "the tools are add"),
        ({"tools": [ADD, ADD]}, "two tools are named 'add'"),
        ({"tools": [{"name": "a b"}]}, "without spaces"),
        ({"tools": [3]}, "a tool has the name None"),
        (
            {"tools": [{"name": "f", "parameters": {"type": "strng"}}]},
            "the parameter schema of tool 'f'",
        ),
        ({"tools": [{"name": "f", "parameters": {"type": "array"}}]}, "must be of type 'object'"),
        ({"thinking_budget": -1}, "thinking_budget=-1"),
        ({"repetition_penalty": -1.0}, "repetition_penalty=-1"),
        ({"stop": "x"}, "a tuple of strings"),
    ],
)
def test_bad_option_raises_setting_error(engine, options, words):
    with pytest.raises(SettingError, match=re.escape(words)):
        ask(engine, **options)


def test_prompt_longer_than_the_context_is_refused(engine):
    with pytest.raises(SettingError, match=r"the prompt has \d{4,} tokens.* is 4096"):
        ask(engine, "word " * 5000)


def test_repetition_penalty_changes_the_answer(engine):
    plain = ask(engine, "Tell me a story.", max_tokens=60)[0]
    assert ask(engine, "Tell me a story.", max_tokens=60, repetition_penalty=1.4)[0] != plain


def test_number_ends_after_forty_digits(engine):
    """Under greedy decoding the demo would otherwise write nines until max_tokens."""
    endless = {
        "type": "object",
        "properties": {"age": {"type": "integer"}, "size": {"type": "number"}},
        "required": ["age", "size"],
    }
    for wanted in ({"type": "integer"}, {"type": "number"}, endless):
        text = ask(engine, "Count.", response_format=schema(wanted), max_tokens=250)[0]
        assert max(map(len, re.findall(r"\d+", text))) <= 40
        json.loads(text)
    tool = {"name": "save", "parameters": endless}
    (call,) = ask(engine, tools=[tool], tool_choice="save", max_tokens=250)[1]
    assert call.error is None


def test_forced_end_cut_off_by_max_tokens_raises_output_error(engine):
    """A regex answer is not checked against a schema afterwards, so the cut itself must raise."""
    wanted = {"type": "regex", "pattern": "(yes|no), and that is all there is to say about it"}
    whole = ask(engine, response_format=wanted)[3]
    for limit in (2, whole.generated_tokens - 1):
        with pytest.raises(OutputError, match="cut short"):
            ask(engine, response_format=wanted, max_tokens=limit)
    end = ask(engine, response_format=wanted, max_tokens=whole.generated_tokens)[3]
    assert end.finish_reason == "stop"


def test_generated_number_is_finite(engine):
    for seed in range(4):
        wanted = schema({"type": "number"})
        text = ask(engine, "1E444", response_format=wanted, temperature=1.5, seed=seed)[0]
        assert abs(json.loads(text)) < 1e340
        assert json.loads(text) not in (float("inf"), float("-inf"))


def test_generated_number_stays_below_an_exclusive_maximum(engine):
    """A number with more nines than a float has digits would round up to the bound."""
    wanted = {"type": "number", "minimum": 83, "exclusiveMaximum": 84}
    for seed in range(6):
        text = ask(engine, "9" * 30, response_format=schema(wanted), temperature=1.0, seed=seed)[0]
        assert 83 <= json.loads(text) < 84


def guard(text: str, pieces: int = 1, tools=None) -> NumberGuard:
    """Return a guard that has been fed `text` in pieces of `pieces` characters."""
    number_guard = NumberGuard(tools)
    for start in range(0, len(text), pieces):
        number_guard.feed(text[start : start + pieces])
    return number_guard


@pytest.mark.parametrize("pieces", [1, 3, 1000])
def test_number_guard_limits_digits_of_numbers_but_not_of_text(pieces):
    many = "1" * 40
    assert guard(f'{{"a": {many}', pieces).digits_left == 0
    assert guard(f'{{"a": {many[1:]}', pieces).digits_left > 0
    assert guard('{"a": -3.' + many[:14], pieces).digits_left == 0
    assert guard('{"a": -3.' + many[:13], pieces).digits_left > 0
    for exponent, digits in (("", 2), ("1", 1), ("29", 1), ("30", 0), ("299", 0), ("-12", 1)):
        assert guard('{"a": [3.1, 7, 0.5e' + exponent, pieces).digits_left == digits
    assert guard('{"a": 3.11111111111111, "e1": 2', pieces).digits_left > 0
    assert guard(f'{{"a": "{many}', pieces).digits_left > 0
    assert guard(f'{{"a": "\\"{many}', pieces).digits_left > 0
    assert guard(f'{{"a": "\\\\", "b": {many}', pieces).digits_left == 0
    number = {"type": ["integer", "null"]}
    text = {"anyOf": [{"type": "string"}, {"type": "integer"}]}
    listed = {"type": "array", "items": {}}
    properties = {"number": number, "text": text, "listed": listed}
    tools = read_tools([{"name": "f", "parameters": {"type": "object", "properties": properties}}])

    def call(name, value):
        before = '<parameter=text>\n"\n</parameter>\n'
        start = f"<tool_call>\n<function=f>\n{before}<parameter={name}>\n"
        return guard(start + value, pieces, tools)

    assert call("number", many).digits_left == 0
    assert call("text", many).digits_left > 0
    assert call("listed", f'["x", {many}').digits_left == 0
    assert call("listed", f'["x{many}').digits_left > 0
    assert call("number", f"{many}\n</parameter>\n").digits_left > 0


@pytest.mark.parametrize("demands", [True, False])
def test_answer_cannot_end_in_reasoning_before_a_required_document(demands):
    tokenizer = load_tokenizer(find(DEMO))
    special = SpecialTokens.from_tokenizer(tokenizer)
    wanted = {"type": "regex", "pattern": "yes|no"} if demands else None
    request = Request([], response_format=wanted)
    constraint = Constraint(
        MatcherFactory(tokenizer, special, len(tokenizer)),
        special,
        ([10], [11]),
        request,
        output_rules(request, special),
        in_reasoning=True,
    )
    assert constraint.begin_answer() == []
    logits = constraint.mask(mx.zeros((1, len(tokenizer))))[0].tolist()
    for token in (*special.answer_end, special.call_start):
        assert (logits[token] == float("-inf")) == demands
    assert logits[special.think_end] == 0
    assert sum(x == 0 for x in logits) >= len(tokenizer) - 3


@pytest.mark.parametrize(
    ("lark", "wrong"),
    [
        ("start: " + '"a"? ' * 20_000, "for a token|cannot be enforced"),
        ("start: X\nX: /.*a.{15}/ & /.*b.{15}/ & /.*c.{16}/ & ~/.*d.{14}/\n", "fuel exhausted"),
    ],
)
def test_grammar_that_would_hold_up_other_answers_is_refused(lark, wrong):
    with pytest.raises(SettingError, match=wrong):
        MATCHER_FACTORY.create(lark)


@pytest.mark.slow
def test_grammar_with_too_many_states_is_an_error_of_the_request(engine):
    request = Request(
        [{"role": "user", "content": "Hi"}],
        response_format={"type": "regex", "pattern": "(a|b)*a(a|b){16}[ab]{99999}"},
        max_tokens=30,
        temperature=1.0,
        seed=1,
    )
    with pytest.raises((SettingError, OutputError)):
        list(engine.stream(request))


@pytest.mark.parametrize("digit", "019")
@pytest.mark.parametrize(
    "bounds",
    [
        {"exclusiveMinimum": 0, "exclusiveMaximum": 1},
        {"exclusiveMinimum": -1, "exclusiveMaximum": 0.001},
        {"exclusiveMinimum": 0.5, "maximum": 0.75},
    ],
    ids=str,
)
def test_number_between_two_bounds_ends(engine, bounds, digit):
    """The last digit is one after which the number may end, whatever the model prefers."""
    [token] = TOKENIZER.encode(digit, add_special_tokens=False)
    schema = {"type": "array", "items": {"type": "number", **bounds}, "minItems": 2, "maxItems": 2}
    wanted = {"type": "json_schema", "schema": schema}
    text = ask(engine, response_format=wanted, logit_bias={token: 100}, max_tokens=60)[0]
    numbers = json.loads(text)
    assert len(numbers) == 2
    assert all(len(re.sub(r"\D", "", part)) <= 16 for part in text.split(","))


def test_fraction_of_a_second_and_digits_of_a_duration_end(engine):
    [token] = TOKENIZER.encode("1", add_special_tokens=False)
    properties = {name: {"type": "string", "format": name} for name in ("time", "duration")}
    schema = {"type": "object", "properties": properties, "required": [*properties]}
    wanted = {"type": "json_schema", "schema": schema}
    text = ask(engine, response_format=wanted, logit_bias={token: 100}, max_tokens=120)[0]
    assert sorted(json.loads(text)) == ["duration", "time"]


def test_json_object_with_a_schema_is_held_to_it(engine):
    schema = {"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"]}
    text = ask(engine, response_format={"type": "json_object", "schema": schema})[0]
    assert json.loads(text) == {"n": 7}
