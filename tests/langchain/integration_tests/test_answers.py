"""Test answers of the demo model through every interface of LangChain, and their cancellation."""

import asyncio
import time

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler, get_usage_metadata_callback
from langchain_core.exceptions import ContextOverflowError, ModelTimeoutError
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, trim_messages
from langchain_core.rate_limiters import BaseRateLimiter
from langchain_core.runnables import ConfigurableField

from flashmoe.catalog import DEMO, find
from flashmoe.engine import shared
from flashmoe.errors import ContextError, TimedOut
from langchain_flashmoe import (
    ChatFlashMoE,
    IncompleteOutput,
    InvalidRequest,
    ModelFailed,
    ModelNotFound,
)

#: `make test-all` runs these.
pytestmark = pytest.mark.slow

# All tokens are equally likely, and one of thousands ends an answer, so the answer is very long.
ENDLESS = {"max_tokens": 3500, "temperature": 100, "top_k": 0, "top_p": 1, "min_p": 0, "seed": 1}


def model(**kwargs):
    return ChatFlashMoE(**{"model": DEMO, "temperature": 0, "max_tokens": 40} | kwargs)


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


async def test_every_interface_gives_the_same_answer():
    made = model()
    text = made.invoke("What is a dog?").text
    assert len(text) > 20
    assert "".join(c.text for c in made.stream("What is a dog?")) == text
    assert (await made.ainvoke("What is a dog?")).text == text
    assert "".join([c.text async for c in made.astream("What is a dog?")]) == text
    assert made.invoke("What is a dog?", stream=True).text == text
    assert model(streaming=True).invoke("What is a dog?").text == text
    assert model(disable_streaming=True).invoke("What is a dog?").text == text
    assert made.with_config(tags=["x"]).invoke([HumanMessage("What is a dog?")]).text == text
    v1 = model(output_version="v1").invoke("What is a dog?")
    assert v1.content[0]["type"] == "text"
    assert v1.text == text


QUESTIONS = [f"What is {what}?" for what in ("a dog", "the sun", "bread", "a tree", "rain")] * 4


async def test_concurrent_answers_are_not_mixed():
    made = model(max_tokens=12)
    expected = [made.invoke(question).text for question in QUESTIONS[:5]] * 4
    assert len(set(expected)) == 5
    together = made.batch(QUESTIONS)
    assert [m.text for m in together] == expected
    assert max(m.response_metadata["batch"] for m in together) > 2
    assert [m.text for m in await made.abatch(QUESTIONS)] == expected

    async def cancelled():
        async for chunk in made.astream("Tell me a story.", **ENDLESS):
            if chunk.text:
                break

    given_up = asyncio.create_task(cancelled())
    answers = await asyncio.gather(*(made.ainvoke(question) for question in QUESTIONS))
    await given_up
    assert [m.text for m in answers] == expected


def nothing_else_is_generated() -> bool:
    """Return whether no step of a new answer is shared with an older answer that goes on."""
    return model(max_tokens=2).invoke("Hi").response_metadata["batch"] == 1


async def until_generating():
    """Wait until the engine computes an answer."""
    while not shared(find(DEMO)).running:
        await asyncio.sleep(0.01)


async def test_cancelled_answer_is_not_generated_any_more():
    made = model(**ENDLESS)
    stream = made.stream("Tell me a story.")
    next(stream)
    stream.close()
    assert nothing_else_is_generated()

    stream = made.astream("Tell me a story.")
    await anext(stream)
    await stream.aclose()
    assert nothing_else_is_generated()

    task = asyncio.create_task(made.ainvoke("Tell me a story."))
    await asyncio.wait_for(until_generating(), 120)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert nothing_else_is_generated()

    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(made.ainvoke("Tell me a story."), 0.5)
    assert nothing_else_is_generated()


async def test_answer_beyond_its_timeout_is_cancelled():
    made = model(**ENDLESS, timeout=0.5)
    with pytest.raises(ModelTimeoutError, match="timeout=0.5 seconds.*raise timeout") as raised:
        made.invoke("Tell me a story.")
    assert isinstance(raised.value, TimedOut)
    assert raised.value.is_retryable
    with pytest.raises(TimeoutError):
        await made.ainvoke("Tell me a story.")
    with pytest.raises(TimeoutError):
        list(made.stream("Tell me a story."))
    assert nothing_else_is_generated()


def test_timeout_includes_the_time_in_the_queue():
    first = model(**ENDLESS).stream("Tell me a story.")
    next(first)
    with pytest.raises(TimeoutError, match="other requests may have run before it"):
        model(timeout=0.5, experts=4).invoke("Hi")  # another K waits for the others
    first.close()


def test_stop_strings_of_the_model_and_the_call_are_used():
    text = model().invoke("What is a dog?").text
    first, second = text.split()[3], text.split()[6]
    assert first in model().invoke("What is a dog?").text
    of_model = model(stop=[first]).invoke("What is a dog?")
    assert of_model.text == text[: text.index(first)]
    assert of_model.response_metadata["finish_reason"] == "stop"
    for stopped in (
        model(stop=[first]).invoke("What is a dog?", stop=[second]),
        model(stop=[second]).invoke("What is a dog?", stop=[first]),
    ):
        assert stopped.text == text[: text.index(first)]
    assert model().invoke("What is a dog?", stop=first).text == of_model.text
    # This string spans several tokens, and neither begins nor ends where one does.
    middle = text[8:19]
    assert model(stop=middle).invoke("What is a dog?").text == text[: text.index(middle)]


def test_reasoning_is_apart_from_the_answer():
    silent = model(max_tokens=300).invoke("What is 3 plus 4?")
    assert "reasoning_content" not in silent.additional_kwargs
    made = model(reasoning=True, max_tokens=300)
    message = made.invoke("What is 3 plus 4?")
    reasoning = message.additional_kwargs["reasoning_content"]
    assert reasoning
    assert "<think>" not in message.text + reasoning
    assert message.content_blocks[0] == {"type": "reasoning", "reasoning": reasoning}
    count = message.usage_metadata["output_token_details"]["reasoning"]
    assert 0 < count <= message.usage_metadata["output_tokens"]
    chunks = list(made.stream("What is 3 plus 4?"))
    assert "".join(c.additional_kwargs.get("reasoning_content", "") for c in chunks) == reasoning
    assert "".join(c.text for c in chunks) == message.text
    v1 = model(reasoning=True, max_tokens=300, output_version="v1").invoke("What is 3 plus 4?")
    assert [block["type"] for block in v1.content] == ["reasoning", "text"]
    short = model(reasoning=True, max_tokens=300, thinking_budget=5).invoke("What is 3 plus 4?")
    assert short.usage_metadata["output_token_details"]["reasoning"] < count


def test_call_overrides_the_options_of_the_model():
    made = model()
    assert made.invoke("Hi", max_tokens=3).usage_metadata["output_tokens"] == 3
    pruned = made.invoke("Hi", experts=4)
    assert pruned.response_metadata["experts"] == 4
    assert pruned.response_metadata["trained_experts"] == 10
    assert made.bind(max_tokens=3).invoke("Hi").usage_metadata["output_tokens"] == 3
    same = [made.invoke("Tell me.", temperature=1, seed=0).text for _ in range(2)]
    assert same[0] == same[1] != made.invoke("Tell me.", temperature=1, seed=5).text


def test_models_that_differ_by_k_share_an_engine():
    model().invoke("Hi")
    engine = shared(find(DEMO))
    model(experts=4).invoke("Hi")
    assert shared(find(DEMO)) is engine
    made = model()
    with made:
        made.invoke("Hi")
    assert engine.closed
    assert made.invoke("Hi").text


class Recorder(BaseCallbackHandler):
    def __init__(self):
        self.start = self.first = self.end = None
        self.text = ""

    def on_chat_model_start(self, *args, **kwargs):
        self.start = time.perf_counter()

    def on_llm_new_token(self, token, *, chunk=None, **kwargs):
        assert chunk is not None
        self.text += token
        self.first = self.first or time.perf_counter()

    def on_llm_end(self, response, **kwargs):
        self.end = time.perf_counter()


async def test_callbacks_get_every_token_once():
    made = model()

    async def drain():
        async for _ in made.astream("What is a dog?", config={"callbacks": [seen[3]]}):
            pass

    seen = [Recorder() for _ in range(4)]
    text = made.invoke("What is a dog?", config={"callbacks": [seen[0]]}).text
    await made.ainvoke("What is a dog?", config={"callbacks": [seen[1]]})
    list(made.stream("What is a dog?", config={"callbacks": [seen[2]]}))
    await drain()
    for recorder in seen:
        assert recorder.text == text
        assert recorder.start < recorder.first < recorder.end
    with get_usage_metadata_callback() as usage:
        message = made.invoke("Hi")
    assert usage.usage_metadata[DEMO] == message.usage_metadata


def test_cache_of_answers_keeps_models_apart():
    cache = InMemoryCache()
    warm = {"temperature": 1, "cache": cache, "max_tokens": 8}
    first = model(**warm).invoke("Tell me.")
    assert model(**warm).invoke("Tell me.").text == first.text
    assert len(cache._cache) == 1
    model(**warm, experts=4).invoke("Tell me.")
    model(**warm, stop=["a"]).invoke("Tell me.", stop=["b"])
    model(**warm, stop=["c"]).invoke("Tell me.", stop=["b"])
    assert len(cache._cache) == 4


class CountingLimiter(BaseRateLimiter):
    """Counts how often it is asked, and never makes a caller wait."""

    asked = 0

    def acquire(self, *, blocking=True):
        self.asked += 1
        return True

    async def aacquire(self, *, blocking=True):
        return self.acquire()


def test_rate_limiter_is_asked_once_for_each_answer():
    limiter = CountingLimiter()
    made = model(max_tokens=1, rate_limiter=limiter)
    for _ in range(3):
        made.invoke("Hi")
    assert limiter.asked == 3


@pytest.mark.parametrize("tools", [None, [add]])
@pytest.mark.parametrize("reasoning", [None, True])
@pytest.mark.parametrize(
    "messages",
    [
        [HumanMessage("Hello there")],
        [SystemMessage("Be kind."), HumanMessage("Hi"), AIMessage("Hello"), HumanMessage("1 + 1?")],
        [HumanMessage("<|im_end|> and \U0001f600")],
    ],
)
def test_count_of_tokens_equals_that_of_the_prompt(messages, reasoning, tools):
    made = model(max_tokens=1, reasoning=reasoning)
    counted = made.get_num_tokens_from_messages(messages, tools=tools)
    bound = made.bind_tools(tools) if tools else made
    assert counted == bound.invoke(messages).usage_metadata["input_tokens"]


def test_parts_of_a_conversation_can_be_counted():
    made = model()
    parts = [SystemMessage("Be kind."), HumanMessage("Hi"), AIMessage("Hello"), HumanMessage("1?")]
    counts = [made.get_num_tokens_from_messages(parts[:n]) for n in range(5)]
    assert counts[0] == 0
    # Conversations that can be answered count the beginning of the answer too.
    assert 0 < counts[1] < counts[3] < counts[2] + 7 < counts[4]
    short, long = "Hello", "Hello there <|im_end|>"
    lengths = [len(made.get_token_ids(text)) for text in (short, long)]
    assert lengths == [made.get_num_tokens(short), made.get_num_tokens(long)]
    counted = [made.get_num_tokens_from_messages([HumanMessage(text)]) for text in (short, long)]
    assert counted[1] - counted[0] == lengths[1] - lengths[0] > 5
    assert model(custom_get_token_ids=lambda text: [1]).get_num_tokens_from_messages(parts) == 4
    kept = trim_messages(
        parts, token_counter=made, max_tokens=counts[4] - 3, include_system=True, start_on="human"
    )
    assert kept == [parts[0], parts[3]]
    with pytest.raises(InvalidRequest, match="two tools"):
        made.get_num_tokens_from_messages(parts, tools=[add, add])
    with pytest.raises(ModelNotFound):
        ChatFlashMoE(model="not-there").get_num_tokens("Hi")
    with pytest.raises(ModelNotFound):
        ChatFlashMoE(model="not-there").get_num_tokens_from_messages(parts)
    with pytest.raises(InvalidRequest, match="takes text only"):
        made.get_num_tokens_from_messages([HumanMessage([{"type": "image"}])])


def test_prompt_beyond_the_context_raises():
    long = "word " * 5000
    with pytest.raises(ContextOverflowError, match="the context of this model is 4096") as raised:
        model().invoke(long)
    assert isinstance(raised.value, ContextError)
    with pytest.raises(ContextOverflowError):
        list(model().stream(long))


def test_mistakes_raise_errors_of_langchain():
    for wrong, words in (
        (lambda: model().invoke(""), "the prompt is empty"),
        (lambda: model(experts=11).invoke("Hi"), "experts=11"),
        (lambda: model().bind_tools([add, add]).invoke("Hi"), "two tools are named 'add'"),
        (lambda: model().invoke("Hi", tools=[add], tool_choice="sub"), "tool_choice='sub'"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            wrong()
    with pytest.raises(ModelFailed, match="memory"):
        model(memory="1KB").invoke("Hi")
    with pytest.raises(InvalidRequest, match="io='fast' must be one of"):
        model(io="fast").invoke("Hi")


def test_answer_cut_short_raises_or_is_returned_on_request():
    made = model(max_tokens=5)
    whole = {"type": "json_schema", "schema": {"type": "array", "minItems": 50, "items": {}}}
    with pytest.raises(IncompleteOutput, match="cut short: max_tokens=5") as raised:
        made.invoke("Hi", response_format=whole)
    assert raised.value.raw_message.response_metadata["finish_reason"] == "length"
    assert raised.value.raw_message.usage_metadata["output_tokens"] == 5
    kept = made.invoke("Hi", response_format=whole, on_incomplete="return")
    assert kept.text == raised.value.llm_output


async def test_wrappers_of_langchain_work():
    made = model(max_tokens=8)
    text = made.invoke("Hi").text
    broken = ChatFlashMoE(model="not-there")
    assert broken.with_fallbacks([made]).invoke("Hi").text == text
    assert made.with_retry().invoke("Hi").text == text
    short = made.configurable_fields(max_tokens=ConfigurableField(id="length"))
    bound = short.with_config(configurable={"length": 2})
    assert bound.invoke("Hi").usage_metadata["output_tokens"] == 2
    kinds = [event["event"] async for event in made.astream_events("Hi")]
    assert kinds[0] == "on_chat_model_start"
    assert kinds[-1] == "on_chat_model_end"
    assert "on_chat_model_stream" in kinds
    assert made.stream_events("Hi", version="v3").output.text == text
