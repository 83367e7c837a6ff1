"""Test that answers of one batch are the same as alone, and end each on its own."""

import asyncio
import shutil
import threading
from contextlib import contextmanager

import mlx.core as mx
import numpy as np
import pytest
from example_tools import ADD
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
from flashmoe.memory.prefill import sequences_nbytes
from flashmoe.models.layerwise import Chunk, run_pass
from flashmoe.models.loading import load_streaming
from flashmoe.models.resident import same
from flashmoe.ops import backend as ops
from flashmoe.options import EngineOptions
from flashmoe.requests import Request

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}


def request(text: str, **options) -> Request:
    options = {"max_tokens": 10, "temperature": 0.0} | options
    return Request([{"role": "user", "content": text}], **options)


def mixed(count: int) -> list[Request]:
    """Return requests with prompts and answers of different lengths and with different options.

    The options are tools, schemas, seeds, stop strings, penalties and reasoning.
    """
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
    """Return everything that an answer consists of, except figures that depend on time."""
    results = []
    try:
        for event in events:
            if isinstance(event, End):
                counts = event.generated_tokens, event.forced_tokens, event.reasoning_tokens
                results.append((event.finish_reason, event.steps, event.prompt_tokens, counts))
            elif isinstance(event, ToolCall):
                results.append((event.name, event.arguments))
            elif not isinstance(event, Progress):
                results.append(getattr(event, "text", None))
    except FlashMoEError as e:
        results.append((type(e).__name__, str(e)))
    return results


def gather(engine, requests):
    """Return the events of all answers, each read by a thread of its own."""
    answers = [engine.stream(r) for r in requests]
    results = [None] * len(answers)

    def work(i):
        results[i] = list(answers[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(answers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    return results


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_chat_toy(tmp_path_factory.mktemp("toys") / "chat", num_experts=12)


SETTINGS = {"prompt_store": 0, "memory": "2GB"}


@pytest.fixture(scope="module")
def alone(toy):
    """Return the outcomes of the mixed requests, answered one after the other."""
    with Engine(toy, batch=1, **SETTINGS) as engine:
        yield [outcome(engine.stream(r)) for r in mixed(10)]


@pytest.mark.parametrize("count", [2, 5, 16])
@pytest.mark.parametrize("settings", [SETTINGS, {"slots": 5, "prompt_store": 0}])
def test_answer_does_not_depend_on_the_rest_of_the_batch(toy, alone, count, settings):
    requests = mixed(count)
    with Engine(toy, **settings) as engine:
        answers = [engine.stream(r) for r in requests]
        results = [outcome(a) for a in answers]
    assert results == [alone[i % 10] for i in range(count)]


@pytest.mark.parametrize("slots", [5, 26])
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_pass_gives_the_same_bits_as_single_passes(tmp_path, family, slots):
    """Compare one pass for prompts and answers of one or several tokens with a pass for each."""
    path = write_toy(tmp_path / "toy", family, num_experts=27)
    model = load_streaming(Checkpoint.open(path), slots=slots)
    prompts = [[3], [5, 7, 9], list(range(40)), list(range(100, 160)), [1, 2]]
    nexts = [[4], [6], [8, 9, 10], [11], [12, 13]]

    def steps(together: bool):
        caches = [make_prompt_cache(model) for _ in prompts]
        results = []
        pieces = [Chunk(p, c) for p, c in zip(prompts, caches, strict=True)]
        for swept in (
            [run_pass(model, pieces)] if together else [run_pass(model, [p]) for p in pieces]
        ):
            results += [model.logits(s.hidden) for s in swept]
        for _ in range(3):
            if together:
                # One prompt is prefilled again beside the answers.
                again = Chunk(prompts[2], make_prompt_cache(model))
                more = [Chunk(n, c, step=True) for n, c in zip(nexts, caches, strict=True)]
                results += [model.logits(s.hidden) for s in run_pass(model, [again, *more])[1:]]
            else:
                for n, c in zip(nexts, caches, strict=True):
                    results.append(model.next_logits(n, c))
                    mx.eval(results[-1], [x.state for x in c])
        return [np.array(f.astype(mx.float32)) for f in results]

    assert same(steps(True), steps(False))
    model.close()


def wide(x: mx.array) -> np.ndarray:
    """Return an array in float32: numpy knows no bfloat16."""
    return np.array(x.astype(mx.float32))


@pytest.mark.parametrize(("bits", "activations"), [(4, "float32"), (None, "float32"), (4, "int8")])
@pytest.mark.parametrize("family", FAMILIES)
def test_stacked_sequences_have_the_same_bits_as_single_calls(tmp_path, family, bits, activations):
    """Compare nine answers with contexts of different lengths with the model's own calls."""
    if activations == "int8" and ops.on_gpu():
        pytest.skip("int8 activations are for the CPU")
    path = write_toy(tmp_path / "toy", family, num_experts=11, bits=bits)
    for slots in (11, 6) if bits and activations == "float32" else (6,):
        model = load_streaming(Checkpoint.open(path), slots=slots, activations=activations)
        assert model.backend.stacks_sequences == (model.backend.name == "cpu")
        lengths = [1, 2, 30, 5, 17, 3, 260, 8, 4]
        caches = [[make_prompt_cache(model) for _ in lengths] for _ in range(2)]
        for mine in caches:
            for n, cache in zip(lengths, mine, strict=True):
                mx.eval(model.next_logits([i % 150 for i in range(n)], cache))
        for token in (3, 5, 7):
            pieces = [Chunk([token + i], c, step=True) for i, c in enumerate(caches[0])]
            stacked = model.logits_of([s.hidden for s in run_pass(model, pieces)])
            alone = [model.next_logits([token + i], c) for i, c in enumerate(caches[1])]
            assert same([*map(wide, stacked)], [*map(wide, alone)])
        states = [
            [x for c in mine for _, x in tree_flatten([y.state for y in c])] for mine in caches
        ]
        assert same(*([wide(x) for x in s if isinstance(x, mx.array) and x.ndim] for s in states))
        model.close()


def test_halves_of_a_batch_alternate_at_each_layer_if_slots_suffice(tmp_path):
    """The halves take turns at a layer only if the slots hold the experts of both."""
    model = load_streaming(Checkpoint.open(write_toy(tmp_path / "toy", num_experts=27)), slots=26)
    caches = [make_prompt_cache(model) for _ in range(4)]
    run_pass(model, [Chunk([i, 30 + i], c) for i, c in enumerate(caches)])
    entered = []
    model.hooks.layer_entered = entered.append
    run_pass(model, [Chunk([i], c, step=True) for i, c in enumerate(caches)])
    assert entered == [0, 0, 1, 1, 2, 2, 3, 3]
    model.elastic_slots._resize(5)
    entered.clear()
    run_pass(model, [Chunk([i], c, step=True) for i, c in enumerate(caches)])
    assert entered == [0, 1, 2, 3]
    model.close()


def test_batch_reads_each_expert_once(tmp_path):
    checkpoint = Checkpoint.open(write_toy(tmp_path / "toy", num_experts=11))
    model = load_streaming(checkpoint, slots=5)
    caches = [make_prompt_cache(model) for _ in range(8)]
    run_pass(model, [Chunk([i, 30 + i], c) for i, c in enumerate(caches)])
    before = model.stats
    run_pass(model, [Chunk([i], c, step=True) for i, c in enumerate(caches)])
    spent = model.stats - before
    layers = len(checkpoint.expert_layers)
    assert spent.needed <= 11 * layers < 8 * 3 * layers
    expert = next(iter(checkpoint.expert_layers.values())).expert_nbytes
    assert spent.reads.bytes == spent.loaded * expert
    model.close()


def test_cancelled_answers_leave_the_others_unchanged(toy, alone):
    requests = mixed(16)
    # Too long to be over before it is cancelled, however slow this thread is.
    requests[0] = request("Tell me a story about a cat.", max_tokens=3000)
    with Engine(toy, **SETTINGS) as engine:
        cancels = [threading.Event() for _ in requests]
        answers = [engine.stream(r, c) for r, c in zip(requests, cancels, strict=True)]
        first = [next(a) for a in answers[::5]]
        for cancel in cancels[::5]:
            cancel.set()
        answers[7].close()
        results = [outcome(a) for a in answers]
    assert first
    for i, events in enumerate(results):
        if i % 5 == 0:
            # The short ones may have been over before they were cancelled.
            assert events[-1][0] == "cancelled" or (i and events[-1] == alone[i % 10][-1])
        elif i != 7:
            assert events == alone[i % 10], i
    assert results[7] == []


def test_bytes_read_are_divided_among_the_answers_of_a_batch(toy):
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


def test_error_of_one_answer_leaves_the_others_unchanged(toy, alone):
    short = request("Who?", response_format={"type": "json_schema", "schema": PERSON}, max_tokens=2)
    with Engine(toy, **SETTINGS) as engine:
        answers = [engine.stream(r) for r in [*mixed(5), short, request("x", experts=99)]]
        results = [outcome(a) for a in answers]
    assert results[:5] == alone[:5]
    assert results[5][-1][0] == OutputError.__name__
    assert "cut short" in results[5][-1][1]
    assert results[6][-1][0] == SettingError.__name__


def test_requests_with_another_k_wait_for_a_batch_of_their_own(toy):
    """The requests wait, and their answers are the same as alone."""
    requests = [request("Tell me.", experts=k, max_tokens=6) for k in (None, 1, 1, 2, None, 2)]
    with Engine(toy, batch=1, **SETTINGS) as engine:
        expected = [outcome(engine.stream(r)) for r in requests]
    with Engine(toy, **SETTINGS) as engine:
        answers = [engine.stream(r) for r in requests]
        results = [list(a) for a in answers]
    assert [outcome(events) for events in results] == expected
    assert [events[-1].experts for events in results] == [3, 1, 1, 2, 3, 2]


def test_batch_is_limited_to_its_setting(toy):
    with Engine(toy, batch=3, **SETTINGS) as engine:
        answers = [engine.stream(request(f"Say {i}.", max_tokens=20)) for i in range(9)]
        ends = [list(a)[-1] for a in answers]
    assert max(end.batch for end in ends) == 3


@pytest.mark.parametrize("batch", [0, -1])
def test_batch_below_one_is_refused(toy, batch):
    with pytest.raises(SettingError, match=f"batch={batch} must be 1 or more"):
        Engine(toy, batch=batch)


@contextmanager
def idle_model(path, **settings):
    from flashmoe.generation.loaded_model import LoadedModel

    loaded = LoadedModel(path, EngineOptions(prompt_store=0, **settings))
    yield loaded
    loaded.close()


def least_nbytes(plan) -> int:
    """Return the bytes that the model needs with the fewest slots, and without any sequence."""
    return plan.lasting + plan.least_slots * plan.slot_nbytes


class RecordedJob:
    """A job that keeps its events."""

    def __init__(self, text: str, **options):
        self.request = request(text, **options)
        self.events = []
        self.put = self.events.append
        self.cancelled = threading.Event()


elastic = pytest.mark.skipif(ops.on_gpu(), reason="on a GPU the number of slots stays")


def admit(batch, loaded, job):
    return batch.admit(loaded.prepare_answer(job))


@elastic
def test_request_waits_until_memory_allows_it(toy):
    with idle_model(toy, memory="2GB") as loaded:
        batch = Batch(loaded)
        first, second = RecordedJob("word " * 200), RecordedJob("word " * 200)
        elastic_slots = loaded.model.elastic_slots
        assert admit(batch, loaded, first)
        held = least_nbytes(elastic_slots._plan)
        one = sequences_nbytes(
            loaded.checkpoint, 400, [batch.sequences[0].planned_context], 3, on_gpu=False
        )
        # Memory for one sequence and a part of another.
        elastic_slots._budget = lambda: held + int(1.3 * one)
        assert not admit(batch, loaded, second)
        assert not admit(batch, loaded, second)
        while batch.sequences:
            batch.step()
        assert isinstance(first.events[-1], End)
        assert admit(batch, loaded, second)
        while batch.sequences:
            batch.step()
        assert outcome(second.events) == outcome(first.events)


@elastic
def test_memory_shortage_ends_only_the_newest_answer(toy):
    """The newest sequence ends with an error that gives the reason."""
    with idle_model(toy, memory="2GB") as loaded:
        batch = Batch(loaded)
        jobs = [RecordedJob("One."), RecordedJob("word " * 900)]
        assert all(admit(batch, loaded, job) for job in jobs)
        elastic_slots = loaded.model.elastic_slots
        held = least_nbytes(elastic_slots._plan)
        one = sequences_nbytes(loaded.checkpoint, 600, [600], 3, on_gpu=False)
        elastic_slots._budget = lambda: held + one
        while batch.sequences:
            batch.step()
    assert isinstance(jobs[0].events[-1], End)
    assert "shorten it, or load the model with" in str(jobs[1].events[-1])


def test_engine_answers_again_after_a_read_error(tmp_path):
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


def test_closing_the_engine_ends_running_and_waiting_answers(toy):
    engine = Engine(toy, batch=2, **SETTINGS)
    answers = [engine.stream(request("Tell me.", max_tokens=3000, seed=i)) for i in range(5)]
    next(answers[0])
    closing = threading.Thread(target=engine.close)
    closing.start()
    for answer in answers:
        with pytest.raises(RuntimeError, match="is closed"):
            list(answer)
    closing.join(300)
    assert not closing.is_alive()


def test_answers_go_on_during_the_prefill_of_a_long_prompt(toy, monkeypatch):
    """Each pass of the prompt also gives a token to the other answers."""
    monkeypatch.setattr(batch_module, "chunks_within", lambda chunks, limit: 1)
    with idle_model(toy, memory="2GB") as loaded:
        batch = Batch(loaded)
        short, long = RecordedJob("One.", max_tokens=9), RecordedJob("word " * 2500, max_tokens=2)
        admit(batch, loaded, short)
        while batch.sequences[0].in_prefill:
            batch.step()
        admit(batch, loaded, long)
        generated = []
        while batch.sequences and batch.sequences[-1].in_prefill:
            batch.step()
            generated.append(sum(r.answer.generated for r in batch.sequences if not r.in_prefill))
        while batch.sequences:
            batch.step()
    assert len(generated) > 4
    assert generated[:4] == [2, 3, 4, 5]
    assert [type(j.events[-1]) for j in (short, long)] == [End, End]


def test_single_request_decodes_without_shared_passes(toy, monkeypatch):
    """Without others beside it, each step is a call of the model itself."""
    with idle_model(toy, memory="2GB") as loaded:
        batch, swept = Batch(loaded), []
        monkeypatch.setattr(batch_module, "run_pass", lambda *a: swept.append(a) or run_pass(*a))
        job = RecordedJob("One.", max_tokens=9)
        admit(batch, loaded, job)
        while batch.sequences:
            batch.step()
    assert job.events[-1].steps > 3
    assert len(swept) == 1


@pytest.mark.slow
def test_demo_gives_the_same_answers_in_a_batch():
    """In a trained model the likeliest tokens are close, so a rounding error would change one."""
    animals = ("cat", "dog", "owl", "fox")
    requests = [request(f"Tell me about a {a}.", max_tokens=24) for a in animals]
    requests.append(request("What is 12 plus 30?", tools=[ADD], max_tokens=40))
    with Engine(find(DEMO), batch=1, slots=20, prompt_store=0) as engine:
        expected = [outcome(engine.stream(r)) for r in requests]
    with Engine(find(DEMO), slots=20, prompt_store=0) as engine:
        answers = [engine.stream(r) for r in requests]
        results = [outcome(a) for a in answers]
    assert results == expected


@pytest.mark.parametrize("ticks", range(6))
def test_task_cancelled_as_an_event_arrives_ends(toy, ticks):
    """Cancelling works with and without a timeout, at any tick of the loop around the event."""

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
        for timeout in (None, 600):
            with pytest.raises(asyncio.CancelledError):
                asyncio.run(ask(engine, timeout))
