"""Test how LangChain's messages become those of the engine, and prompts of Qwen's templates."""

import pytest
from langchain_core.messages import (
    AIMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from qwen_tokenizers import tokenizer

from flashmoe.chat.messages import normalize_messages
from flashmoe.chat.special_tokens import SpecialTokens
from flashmoe.chat.template import ChatTemplate
from langchain_flashmoe import InvalidRequest
from langchain_flashmoe.messages import engine_messages

CALL = {"name": "add", "args": {"a": 1}, "id": "c1", "type": "tool_call"}


def one(message):
    return engine_messages([message])[0]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (SystemMessage("s"), {"role": "system", "content": "s"}),
        (HumanMessage("h", name="Ann"), {"role": "user", "content": "h"}),
        (HumanMessage(["a", {"type": "text", "text": "b"}]), {"role": "user", "content": "ab"}),
        (
            HumanMessage([{"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}]),
            {"role": "user", "content": "b"},
        ),
        (ChatMessage("d", role="developer"), {"role": "developer", "content": "d"}),
        (AIMessage("a"), {"role": "assistant", "content": "a"}),
        (
            ToolMessage("3", tool_call_id="c1", name="add"),
            {"role": "tool", "tool_call_id": "c1", "content": "3"},
        ),
        (
            ToolMessage("no b", tool_call_id="c1", status="error"),
            {"role": "tool", "tool_call_id": "c1", "content": "no b", "error": True},
        ),
        (
            ToolMessage([{"type": "text", "text": "3"}], tool_call_id="c1"),
            {"role": "tool", "tool_call_id": "c1", "content": "3"},
        ),
    ],
)
def test_message_is_translated(message, expected):
    assert one(message) == expected


@pytest.mark.parametrize(
    "message",
    [
        AIMessage("so", additional_kwargs={"reasoning_content": "hm"}, tool_calls=[CALL]),
        AIMessage(
            [
                {"type": "reasoning", "reasoning": "hm"},
                {"type": "text", "text": "so"},
                {"type": "tool_call", "name": "add", "args": {"a": 1}, "id": "c1"},
            ],
            tool_calls=[CALL],
        ),
        AIMessage(
            [
                {"type": "thinking", "thinking": "hm", "signature": "x"},
                {"type": "text", "text": "so"},
                {"type": "tool_use", "name": "add", "input": {"a": 1}, "id": "c1"},
            ],
            tool_calls=[CALL],
        ),
        AIMessage(
            content_blocks=[
                {"type": "reasoning", "reasoning": "hm"},
                {"type": "text", "text": "so"},
                {"type": "tool_call", "name": "add", "args": {"a": 1}, "id": "c1"},
            ]
        ),
    ],
    ids=["kwargs", "v1", "anthropic", "content_blocks"],
)
def test_reasoning_and_calls_of_an_answer_are_kept(message):
    assert one(message) == {
        "role": "assistant",
        "content": "so",
        "reasoning_content": "hm",
        "tool_calls": [{"id": "c1", "name": "add", "arguments": {"a": 1}}],
    }


@pytest.mark.parametrize("error", ["cut", None])
def test_invalid_call_reaches_the_model_as_text(error):
    broken = {"name": "add", "args": '{"a": 1}', "id": "x", "error": error}
    broken["type"] = "invalid_tool_call"
    message = one(AIMessage("so", invalid_tool_calls=[broken], tool_calls=[CALL]))
    turn = normalize_messages([{"role": "user", "content": "q"}, message])[1]
    assert turn["content"] == 'so\n\n[This call of add was not made: {"a": 1}]'
    assert len(turn["tool_calls"]) == 1


def test_metadata_of_notifications_is_not_sent():
    """langchain-core marks messages that an agent's harness adds."""
    marked = HumanMessage("done", additional_kwargs={"lc_source": "subagent", "lc_data": {"a": 1}})
    assert one(marked) == {"role": "user", "content": "done"}


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}},
        {"type": "image", "base64": "AA", "mime_type": "image/png"},
        {"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}},
        {"type": "file", "base64": "AA", "mime_type": "application/pdf"},
        {"type": "reasoning", "reasoning": "a human's"},
        {"type": "text"},
    ],
)
def test_block_that_is_not_text_is_refused(block):
    text = {"type": "text", "text": "look"}
    for message in (HumanMessage([text, block]), ToolMessage([block], tool_call_id="c")):
        with pytest.raises(InvalidRequest, match=f"'{block['type']}'.*takes text only"):
            engine_messages([SystemMessage("s"), message])


def test_unknown_message_is_refused():
    with pytest.raises(InvalidRequest, match="message 1 is a FunctionMessage"):
        engine_messages([HumanMessage("h"), FunctionMessage("3", name="f")])


def test_qwen_prompt_has_every_message():
    """The template of Qwen3.5 renders a conversation with every kind of message."""
    made = tokenizer("qwen3_5_think", "demo")
    conversation = [
        SystemMessage("Be kind."),
        HumanMessage("Hi"),
        AIMessage("Hello", additional_kwargs={"reasoning_content": "An old thought."}),
        SystemMessage("Be brief."),
        HumanMessage("1 + 1 and 2 + 2?"),
        AIMessage(
            "",
            additional_kwargs={"reasoning_content": "I add."},
            tool_calls=[CALL, {**CALL, "id": "c2", "args": {"a": 2}}],
        ),
        ToolMessage("4", tool_call_id="c2"),
        ToolMessage("boom", tool_call_id="c1", status="error"),
    ]
    prompt = ChatTemplate(made, SpecialTokens.from_tokenizer(made)).build_prompt(
        engine_messages(conversation), think=True
    )
    text = made.decode(prompt.tokens)
    assert text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\nBe brief.\n\n1 + 1 and 2 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nI add.\n</think>\n\n"
        "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=add>\n<parameter=a>\n2\n</parameter>\n</function>\n</tool_call>"
        "<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nError: boom\n</tool_response>\n"
        "<tool_response>\n4\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )
