"""Test the plugin through llm's Python API: tools, schemas, reasoning, options, async."""

import asyncio
import json
import shutil

import pytest
from llm.parts import Message, ReasoningPart, ToolCallPart, ToolResultPart

import llm
from flashmoe import catalog
from flashmoe import engine as engine_module
from flashmoe.catalog import DEMO
from flashmoe.chat.messages import normalize_messages
from flashmoe.hub import registry
from llm_flashmoe import FlashMoE
from llm_flashmoe.errors import UserError
from llm_flashmoe.messages import engine_messages, failure_event

GREEDY = {"temperature": 0.0, "max_tokens": 60}
ADD = "What is 17 plus 25? Use the tool."


@pytest.fixture(scope="module")
def model():
    yield llm.get_model(DEMO)
    engine_module.release()


def add(a: int, b: int) -> int:
    "Add two numbers."
    return a + b


def fails(a: int, b: int) -> int:
    "Add two numbers."
    raise ValueError("the adder is broken")


def test_chain_calls_the_tool_and_answers(model):
    calls = []

    def after(tool, call, result):
        calls.append((call.name, call.arguments, result.output))

    chain = model.chain(ADD, tools=[add], after_call=after, options=GREEDY)
    assert "42" in chain.text()
    assert calls == [("add", {"a": 17, "b": 25}, "42")]
    first, second = chain._responses
    assert first.response_json["finish_reason"] == "tool_calls"
    assert second.response_json["finish_reason"] == "stop"
    assert first.token_details["forced_tokens"] > 10
    assert second.token_details["cached_tokens"] == first.input_tokens - 7
    (call,) = first.tool_calls()
    parts = [p for m in first.messages() for p in m.parts]
    assert [type(p).__name__ for p in parts] == ["ToolCallPart"]
    assert (parts[0].tool_call_id, parts[0].arguments) == (call.tool_call_id, call.arguments)


def test_call_is_streamed_as_events(model):
    response = model.prompt(ADD, tools=[add], **GREEDY)
    events = list(response.stream_events())
    kinds = [e.type for e in events]
    assert kinds == ["tool_call_name", "tool_call_args"]
    assert events[0].chunk == "add"
    assert json.loads(events[1].chunk) == {"a": 17, "b": 25}
    assert len({e.tool_call_id for e in events}) == 1
    assert len(response.tool_calls()) == 1


def test_error_of_a_tool_reaches_the_model(model):
    chain = model.chain(ADD, tools=[fails], options=GREEDY)
    assert chain.text()
    second = chain._responses[1]
    rendered = json.dumps([m.to_dict() for m in second.prompt.messages])
    assert "the adder is broken" in rendered
    (result,) = second.prompt.tool_results
    assert result.exception


class Box(llm.Toolbox):
    def add(self, a: int, b: int) -> int:
        "Add two numbers."
        return a + b


def test_toolbox_and_bare_schema_are_tools(model):
    response = model.prompt("What is 3 plus 4? Use the tool.", tools=[Box()], **GREEDY)
    (call,) = response.tool_calls()
    assert (call.name, call.arguments) == ("Box_add", {"a": 3, "b": 4})
    bare = llm.Tool(
        name="add",
        description="Add two numbers.",
        input_schema={
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    )
    (call,) = model.prompt("What is 3 plus 4? Use the tool.", tools=[bare], **GREEDY).tool_calls()
    assert call.arguments == {"a": 3, "b": 4}


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"enum": [3, 4]}},
    "required": ["name", "age"],
}


def test_answer_fits_the_schema(model):
    for wanted in (PERSON, llm.schema_dsl("name, age int")):
        text = model.prompt("Invent a person.", schema=wanted, max_tokens=120, seed=1).text()
        assert set(json.loads(text)) == {"name", "age"}


def test_schema_constrains_the_answer_after_the_tools(model):
    """llm passes the schema to the first round alone.

    Without the schema the demo answers "The answer is 42."; with it, there may be another call or a
    document.
    """
    chain = model.chain(ADD, tools=[add], schema=PERSON, options=GREEDY)
    for index, response in enumerate(chain.responses()):
        calls = response.tool_calls()
        assert (response.prompt.schema is None) == (index > 0)
        assert calls or set(json.loads(response.text())) == {"name", "age"}
        if index == 2 or not calls:
            break
    assert index > 0


def test_schema_of_an_earlier_question_does_not_constrain(model):
    conversation = model.conversation()
    conversation.prompt("Invent a person.", schema=PERSON, **GREEDY).text()
    text = conversation.prompt("What is a good breakfast?", **GREEDY).text()
    assert not text.startswith("{")


def test_document_cut_short_raises(model):
    with pytest.raises(UserError, match="cut short: max_tokens=5 was reached"):
        model.prompt("Invent a person.", schema=PERSON, max_tokens=5).text()


def test_call_cut_short_raises(model):
    with pytest.raises(UserError, match=r"call of add cannot be used.*max_tokens=14 was reached"):
        list(model.prompt(ADD, tools=[add], temperature=0.0, max_tokens=14))


def test_reasoning_is_apart_from_the_text(model):
    response = model.prompt("Why is the sky blue?", think=True, temperature=0.0, max_tokens=80)
    events = list(response.stream_events())
    kinds = [e.type for e in events]
    assert kinds == sorted(kinds), "reasoning, then text"
    assert set(kinds) == {"reasoning", "text"}
    assert len(events) > 4
    reasoning = "".join(e.chunk for e in events if e.type == "reasoning")
    assert "think>" not in reasoning + response.text()
    assert response.token_details["reasoning_tokens"] > 3
    plain = model.prompt(
        "Why is the sky blue?", think=True, temperature=0.0, max_tokens=80, stream=False
    )
    whole = list(plain.stream_events())
    assert [e.type for e in whole] == ["reasoning", "text"]
    assert (whole[0].chunk, whole[1].chunk) == (reasoning, response.text())


def test_hidden_reasoning_is_left_out(model):
    options = {**GREEDY, "think": True, "thinking_budget": 5, "max_tokens": 12}
    response = model.prompt("Hello.", options=options, hide_reasoning=True)
    assert {e.type for e in response.stream_events()} == {"text"}
    assert response.token_details["reasoning_tokens"] > 3


def test_penalties_and_variables_reach_the_engine(model):
    options = {"presence_penalty": "2", "frequency_penalty": 1, "logit_bias": '{"5": -100}'}
    options |= {**GREEDY, "max_tokens": 3, "chat_template_kwargs": '{"preserve_thinking": true}'}
    assert model.prompt("Hello.", options=options).text()
    for name, value in (("presence_penalty", 3), ("logit_bias", '{"x": 1}')):
        with pytest.raises(UserError, match=f"{name}="):
            model.prompt("Hello.", options={name: value}).text()
    assert model.attachment_types == set()


def test_system_message_alone_is_answered(model):
    """`llm -s "..."` without a prompt."""
    assert model.prompt("", system="Say hello.", options={**GREEDY, "max_tokens": 5}).text()


def test_reasoning_of_an_earlier_turn_stays_reasoning(model):
    conversation = model.conversation()
    conversation.prompt("Why is the sky blue?", think=True, **GREEDY).text()
    second = conversation.prompt("And the sea?", **GREEDY)
    assert second.text()
    kinds = [type(p).__name__ for m in second.prompt.messages for p in m.parts]
    assert kinds == ["TextPart", "ReasoningPart", "TextPart", "TextPart"]
    assert second.token_details["cached_tokens"] > 10


def test_async_model_gives_the_same_answers(model):
    async_model = llm.get_async_model(DEMO)
    assert async_model.model_id == model.model_id

    async def main():
        texts = await asyncio.gather(
            *[async_model.prompt(f"Tell me about {t}.", **GREEDY) for t in ("cats", "dogs")]
        )
        chain = async_model.chain(ADD, tools=[add], options=GREEDY)
        return [await t.text() for t in texts], await chain.text()

    texts, chained = asyncio.run(main())
    assert texts == [model.prompt(f"Tell me about {t}.", **GREEDY).text() for t in ("cats", "dogs")]
    assert "42" in chained
    with pytest.raises(UserError, match="temperature=-1"):
        asyncio.run(text_of(async_model.prompt("Hello.", temperature=-1)))


async def text_of(response) -> str:
    return await (await response).text()


def test_attachment_is_refused(model, tmp_path):
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    attachment = llm.Attachment(path=str(tmp_path / "x.png"))
    with pytest.raises(ValueError, match="does not support attachments"):
        model.prompt("What is this?", attachments=[attachment]).text()


def test_response_has_its_figures(model):
    response = model.prompt("Tell me about the sea.", **GREEDY)
    response.text()
    figures = response.response_json
    assert set(figures) == {
        *("finish_reason", "tokens_per_second", "time_to_first_token", "experts", "activations"),
        *("batch", "trained_experts", "bits", "hit_rate", "bytes_read", "bytes_per_token"),
        *("io_wait_seconds", "steps", "peak_memory", "path", "ops"),
    }
    assert response.resolved_model == DEMO
    pruned = model.prompt("Tell me about the sea.", experts=4, **GREEDY)
    pruned.text()
    assert pruned.resolved_model == f"{DEMO}@K=4"
    assert pruned.response_json["experts"] == 4


@pytest.mark.parametrize(
    ("option", "given", "expected"),
    [
        ("stop", "x", ["x"]),
        ("stop", '["a", "b"]', ["a", "b"]),
        ("stop", "3", ["3"]),
        ("seed", "0", 0),
        ("think", "1", True),
        ("think", "false", False),
        ("cache", "0", False),
        ("memory", 8_000_000_000, "8000000000"),
        ("temperature", "0.5", 0.5),
        ("thinking_budget", "10", 10),
    ],
)
def test_option_strings_of_the_command_line_are_converted(option, given, expected):
    assert getattr(FlashMoE.Options(**{option: given}), option) == expected


def test_results_of_parallel_calls_are_put_in_the_order_of_the_calls(model):
    """The results of two calls arrive in the other order, and one of them is an error."""
    calls = [
        ToolCallPart(name="add", arguments={"a": i, "b": 1}, tool_call_id=f"c{i}") for i in "12"
    ]
    results = [
        ToolResultPart(name="add", output="three", tool_call_id="c2"),
        ToolResultPart(name="add", output="broken", tool_call_id="c1", exception="ValueError"),
    ]
    messages = engine_messages(
        [
            llm.user("Add."),
            Message(role="assistant", parts=[ReasoningPart(text="Hm."), *calls]),
            Message(role="tool", parts=results),
        ]
    )
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "tool"]
    assert messages[1]["reasoning_content"] == "Hm."
    assert [c["id"] for c in messages[1]["tool_calls"]] == ["c1", "c2"]
    rendered = normalize_messages(messages)
    assert [m["content"] for m in rendered[2:]] == ["Error: broken", "three"]


def test_failed_question_is_left_out_of_the_conversation():
    mark = failure_event("too long").provider_metadata
    failed = Message(role="assistant", parts=[ReasoningPart(text="", provider_metadata=mark)])
    messages = engine_messages(
        [llm.system("Be kind."), llm.user("long"), failed, llm.user("short")]
    )
    assert [m["content"] for m in messages] == ["Be kind.", "short"]


def test_flash_name_is_pruned_and_the_plain_name_is_not(tmp_path, monkeypatch):
    """A copy of the demo takes the place of the checkpoint that both known names stand for."""
    monkeypatch.setenv("FLASHMOE_CONFIG", str(tmp_path / "config"))
    path = tmp_path / "Qwen3.5-397B-A17B-4bit"
    shutil.copytree(catalog.find(DEMO), path)
    registry.add("mine", path)
    answered = {}
    for name, options in (
        ("qwen3.5-397b-flash", {}),
        ("qwen3.5-397b", {}),
        ("mine", {"experts": 6}),
    ):
        response = FlashMoE(catalog.model(name)).prompt("Hi.", max_tokens=2, **options)
        response.text()
        answered[name] = response.response_json["experts"], response.resolved_model
    engine_module.release(path)
    assert answered == {
        "qwen3.5-397b-flash": (4, f"{path.name}@K=4"),
        "qwen3.5-397b": (10, path.name),
        "mine": (6, f"{path.name}@K=6"),
    }
