"""Test that a turn of a conversation prefills only what no prompt cache entry holds."""

import json
import shutil
import subprocess
import sys

import pytest

from flashmoe.catalog import DEMO, find
from flashmoe.engine import Engine
from flashmoe.events import End, Progress, Reasoning, Text, ToolCall, ToolCallArguments
from flashmoe.events import ToolCallStart as Start
from flashmoe.memory.footprint import CHUNK_TOKENS
from flashmoe.requests import Request

#: `make test-all` runs these.
pytestmark = pytest.mark.slow

#: Tokens of "<|im_start|>assistant\n<think>\n\n</think>\n\n" with the demo's tokenizer.
TAIL = 7

TOPICS = ["breakfast", "dogs", "rain", "music", "bread", "ships"]
TOPICS += ["winter", "trees", "coffee", "books", "trains", "stars"]


def ask(engine, messages, **options):
    """Return the text, all events and the `End` of one answer."""
    options = {"max_tokens": 30, "temperature": 0.0} | options
    events = [*engine.stream(Request(messages, **options))]
    assert isinstance(events[-1], End)
    return "".join(e.text for e in events if isinstance(e, Text)), events, events[-1]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def converse(engine_of_turn, **options) -> tuple[list[str], list[End]]:
    """Hold a conversation of twelve turns, and return the answers and the `End` of each."""
    messages = [{"role": "system", "content": "You are a helpful assistant."}]
    texts, ends = [], []
    for topic in TOPICS:
        messages.append(user(f"Tell me one thing about {topic}."))
        with engine_of_turn() as engine:
            text, _, end = ask(engine, messages, max_tokens=14, **options)
        messages.append({"role": "assistant", "content": text})
        texts.append(text)
        ends.append(end)
    return texts, ends


def assert_only_new_tokens_are_prefilled(ends: list[End]) -> None:
    read = [e.prompt_tokens - e.cached_tokens for e in ends]
    grown = [b.prompt_tokens - a.prompt_tokens for a, b in zip(ends, ends[1:], strict=False)]
    assert read[1:] == [g + TAIL for g in grown]
    assert max(read) < 70 < ends[-1].prompt_tokens


class SharedEngine:
    """A context manager for an engine that stays open between turns."""

    def __init__(self, engine):
        self.engine = engine

    def __enter__(self):
        return self.engine

    def __exit__(self, *exc):
        pass


def test_each_turn_prefills_only_new_tokens(engine, tmp_path, monkeypatch):
    """Compare one engine, many engines that share only the disk, and no cache at all."""
    whole, ends = converse(lambda: SharedEngine(engine), cache=False)
    assert [e.cached_tokens for e in ends] == [0] * 12
    kept, ends = converse(lambda: SharedEngine(engine))
    assert_only_new_tokens_are_prefilled(ends)
    monkeypatch.setenv("FLASHMOE_CACHE", str(tmp_path / "states"))
    restored, ends = converse(lambda: Engine(find(DEMO), slots=64, prompt_cache=0))
    assert_only_new_tokens_are_prefilled(ends)
    assert whole == kept == restored
    assert len({*whole}) > 6


def test_conversations_side_by_side_keep_their_cache_entries(engine):
    threads = [[user(f"My name is {n}. Say hello.")] for n in ("Anna", "Ben", "Cara", "Dan")]
    for _ in range(3):
        for messages in threads:
            text, _, end = ask(engine, messages)
            assert end.cached_tokens > 0 or len(messages) == 1
            messages += [{"role": "assistant", "content": text}, user("And what is my name?")]


PROCESS = """
import json, sys
from flashmoe.catalog import find
from flashmoe.engine import Engine
from flashmoe.events import End, Text
from flashmoe.requests import Request
messages = json.load(sys.stdin)
with Engine(find("flashmoe-demo"), slots=12) as engine:
    events = [*engine.stream(Request(messages, max_tokens=20, temperature=0.0))]
text = "".join(e.text for e in events if isinstance(e, Text))
print(json.dumps([text, events[-1].prompt_tokens, events[-1].cached_tokens]))
"""


def test_new_process_restores_the_conversation_from_disk(engine, tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHMOE_CACHE", str(tmp_path / "states"))

    def run(messages):
        done = subprocess.run(
            [sys.executable, "-c", PROCESS],
            input=json.dumps(messages),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    messages = [user("My name is Anna. Please remember it.")]
    text, before, cached = run(messages)
    assert cached == 0
    messages += [{"role": "assistant", "content": text}, user("What is my name?")]
    text, prompt, cached = run(messages)
    assert prompt - cached == prompt - before + TAIL
    assert text == ask(engine, messages, cache=False, max_tokens=20)[0]
    *_, cached = run(messages)
    assert cached == prompt - TAIL


TOOLS = [
    {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
    {
        "name": "weather",
        "description": "Get the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": ["integer", "null"]}},
            "required": ["city"],
        },
    },
]


def test_each_round_of_an_agent_reuses_the_round_before(engine):
    """The demo model cannot plan three rounds by itself, so tool_choice names each tool."""
    messages = [user("What is 17 plus 25? And how is the weather in Paris?")]
    results = {"add": "42", "weather": "rain"}
    cached, forced, steps, tokens = [], 0, 0, 0
    for choice in ("add", "weather", "add", "none"):
        text, events, end = ask(engine, messages, tools=TOOLS, tool_choice=choice, max_tokens=80)
        cached.append(end.cached_tokens)
        calls = [e for e in events if isinstance(e, ToolCall)]
        if choice == "none":
            assert (calls, end.finish_reason) == ([], "stop")
            break
        (call,) = calls
        assert (call.name, call.error, end.finish_reason) == (choice, None, "tool_calls")
        # The name comes first, then the pieces of the arguments, then the call.
        call_events = [e for e in events if isinstance(e, Start | ToolCallArguments | ToolCall)]
        assert isinstance(call_events[0], Start)
        pieces = "".join(e.text for e in call_events[1:-1])
        assert json.loads(pieces) == call.arguments
        assert {e.id for e in call_events} == {call.id}
        assert text == ""
        forced, steps = forced + end.forced_tokens, steps + end.steps
        tokens += end.generated_tokens
        function = {"name": call.name, "arguments": call.arguments}
        messages.append({"role": "assistant", "tool_calls": [{"id": call.id, **function}]})
        messages.append({"role": "tool", "tool_call_id": call.id, "content": results[choice]})
    assert cached[0] == 0
    assert cached == sorted(set(cached)), "each round starts where the last one was asked"
    assert cached[-1] > 200
    # A token that the grammar forces takes no step of its own.
    assert forced > tokens / 2
    assert steps < tokens / 2


def test_demo_calls_a_tool_unforced_and_answers_with_its_result(engine):
    """The demo was trained to call this tool without being forced to."""
    _, events, end = ask(engine, [user("What is 3 plus 4? Use the tool.")], tools=TOOLS)
    (call,) = [e for e in events if isinstance(e, ToolCall)]
    assert (call.name, call.arguments) == ("add", {"a": 3, "b": 4})
    messages = [user("What is 3 plus 4? Use the tool.")]
    messages.append({"role": "assistant", "tool_calls": [{"id": "1", "function": vars(call)}]})
    messages.append({"role": "tool", "tool_call_id": "1", "content": "7"})
    text, _, again = ask(engine, messages, tools=TOOLS)
    assert "7" in text
    assert again.cached_tokens == end.prompt_tokens - TAIL


def test_new_conversation_reuses_the_system_prompt(engine):
    system = {"role": "system", "content": "You are a cook. " * 20}
    _, _, first = ask(engine, [system, user("Hello.")])
    _, _, second = ask(engine, [system, user("What is bread?")])
    assert first.cached_tokens == 0
    assert second.cached_tokens > 60


def test_pruned_answer_does_not_reuse_an_unpruned_cache_entry(engine):
    messages = [user("Tell me about the moon and the sun.")]
    ask(engine, messages)
    text, _, end = ask(engine, messages, experts=2)
    assert end.cached_tokens == 0
    assert text == ask(engine, messages, experts=2, cache=False)[0]


def test_thinking_budget_ends_the_reasoning_but_not_the_answer(engine):
    messages = [user("Why is the sky blue?")]
    _, events, end = ask(engine, messages, think=True, thinking_budget=6, max_tokens=60)
    reasoning = "".join(e.text for e in events if isinstance(e, Reasoning))
    text = "".join(e.text for e in events if isinstance(e, Text))
    assert reasoning
    assert text
    assert "think" not in reasoning + text
    # The budget, and the tokens that close the reasoning.
    assert 6 <= end.reasoning_tokens <= 9
    free = ask(engine, messages, think=True, max_tokens=200)[2]
    assert free.reasoning_tokens > end.reasoning_tokens
    assert ask(engine, messages, think=True, thinking_budget=0)[2].reasoning_tokens <= 3
    assert ask(engine, messages, think=False)[2].reasoning_tokens == 0


def test_progress_counts_tokens_and_layers_of_the_prompt(engine, monkeypatch):
    monkeypatch.setattr("flashmoe.generation.prompt.REPORT_SECONDS", 0)
    long = " ".join(f"Number {i} is {i * i}." for i in range(150))
    _, events, end = ask(engine, [user(long)], max_tokens=4)
    progress = [e for e in events if isinstance(e, Progress)]
    done = [e.done for e in progress]
    assert done == sorted(done)
    assert {e.total for e in progress} == {end.prompt_tokens}
    assert done[-1] == end.prompt_tokens > CHUNK_TOKENS * 2
    assert {e.layer for e in progress} == set(range(9)), "each layer, and the end of a chunk"
    assert {e.layers for e in progress} == {8}
    first = next(i for i, e in enumerate(events) if not isinstance(e, Progress))
    assert not any(isinstance(e, Progress) for e in events[first:])


HERMES = """
{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n' }}
{%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content }}
{{- '\\n</tool_response><|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for tool_call in message.tool_calls or [] %}
{{- '<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
{{- tool_call.arguments | tojson + '}\\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def test_calls_in_the_hermes_format_are_parsed(tmp_path):
    """The format is inferred from the template, as mlx-lm does it."""
    path = tmp_path / "hermes"
    shutil.copytree(find(DEMO), path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    del config["tool_parser_type"]
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "chat_template.jinja").write_text(HERMES)
    with Engine(path, slots=64) as engine:
        messages = [user("What is the weather?")]
        _, events, end = ask(engine, messages, tools=TOOLS, tool_choice="weather", max_tokens=200)
        (call,) = [e for e in events if isinstance(e, ToolCall)]
        assert call.text.startswith('{"name": "weather", "arguments": {"city": "')
        assert call.error is None or "max_tokens" in call.error
        pieces = [e.text for e in events if isinstance(e, ToolCallArguments)]
        assert len(pieces) > 3
        if call.error is None:
            assert json.loads("".join(pieces)) == call.arguments
            assert end.finish_reason == "tool_calls"
        arguments = {"city": "Paris", "days": 3}
        messages.append({"role": "assistant", "tool_calls": [{"name": "weather"}]})
        messages[-1]["tool_calls"][0]["arguments"] = arguments
        messages.append({"role": "tool", "content": "rain"})
        _, _, again = ask(engine, messages, tools=TOOLS)
        assert again.cached_tokens > 100
