"""Test that every option of a call reaches the request or the engine."""

import pytest
from langchain_core.messages import HumanMessage
from pydantic import BaseModel

from flashmoe.catalog import DEMO, find
from flashmoe.engine import release
from flashmoe.hub import registry
from flashmoe.options import EngineOptions
from flashmoe.requests import RANGES, Request
from langchain_flashmoe import ChatFlashMoE
from langchain_flashmoe.options import CallOptions

VALUES = {
    "max_tokens": 7,
    "temperature": 0.25,
    "top_p": 0.5,
    "top_k": 3,
    "min_p": 0.125,
    "repetition_penalty": 1.5,
    "presence_penalty": 1.5,
    "frequency_penalty": -1,
    "seed": 0,
    "thinking_budget": 0,
    "experts": 4,
}


class Answer(BaseModel):
    text: str


@pytest.fixture(autouse=True)
def no_engines():
    yield
    release()


def request(model=None, stop=None, **kwargs):
    model = model or ChatFlashMoE(model=DEMO)
    return model._request(CallOptions.merge(model, stop, kwargs), [HumanMessage("Hi")])[1]


def test_every_option_has_a_test_value():
    # LangChain's users know logprobs as a flag, and top_logprobs.
    assert VALUES.keys() == (RANGES.keys() | {"experts"}) - {"logprobs"}


@pytest.mark.parametrize(("name", "value"), VALUES.items())
def test_option_reaches_the_request(name, value):
    expected = Request([{"role": "user", "content": "Hi"}], **{name: value})
    assert request(**{name: value}) == expected
    made = ChatFlashMoE(model=DEMO, **{name: value})
    assert request(made) == expected
    # None means that the option was not given.
    assert request(made, **{name: None}) == request()


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"reasoning": False}, {"think": False}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"top_logprobs": 3}, {"logprobs": 3}),
        ({"logprobs": False, "top_logprobs": 3}, {"logprobs": None}),
        ({"logit_bias": {5: -100}}, {"logit_bias": {5: -100}}),
        (
            {"chat_template_kwargs": {"preserve_thinking": True}},
            {"chat_template_kwargs": {"preserve_thinking": True}},
        ),
        ({"reasoning": True}, {"think": True}),
        ({"prompt_cache": False}, {"cache": False}),
        ({"parallel_tool_calls": False}, {"parallel_tool_calls": False}),
        ({"parallel_tool_calls": None}, {"parallel_tool_calls": True}),
        ({"tool_choice": False}, {"tool_choice": "none"}),
        ({"stop": ["a", "b"]}, {"stop": ("a", "b")}),
        (
            {"response_format": Answer},
            {"response_format": {"type": "json_schema", "schema": Answer.model_json_schema()}},
        ),
    ],
)
def test_argument_reaches_the_request(kwargs, expected):
    stop = kwargs.pop("stop", None)
    assert request(stop=stop, **kwargs) == Request([{"role": "user", "content": "Hi"}], **expected)


def test_flash_name_prunes_the_model(tmp_path, monkeypatch):
    """qwen3.5-397b-flash is its checkpoint with K=4; a copy of the demo model takes its place."""
    repo = tmp_path / "Qwen3.5-397B-A17B-4bit"
    repo.mkdir()
    for file in find(DEMO).iterdir():
        (repo / file.name).symlink_to(file)
    monkeypatch.setenv("FLASHMOE_CONFIG", str(tmp_path / "config"))
    registry.add("big", repo)
    flash = ChatFlashMoE(model="qwen3.5-397b-flash")
    assert request(flash).experts == 4
    assert request(flash, experts=6).experts == 6
    assert request(ChatFlashMoE(model="qwen3.5-397b")).experts is None
    assert flash.profile["max_input_tokens"] == 4096


def test_answer_of_a_schema_is_exactly_one_call():
    made = ChatFlashMoE(model=DEMO)
    chain = made.with_structured_output(Answer, method="function_calling")
    assert chain.first.kwargs["parallel_tool_calls"] is False
    assert chain.first.kwargs["tool_choice"] == "Answer"


def test_settings_reach_the_engine():
    settings = {"memory": "1GB", "context": 900, "io": "uncached", "activations": "int8"}
    made = ChatFlashMoE(model=DEMO, **settings)
    engine, _ = made._request(CallOptions.merge(made, None, {}), [HumanMessage("Hi")])
    assert engine.options == EngineOptions(**settings)
    bare = ChatFlashMoE(model=DEMO)
    engine, _ = bare._request(CallOptions.merge(bare, None, {}), [HumanMessage("Hi")])
    assert engine.options == EngineOptions()
