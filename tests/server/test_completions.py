"""Test completions, tokenize and the names of one checkpoint over a toy model."""

import httpx
import openai
import pytest
from server_in_thread import serve
from toys import write_chat_toy

from flashmoe.chat.infill import infill_tokens
from flashmoe.chat.token_counter import token_counter
from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.checkpoint.tokenizer import read_tokenizer
from flashmoe.engine import Engine
from flashmoe.errors import SettingError
from flashmoe.requests import Request
from flashmoe.server.served_model import ServedModel

COLD = {"model": "toy", "temperature": 0, "max_tokens": 6}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_chat_toy(tmp_path_factory.mktemp("toys") / "chat", num_experts=12)


@pytest.fixture(scope="module")
def toy(path):
    with Engine(path, batch=4, prompt_store=0, memory="2GB") as engine:
        yield engine


@pytest.fixture(scope="module")
def url(toy, path):
    names = {"toy": None, "toy-flash": 2}
    models = [
        ServedModel((name,), context=4096, thinks=True, created=7, experts=k, path=path)
        for name, k in names.items()
    ]
    with serve(toy, models=models) as server:
        yield server.url


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def test_text_is_continued_without_a_template(client, toy, path):
    done = client.completions.create(**COLD, prompt="Once upon a time")
    tokens = token_counter(path).encode("Once upon a time")
    assert done.usage.prompt_tokens == len(tokens)
    events = list(toy.stream(Request([], prompt=tokens, temperature=0, max_tokens=6)))
    text = "".join(getattr(event, "text", "") for event in events)
    assert done.choices[0].text == text
    assert done.choices[0].finish_reason == "length"
    chunks = list(client.completions.create(**COLD, prompt="Once upon a time", stream=True))
    assert "".join(c.choices[0].text for c in chunks) == text


def test_special_tokens_of_a_raw_prompt_count(client, path):
    turn = "<|im_start|>user\nHi<|im_end|>\n"
    done = client.completions.create(**COLD, prompt=turn)
    assert done.usage.prompt_tokens < len(token_counter(path).encode(turn))


def test_several_prompts_and_answers_are_choices(client):
    alone = [client.completions.create(**COLD, prompt=p).choices[0].text for p in "ab"]
    both = client.completions.create(**COLD, prompt=["a", "b"], n=2, echo=True)
    expected = ["a" + alone[0], "a" + alone[0], "b" + alone[1], "b" + alone[1]]
    assert [c.text for c in both.choices] == expected
    assert both.usage.completion_tokens == 24
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = client.completions.create(**COLD, prompt=["a", "b"], **options)
    texts = ["", ""]
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == alone
    assert last.usage.completion_tokens == 12


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": ["a", 3]}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": "a", "n": 17}, "n"),
        ({"prompt": "a", "logprobs": 3}, "logprobs"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": [1], "suffix": "b"}, "suffix"),
        ({"prompt": "a", "messages": []}, "messages"),
    ],
)
def test_field_that_cannot_be_used_is_named(url, fields, param):
    response = httpx.post(url + "/completions", json=COLD | fields, timeout=60)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error


def test_gap_is_between_the_tokens_of_the_tokenizer(path):
    tokenizer = read_tokenizer(Checkpoint.open(path))

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)

    with pytest.raises(SettingError, match="to fill in the middle"):
        infill_tokens(tokenizer, encode, "a", "b")
    names = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    tokens = infill_tokens(tokenizer, encode, "a", "b")
    assert tokenizer.decode(tokens) == "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>"


def test_tokens_of_a_text_and_of_messages_are_counted(url, client):
    base = url.removesuffix("/v1")
    text = httpx.post(base + "/tokenize", json={"content": "Hello there"}, timeout=60).json()
    assert text["count"] == len(text["tokens"]) > 1
    ask = [{"role": "user", "content": "Hello there"}]
    counted = httpx.post(base + "/tokenize", json={"messages": ask}, timeout=60).json()
    done = client.chat.completions.create(**COLD | {"max_tokens": 1}, messages=ask)
    assert counted["count"] == done.usage.prompt_tokens
    wrong = httpx.post(base + "/tokenize", json={"content": 3}, timeout=60)
    assert wrong.status_code == 400


def test_names_of_one_checkpoint_differ_in_experts(client):
    ask = {"messages": [{"role": "user", "content": "Hi"}]}
    for name, k in (("toy", 3), ("toy-flash", 2)):
        done = client.chat.completions.create(**COLD | {"model": name}, **ask)
        assert (done.model, done.flashmoe["experts"]) == (name, k)
    more = client.chat.completions.create(
        **COLD | {"model": "toy-flash"}, **ask, extra_body={"experts": 1}
    )
    assert more.flashmoe["experts"] == 1
    models = client.models.list()
    assert [m.id for m in models] == ["toy", "toy-flash"]
    assert [m["slug"] for m in models.models] == ["toy", "toy-flash"]
    assert (models.has_more, models.first_id) == (False, "toy")
