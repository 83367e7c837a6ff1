"""Test agents of LangChain and loops of LangGraph on the demo model."""

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from pydantic import BaseModel, Field

from flashmoe.catalog import DEMO
from langchain_flashmoe import ChatFlashMoE

#: `make test-all` runs these.
pytestmark = pytest.mark.slow


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@tool
def divide(a: int, b: int) -> float:
    """Divide two numbers."""
    return a / b


QUESTION = {"messages": [HumanMessage("What is 17 plus 25? Use the tool.")]}


def model(**kwargs):
    return ChatFlashMoE(**{"model": DEMO, "temperature": 0, "max_tokens": 100} | kwargs)


def kinds(messages):
    return [message.type for message in messages]


def test_agent_uses_its_tool():
    """The model chooses the tool and its arguments without being forced to."""
    messages = create_agent(model(), [add]).invoke(QUESTION)["messages"]
    assert kinds(messages) == ["human", "ai", "tool", "ai"]
    assert messages[1].tool_calls[0]["args"] == {"a": 17, "b": 25}
    assert messages[2].content == "42"
    assert "42" in messages[3].text


async def test_agent_streams():
    agent = create_agent(model(), [add])
    pieces = [
        chunk async for chunk, _ in agent.astream(QUESTION, stream_mode="messages") if chunk.text
    ]
    assert len(pieces) > 3
    assert "42" in "".join(p.text for p in pieces if p.type == "AIMessageChunk")


def test_graph_returns_from_its_tools_to_the_model():
    bound = model().bind_tools([add])
    graph = StateGraph(MessagesState)
    graph.add_node("model", lambda state: {"messages": [bound.invoke(state["messages"])]})
    graph.add_node("tools", ToolNode([add]))
    graph.add_edge(START, "model")
    graph.add_conditional_edges("model", tools_condition)
    graph.add_edge("tools", "model")
    messages = graph.compile().invoke(QUESTION)["messages"]
    assert kinds(messages) == ["human", "ai", "tool", "ai"]


def test_next_turn_prefills_only_new_messages():
    """Only what the prompt cache entry of the last answer does not hold is prefilled.

    Without the prompt cache the whole conversation is prefilled, and the answers are the same.
    """
    texts = []
    for prompt_cache in (True, False):
        agent = create_agent(model(prompt_cache=prompt_cache), [add], checkpointer=InMemorySaver())
        thread = {"configurable": {"thread_id": prompt_cache}}
        messages = agent.invoke(QUESTION, thread)["messages"]
        for text in ("What is 20 plus 30? Use the tool.", "Thank you. What is a dog?"):
            messages = agent.invoke({"messages": [HumanMessage(text)]}, thread)["messages"]
        texts.append([message.text for message in messages])
        answers = [m for m in messages if isinstance(m, AIMessage)]
        assert len(answers) >= 4
        before = 0
        for message in answers:
            usage = message.usage_metadata
            cached = usage["input_token_details"]["cache_read"]
            if not prompt_cache:
                assert cached == 0
            elif before:
                # All of the prompt before is cached, except the header of the assistant's turn.
                assert cached >= before - 10
            before = usage["input_tokens"]
    assert texts[0] == texts[1]


class Sum(BaseModel):
    """A sum."""

    total: int = Field(ge=0, le=100)


@pytest.mark.parametrize("strategy", [Sum, ProviderStrategy(Sum), ToolStrategy(Sum)])
def test_agent_keeps_to_its_format(strategy):
    """A class alone means ProviderStrategy, because the profile says that the model supports it."""
    state = create_agent(model(), [], response_format=strategy).invoke(QUESTION)
    assert isinstance(state["structured_response"], Sum)
    called = any(isinstance(m, ToolMessage) for m in state["messages"])
    assert called == isinstance(strategy, ToolStrategy)


def test_agent_with_tools_keeps_to_its_format():
    """The agent makes one call and then writes a document.

    The demo model by itself would call its tool for ever, so tool_choice forbids calls as soon as
    there is a result.
    """

    @wrap_model_call
    def call_once(request, handler):
        called = any(isinstance(m, ToolMessage) for m in request.messages)
        return handler(
            request.override(model_settings={"tool_choice": "none"}) if called else request
        )

    strategy = ProviderStrategy(Sum, strict=True)
    agent = create_agent(model(), [add], response_format=strategy, middleware=[call_once])
    state = agent.invoke(QUESTION)
    assert kinds(state["messages"])[:3] == ["human", "ai", "tool"]
    assert isinstance(state["structured_response"], Sum)


def test_error_of_a_tool_reaches_the_model():
    """The result has the status "error"; what the model makes of it is not tested."""
    bound = model().bind_tools([divide], tool_choice="divide")
    called = bound.invoke([HumanMessage("Divide 1 by 0.")])
    called.tool_calls[0]["args"] = {"a": 1, "b": 0}
    node = ToolNode([divide], handle_tool_errors=True)
    graph = StateGraph(MessagesState).add_node("tools", node).add_edge(START, "tools").compile()
    result = graph.invoke({"messages": [HumanMessage("Divide 1 by 0."), called]})["messages"][-1]
    assert result.status == "error"
    answer = model().bind_tools([divide]).invoke([HumanMessage("Divide."), called, result])
    assert isinstance(answer, AIMessage)
