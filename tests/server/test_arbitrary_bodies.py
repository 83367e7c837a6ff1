"""Test that bodies of any JSON are read or refused by each API, without another exception."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashmoe.errors import FlashMoEError
from flashmoe.server import completions, messages, ollama, responses
from flashmoe.server.openai_errors import ApiError
from flashmoe.server.served_model import ServedModel, ServedModels

SERVED = ServedModels([ServedModel(("toy",), context=512, thinks=True, created=7)])


def one_of(text: str):
    return st.sampled_from(text.split())


#: Words that lead into the code, beside others.
WORDS = one_of(
    "message reasoning function_call custom_tool_call function_call_output item_reference text "
    "input_text input_image tool_use tool_result thinking document user assistant system tool "
    "function custom namespace allowed_tools auto any required json json_schema enabled f"
)
SCALARS = st.none() | st.booleans() | st.integers(-2, 3) | WORDS
SCALARS |= st.just(1e400) | st.just("\ud83d")
NAMES = one_of(
    "type role content text name arguments input output call_id id tools tool_calls function "
    "namespace description parameters input_schema format schema summary encrypted_content source "
    "data thinking tool_use_id is_error effort budget_tokens mode definition json_schema"
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=5),
    max_leaves=12,
)
READERS = {
    "responses": (
        responses.responses_api(responses.ResponseStore(1)).read,
        {"input": "Hi"},
        "input tools tool_choice text reasoning include instructions previous_response_id stop",
    ),
    "messages": (
        messages.read_messages,
        {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3},
        "messages system tools tool_choice thinking output_config output_format stop_sequences",
    ),
    "completions": (completions.read_completions, {"prompt": "Hi"}, "prompt n echo stop logprobs"),
    "ollama": (
        ollama.ollama_api(lambda: 0.0).read,
        {"messages": [{"role": "user", "content": "Hi"}]},
        "messages tools format options think",
    ),
}


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_body_is_read_or_refused(name, data):
    read, base, fields = READERS[name]
    field = data.draw(st.sampled_from(fields.split()))
    value = data.draw(VALUES | st.lists(st.dictionaries(NAMES, VALUES, max_size=5), max_size=3))
    body = json.dumps({"model": "toy"} | base | {field: value}).encode()
    refusal = None
    try:
        read(body, SERVED)
    except FlashMoEError:
        pass
    except ApiError as e:
        refusal = e
    assert refusal is None or (400 <= refusal.status < 502 and len(str(refusal)) < 2000)


@pytest.mark.parametrize("value", [{}, [], [{}]])
def test_type_that_is_no_text_is_refused(value):
    read = READERS["responses"][0]
    body = json.dumps({"model": "toy", "input": [{"type": value}]}).encode()
    with pytest.raises(ApiError, match="type"):
        read(body, SERVED)
