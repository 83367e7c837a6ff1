"""Answers that go through the model together: the same as alone, each with its own state."""

import asyncio
import shutil
import threading
import time
from contextlib import contextmanager

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from toys import FAMILIES, write_chat_toy, write_toy

from flashmoe.catalog import DEMO, find
from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.engine import Engine
from flashmoe.errors import FlashMoEError, OutputError, ReadError, SettingError
from flashmoe.events import End, Progress, Text, ToolCall
from flashmoe.generation import batch as batch_module
from flashmoe.generation.batch import Batch
from flashmoe.models.layerwise import Chunk, sweep
from flashmoe.models.loading import load_streaming
from flashmoe.models.resident import same
from flashmoe.requests import Request
from flashmoe.streaming.elastic_slots import lasting_nbytes, sequences_nbytes

ADD = {
    "name": "add",
    "description": "Add two numbers",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
    },
}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}


def request(text: str, **options) -> Request:
    options = {"max_tokens": 10, "temperature": 0.0} | options
    return Request([{"role": "user", "content": text}], **options)


def mixed(count: int) -> list[Request]:
    """Prompts and answers of all lengths; tools, schemas, seeds, stops, penalties, thoughts."""
    kinds = [
        request("Tell me a story about a cat.", max_tokens=25),
        request("Add 3 and 4.", tools=[ADD], tool_choice="required", max_tokens=60),
        request("word " * 300, max_tokens=3),
        request("Who are you?", response_format={"type": "json_schema", "schema": PERSON}),
        request("Sing.", temperature=0.9, seed=11, max_tokens=18),
        request("Sing.", temperature=0.9, seed=12, top_p=0.8, max_tokens=12),
        request("Why?", think=True, thinking_budget=4, max_tokens=30),
        request("Count.", stop=("e",), max_tokens=30),
        request("a b c d", repetition_penalty=1.4, max_tokens=22, cache=False),
        request("One.", max_tokens=1),
    ]
    return [kinds[i % len(kinds)] for i in range(count)]


def outcome(events):
    """All of an answer but its figures."""
    found = []
    try:
        for event in events:
            if isinstance(event, End):
                counts = event.generated_tokens, event.forced_tokens, event.reasoning_tokens
                found.append((event.finish_reason, event.steps, event.prompt_tokens, counts))
            elif isinstance(event, ToolCall):
                found.append((event.name, event.arguments))
            elif not isinstance(event, Progress):
                found.append(getattr(event, "text", None))
    except FlashMoEError as e:
        found.append((type(e).__name__, str(e)))
    return found


def gather(engine, requests):
    answers = [engine.stream(r) for r in requests]
    found = [None] * len(answers)

    def work(i):
        found[i] = list(answers[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(answers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return found


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_chat_toy(tmp_path_factory.mktemp("toys") / "chat", num_experts=12)


SETTINGS = {"prompt_store": 0, "memory": "2GB"}


@pytest.fixture(scope="module")
def alone(toy):
    """Answers one after the other."""
    with Engine(toy, batch=1, **SETTINGS) as engine:
        yield [outcome(engine.stream(r)) for r in mixed(10)]


@pytest.mark.parametrize("count", [2, 5, 16])
@pytest.mark.parametrize("settings", [SETTINGS, {"slots": 5, "prompt_store": 0}])
def test_answer_depends_on_what_runs_beside_it(toy, alone, count, settings):
    requests = mixed(count)
    with Engine(toy, **settings) as engine:
        answers = [engine.stream(r) for r in requests]
        found = [outcome(a) for a in answers]
    assert found == [alone[i % 10] for i in range(count)]


@pytest.mark.parametrize("slots", [5, 26])
@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_in_a_sweep_change_a_bit(tmp_path, family, slots):
    """Prompts, answers of one token and of several, in one sweep, against each alone."""
    path = write_toy(tmp_path / "toy", family, num_experts=27)
    model = load_streaming(Checkpoint.open(path), slots=slots)
    prompts = [[3], [5, 7, 9], list(range(40)), list(range(100, 160)), [1, 2]]
    nexts = [[4], [6], [8, 9, 10], [11], [12, 13]]

    def steps(together: bool):
        caches = [make_prompt_cache(model) for _ in prompts]
        found = []
        pieces = [Chunk(p, c) for p, c in zip(prompts, caches, strict=True)]
        for swept in [sweep(model, pieces)] if together else [sweep(model, [p]) for p in pieces]:
            found += [model.logits(s.hidden) for s in swept]
        for _ in range(3):
            if together:
                # One of them reads its prompt again, beside the answers.
                again = Chunk(prompts[2], make_prompt_cache(model))
                more = [Chunk(n, c, step=True) for n, c in zip(nexts, caches, strict=True)]
                found += [model.logits(s.hidden) for s in sweep(model, [again, *more])[1:]]
            else:
                for n, c in zip(nexts, caches, strict=True):
                    found.append(model.next_logits(n, c))
                    mx.eval(found[-1], [x.state for x in c])
        return [np.array(f.astype(mx.float32)) for f in found]

    assert same(steps(True), steps(False))
    model.close()


@pytest.mark.parametrize(("bits", "activations"), [(4, "float32"), (None, "float32"), (4, "int8")])
@pytest.mark.parametrize("family", FAMILIES)
def test_row_of_a_stack_has_other_bits_than_the_model_gives(tmp_path, family, bits, activations):
    """Nine answers as one array, of contexts of their own, against the model's own calls."""
    path = write_toy(tmp_path / "toy", family, num_experts=11, bits=bits)
    for slots in (11, 6) if bits and activations == "float32" else (6,):
        model = load_streaming(Checkpoint.open(path), slots=slots, activations=activations)
        assert model.stacks == (model.ops == "cpu")
        lengths = [1, 2, 30, 5, 17, 3, 260, 8, 4]
        caches = [[make_prompt_cache(model) for _ in lengths] for _ in range(2)]
        for mine in caches:
            for n, cache in zip(lengths, mine, strict=True):
                mx.eval(model.next_logits([i % 150 for i in range(n)], cache))
        for token in (3, 5, 7):
            pieces = [Chunk([token + i], c, step=True) for i, c in enumerate(caches[0])]
            stacked = model.logits_of([s.hidden for s in sweep(model, pieces)])
            alone = [model.next_logits([token + i], c) for i, c in enumerate(caches[1])]
            assert same([*map(np.array, stacked)], [*map(np.array, alone)])
        states = [
            [x for c in mine for _, x in tree_flatten([y.state for y in c])] for mine in caches
        ]
        assert same(
            *([np.array(x) for x in s if isinstance(x, mx.array) and x.ndim] for s in states)
        )
        model.close()


def test_halves_go_one_after_the_other(tmp_path):
    """They take turns at each layer, where the slots hold the experts of both."""
    model = load_streaming(Checkpoint.open(write_toy(tmp_path / "toy", num_experts=27)), slots=26)
    caches = [make_prompt_cache(model) for _ in range(4)]
    sweep(model, [Chunk([i, 30 + i], c) for i, c in enumerate(caches)])
    entered = []
    model.watch.entered = entered.append
    sweep(model, [Chunk([i], c, step=True) for i, c in enumerate(caches)])
    assert entered == [0, 0, 1, 1, 2, 2, 3, 3]
    model.room._resize(5)
    entered.clear()
    sweep(model, [Chunk([i], c, step=True) for i, c in enumerate(caches)])
    assert entered == [0, 1, 2, 3]
    model.close()


def test_batch_reads_an_expert_twice(tmp_path):
    checkpoint = Checkpoint.open(write_toy(tmp_path / "toy", num_experts=11))
    model = load_streaming(checkpoint, slots=5)
    caches = [make_prompt_cache(model) for _ in range(8)]
    sweep(model, [Chunk([i, 30 + i], c) for i, c in enumerate(caches)])
    before = model.stats
    sweep(model, [Chunk([i], c, step=True) for i, c in enumerate(caches)])
    spent = model.stats - before
    layers = len(checkpoint.expert_layers)
    assert spent.needed <= 11 * layers < 8 * 3 * layers
    expert = next(iter(checkpoint.expert_layers.values())).expert_nbytes
    assert spent.reads.bytes == spent.loaded * expert
    model.close()


def test_cancelled_answers_change_the_others(toy, alone):
    requests = mixed(16)
    with Engine(toy, **SETTINGS) as engine:
        cancels = [threading.Event() for _ in requests]
        answers = [engine.stream(r, c) for r, c in zip(requests, cancels, strict=True)]
        first = [next(a) for a in answers[::5]]
        for cancel in cancels[::5]:
            cancel.set()
        answers[7].close()
        found = [outcome(a) for a in answers]
    assert first
    for i, events in enumerate(found):
        if i % 5 == 0:
            # Some were over before they were cancelled.
            assert events[-1][0] == "cancelled" or events[-1] == alone[i % 10][-1]
        elif i != 7:
            assert events == alone[i % 10], i
    assert found[7] == []
    assert any(events[-1][0] == "cancelled" for events in found[::5])


def test_figures_of_a_batch_are_not_those_of_all(toy):
    requests = [request(f"Say {i} words.", max_tokens=12) for i in range(6)]
    with Engine(toy, slots=5, prompt_store=0) as engine:
        ends = [events[-1] for events in gather(engine, requests)]
        total = engine._batch._model.stats
        assert max(end.batch for end in ends) > 1
        assert sum(end.bytes_read for end in ends) == pytest.approx(total.reads.bytes, abs=6)
        alone = list(engine.stream(requests[0]))[-1]
        assert alone.batch == 1
        assert alone.figures()["batch"] == 1
        assert max(end.bytes_read for end in ends) < alone.bytes_read


def test_error_of_one_row_ends_the_others(toy, alone):
    short = request("Who?", response_format={"type": "json_schema", "schema": PERSON}, max_tokens=2)
    with Engine(toy, **SETTINGS) as engine:
        answers = [engine.stream(r) for r in [*mixed(5), short, request("x", experts=99)]]
        found = [outcome(a) for a in answers]
    assert found[:5] == alone[:5]
    assert found[5][-1][0] == OutputError.__name__
    assert "cut short" in found[5][-1][1]
    assert found[6][-1][0] == SettingError.__name__


def test_requests_of_another_k_run_together(toy):
    """They wait, and give what they give alone."""
    requests = [request("Tell me.", experts=k, max_tokens=6) for k in (None, 1, 1, 2, None, 2)]
    with Engine(toy, batch=1, **SETTINGS) as engine:
        expected = [outcome(engine.stream(r)) for r in requests]
    with Engine(toy, **SETTINGS) as engine:
        answers = [engine.stream(r) for r in requests]
        found = [list(a) for a in answers]
    assert [outcome(events) for events in found] == expected
    assert [events[-1].experts for events in found] == [3, 1, 1, 2, 3, 2]


def test_more_rows_than_were_asked_for(toy):
    with Engine(toy, batch=3, **SETTINGS) as engine:
        answers = [engine.stream(request(f"Say {i}.", max_tokens=20)) for i in range(9)]
        ends = [list(a)[-1] for a in answers]
    assert max(end.batch for end in ends) == 3


@pytest.mark.parametrize("batch", [0, -1])
def test_batch_without_rows_is_taken(toy, batch):
    with pytest.raises(SettingError, match=f"batch={batch} must be 1 or more"):
        Engine(toy, batch=batch)


@contextmanager
def idle_session(path, **settings):
    from flashmoe.generation.loaded_model import LoadedModel

    session = LoadedModel(path, prompt_store=0, **settings)
    yield session
    session.close()


class Waiting:
    """A job whose events are kept."""

    def __init__(self, text: str, **options):
        self.request = request(text, **options)
        self.events = []
        self.put = self.events.append
        self.cancelled = threading.Event()


def test_rows_take_more_memory_than_there_is(toy):
    with idle_session(toy, memory="2GB") as session:
        batch = Batch(session)
        first, second = Waiting("word " * 200), Waiting("word " * 200)
        room = session.model.room
        assert batch.admit(first)
        held = lasting_nbytes(room._plan) + room._plan.least_slots * room._plan.slot_nbytes
        one = sequences_nbytes(
            session.checkpoint, 400, [batch.rows[0].most_context], 3, on_gpu=False
        )
        # Enough for one and a bit.
        room._budget = lambda: held + int(1.3 * one)
        assert not batch.admit(second)
        assert not batch.admit(second)
        while batch.rows:
            batch.step()
        assert isinstance(first.events[-1], End)
        assert batch.admit(second)
        while batch.rows:
            batch.step()
        assert outcome(second.events) == outcome(first.events)


def test_memory_that_becomes_short_ends_all(toy):
    """The row that came last gives way, with the reason."""
    with idle_session(toy, memory="2GB") as session:
        batch = Batch(session)
        jobs = [Waiting("One."), Waiting("word " * 900)]
        assert all(batch.admit(job) for job in jobs)
        room = session.model.room
        held = lasting_nbytes(room._plan) + room._plan.least_slots * room._plan.slot_nbytes
        one = sequences_nbytes(session.checkpoint, 600, [600], 3, on_gpu=False)
        room._budget = lambda: held + one
        while batch.rows:
            batch.step()
    assert isinstance(jobs[0].events[-1], End)
    assert "shorten it, or load the model with" in str(jobs[1].events[-1])


def test_read_error_leaves_rows_behind(tmp_path):
    path = write_chat_toy(tmp_path / "chat", num_experts=12)
    with Engine(path, slots=5, prompt_store=0) as engine:
        answers = [engine.stream(request("Tell me.", max_tokens=3000, seed=i)) for i in range(4)]
        for answer in answers:
            next(e for e in answer if isinstance(e, Text))
        shutil.copy2(path / "model.safetensors", tmp_path / "copy")
        (path / "model.safetensors").unlink()
        for answer in answers:
            with pytest.raises(ReadError, match="was deleted"):
                list(answer)
        (tmp_path / "copy").rename(path / "model.safetensors")
        assert outcome(engine.stream(request("Hello.")))[-1][0] in ("length", "stop")


def test_engine_closed_in_a_batch_leaves_callers_waiting(toy):
    engine = Engine(toy, batch=2, **SETTINGS)
    answers = [engine.stream(request("Tell me.", max_tokens=3000, seed=i)) for i in range(5)]
    next(answers[0])
    closing = threading.Thread(target=engine.close)
    closing.start()
    for answer in answers:
        with pytest.raises(RuntimeError, match="is closed"):
            list(answer)
    closing.join(20)
    assert not closing.is_alive()


def test_long_prompt_stops_the_others(toy, monkeypatch):
    """They get a token in each of its sweeps."""
    monkeypatch.setattr(batch_module, "fitting", lambda pieces, limit: 1)
    with idle_session(toy, memory="2GB") as session:
        batch = Batch(session)
        short, long = Waiting("One.", max_tokens=9), Waiting("word " * 2500, max_tokens=2)
        batch.admit(short)
        while batch.rows[0].reads:
            batch.step()
        batch.admit(long)
        generated = []
        while batch.rows and batch.rows[-1].reads:
            batch.step()
            generated.append(sum(r.turn.generated for r in batch.rows if not r.reads))
        while batch.rows:
            batch.step()
    assert len(generated) > 4
    assert generated[:4] == [2, 3, 4, 5]
    assert [type(j.events[-1]) for j in (short, long)] == [End, End]


def test_one_request_is_swept(toy, monkeypatch):
    """Alone, each step is the model's own call."""
    with idle_session(toy, memory="2GB") as session:
        batch, swept = Batch(session), []
        monkeypatch.setattr(batch_module, "sweep", lambda *a: swept.append(a) or sweep(*a))
        job = Waiting("One.", max_tokens=9)
        batch.admit(job)
        while batch.rows:
            batch.step()
    assert job.events[-1].steps > 3
    assert len(swept) == 1


def test_demo_answers_otherwise_in_a_batch():
    """The real model, whose likeliest tokens are not far from the next ones."""
    animals = ("cat", "dog", "owl", "fox")
    requests = [request(f"Tell me about a {a}.", max_tokens=24) for a in animals]
    requests.append(request("What is 12 plus 30?", tools=[ADD], max_tokens=40))
    with Engine(find(DEMO), batch=1, slots=20, prompt_store=0) as engine:
        expected = [outcome(engine.stream(r)) for r in requests]
    start = time.perf_counter()
    with Engine(find(DEMO), slots=20, prompt_store=0) as engine:
        answers = [engine.stream(r) for r in requests]
        found = [outcome(a) for a in answers]
    assert found == expected
    assert time.perf_counter() - start < 60


@pytest.mark.parametrize("ticks", range(6))
def test_cancelling_is_forgotten_when_an_event_comes(toy, ticks):
    """A task that is cancelled as an event reaches its loop ends, with a timeout and without."""

    async def ask(engine, timeout) -> None:
        loop, puts = asyncio.get_running_loop(), []
        task = asyncio.current_task()
        threadsafe = loop.call_soon_threadsafe

        def later(left: int) -> None:
            if left:
                loop.call_soon(later, left - 1)
            else:
                task.cancel()

        def put(*args):
            threadsafe(*args)
            puts.append(args)
            if len(puts) == 4:
                threadsafe(later, ticks)

        loop.call_soon_threadsafe = put
        async for _ in engine.astream(request("Go on.", max_tokens=40), timeout=timeout):
            pass

    with Engine(toy, **SETTINGS) as engine:
        for timeout in (None, 60):
            with pytest.raises(asyncio.CancelledError):
                asyncio.run(ask(engine, timeout))
