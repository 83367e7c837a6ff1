"""Run LangChain's own integration tests of a chat model on the bundled demo model."""

import re
import tempfile
from copy import deepcopy
from pathlib import Path

import pytest
from langchain_tests.integration_tests import ChatModelIntegrationTests

from flashmoe.catalog import DEMO, find
from langchain_flashmoe import ChatFlashMoE

#: `make test-all` runs these.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def another_model():
    """Link the demo model in another directory as a second model, which a call may name."""
    with tempfile.TemporaryDirectory(prefix="flashmoe-another-") as directory:
        for file in find(DEMO).iterdir():
            (Path(directory) / file.name).symlink_to(file)
        ChatModelTests.another_model = directory
        yield


class SpellsNothing(ChatFlashMoE):
    """A model whose tool schema allows only the customer name that the message quotes.

    The demo model writes English only, so it could not copy the names that the test of Unicode asks
    for. The tool is called by `tool_choice`. The model still writes the call token by token, and
    the call is parsed as usual.
    """

    def _generate(self, messages, stop=None, run_manager=None, *, tools, **kwargs):
        tools = deepcopy(tools)
        parameters = tools[0]["function"]["parameters"]["properties"]
        parameters["customer_name"]["enum"] = re.findall("'(.+?)'", messages[-1].text)
        parameters["description"]["maxLength"] = 40
        return super()._generate(messages, stop, run_manager, tools=tools, **kwargs)


class ChatModelTests(ChatModelIntegrationTests):
    another_model: str

    @pytest.fixture
    def model(self, request):
        kind = self.chat_model_class
        if request.node.originalname == "test_unicode_tool_call_integration":
            kind = SpellsNothing
        return kind(**self.chat_model_params, **(getattr(request, "param", None) or {}))

    @property
    def chat_model_class(self):
        return ChatFlashMoE

    @property
    def chat_model_params(self):
        # Greedy decoding, so that the demo model does each time what it can do.
        return {"model": DEMO, "temperature": 0, "max_tokens": 150}

    @property
    def has_tool_calling(self):
        return True

    @property
    def has_tool_choice(self):
        return True

    @property
    def has_structured_output(self):
        return True

    @property
    def supports_json_mode(self):
        return True

    @property
    def supports_anthropic_inputs(self):
        return True

    @property
    def returns_usage_metadata(self):
        return True

    @property
    def supported_usage_metadata_details(self):
        details = ["reasoning_output", "cache_read_input"]
        return {"invoke": details, "stream": details}

    @property
    def supports_model_override(self):
        return True

    @property
    def model_override_value(self):
        return self.another_model

    @property
    def enable_vcr_tests(self):
        # Without HTTP there is nothing to record, and the test times the stream itself.
        return True

    def invoke_with_reasoning_output(self, *, stream=False):
        message = self._answer(stream, reasoning=True)
        assert message.usage_metadata["output_token_details"]["reasoning"] > 0
        return message

    def invoke_with_cache_read_input(self, *, stream=False):
        self._answer(stream)
        message = self._answer(stream)
        assert message.usage_metadata["input_token_details"]["cache_read"] > 0
        return message

    def _answer(self, stream, **kwargs):
        model = ChatFlashMoE(**self.chat_model_params, **kwargs)
        if not stream:
            return model.invoke("Why is the sky blue?")
        first, *rest = model.stream("Why is the sky blue?")
        return first + rest


class TestChatFlashMoE(ChatModelTests):
    pass


class TestByFunctionCalling(ChatModelTests):
    """Runs the suite with function calling as the method of structured output."""

    @property
    def structured_output_kwargs(self):
        return {"method": "function_calling"}
