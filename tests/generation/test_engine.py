"""Test that an engine serves any thread or task, and ends every answer properly."""

import asyncio
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from toys import write_chat_toy, write_toy

from flashmoe.catalog import DEMO, find
from flashmoe.engine import Engine, release, shared
from flashmoe.errors import CheckpointError, ReadError, SettingError
from flashmoe.events import End, Progress, Reasoning, Text
from flashmoe.memory import system as memory
from flashmoe.requests import Request


def ask(text: str, **options) -> Request:
    options = {"max_tokens": 12, "temperature": 0.0} | options
    return Request(messages=[{"role": "user", "content": text}], **options)


@pytest.fixture(scope="module")
def engine():
    with Engine(find(DEMO), slots=16) as engine:
        yield engine


@pytest.fixture(scope="module")
def toy_engine(tmp_path_factory):
    """Load a toy model, which writes nonsense but is faster than the demo."""
    path = write_chat_toy(tmp_path_factory.mktemp("toys") / "chat")
    with Engine(path, slots=5, prompt_cache="4MB", prompt_store="4MB") as engine:
        yield engine


def answer(engine, request) -> str:
    return text_of(engine.stream(request))


def text_of(events) -> str:
    return "".join(e.text for e in events if isinstance(e, Text))


def first_text(events) -> Text:
    return next(e for e in events if isinstance(e, Text))


def nothing_else_is_generated(engine) -> bool:
    """Return whether no step of a new answer is shared with an older answer that goes on."""
    *events, end = engine.stream(ask("Hello."))
    return bool(text_of(events)) and end.batch == 1


#: Options with which all tokens are equally likely, so that an answer is long.
EVEN = {"temperature": 100, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 1}
LONG = ask("Tell me a long story.", max_tokens=2000, **EVEN)
ANIMALS = ["cat", "dog", "owl", "fox", "bee", "cow", "hen", "ant"]


def test_threads_and_tasks_get_the_events_of_their_own_answers(toy_engine):
    """Run 8 threads and 50 tasks at once; each fifth task leaves in the middle of its answer."""
    engine = toy_engine
    requests = [ask(f"Tell me a short story about a {a}.", max_tokens=8) for a in ANIMALS]
    expected = [answer(engine, r) for r in requests]
    assert len(set(expected)) > 4
    texts_of_threads = [None] * len(requests)

    def work(i):
        texts_of_threads[i] = answer(engine, requests[i])

    async def task(i):
        if i % 5:
            events = [e async for e in engine.astream(requests[i % 8])]
            assert isinstance(events[-1], End)
            assert [type(e) for e in events].count(End) == 1
            return text_of(events)
        events = engine.astream(requests[i % 8])
        async for event in events:
            if isinstance(event, Text):
                await events.aclose()
        return None

    async def tasks():
        return await asyncio.gather(*map(task, range(50)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(requests))]
    for thread in threads:
        thread.start()
    assert asyncio.run(tasks()) == [expected[i % 8] if i % 5 else None for i in range(50)]
    for thread in threads:
        thread.join(300)
    assert texts_of_threads == expected


def test_requests_are_answered_in_order(engine):
    """The engine's thread notes the order: threads that read the answers may wake in any order."""
    order, over = [], threading.Event()

    def put_of(i):
        def put(event):
            if isinstance(event, End | BaseException):
                order.append(i)
            if len(order) == 6:
                over.set()

        return put

    for i in range(6):
        engine._submit(ask(f"Say {i}.", max_tokens=2), put_of(i), None)
    assert over.wait(120)
    assert order == sorted(order)


def test_event_cancels_an_answer(engine):
    cancel = threading.Event()
    events = engine.stream(LONG, cancel)
    first_text(events)
    cancel.set()
    end = list(events)[-1]
    assert end.finish_reason == "cancelled"
    assert 0 < end.generated_tokens < 2000
    # An event that is set already leaves nothing to do.
    end = list(engine.stream(LONG, cancel))[-1]
    assert (end.finish_reason, end.generated_tokens, end.cached_tokens) == ("cancelled", 0, 0)


def test_dropped_stream_is_cancelled(engine):
    first_text(engine.stream(LONG))
    assert nothing_else_is_generated(engine)


def test_interrupt_cancels_the_answer_and_the_engine_goes_on():
    code = (
        "import signal; from flashmoe.engine import Engine\n"
        "from flashmoe.requests import Request; from flashmoe.catalog import find\n"
        f"r = Request([{{'role': 'user', 'content': 'Hello.'}}], max_tokens=3000, **{EVEN})\n"
        "signal.signal(signal.SIGALRM, lambda *a: signal.raise_signal(signal.SIGINT))\n"
        "with Engine(find('flashmoe-demo'), slots=12) as e:\n"
        "    answer = e.stream(r)\n"
        "    [next(answer) for _ in range(5)]\n"
        "    try:\n"
        "        signal.setitimer(signal.ITIMER_REAL, 0.3)\n"
        "        list(answer)\n"
        "    except KeyboardInterrupt:\n"
        "        events = list(e.stream(Request(r.messages, max_tokens=3)))\n"
        "        print(len(events))\n"
        "        assert events[-1].batch == 1, 'the first answer goes on'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) >= 3


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_requests(toy_engine):
    sizes = []
    for i in range(500):
        list(toy_engine.stream(ask(f"{i} plus {i % 7}?", max_tokens=1)))
        if i % 100 == 99:
            sizes.append(memory.resident())
    # The first hundred requests fill the prompt cache.
    sizes = sizes[1:]
    assert max(sizes) - sizes[0] < 12e6, sizes


def test_closed_stream_is_cancelled(engine):
    events = engine.stream(LONG)
    first_text(events)
    events.close()
    assert nothing_else_is_generated(engine)


def test_cancelled_task_cancels_its_answer(engine):
    async def main():
        generating = asyncio.Event()

        async def read():
            async for event in engine.astream(LONG):
                if isinstance(event, Text):
                    generating.set()

        task = asyncio.create_task(read())
        await asyncio.wait_for(generating.wait(), 120)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert nothing_else_is_generated(engine)


def test_engine_goes_on_after_a_refused_request(engine):
    with pytest.raises(SettingError, match="temperature"):
        answer(engine, ask("Hello.", temperature=-1))
    assert answer(engine, ask("Hello."))


def test_request_that_takes_long_to_check_does_not_hold_up_others(toy_engine):
    """It is refused in the end, and a later request is answered meanwhile."""
    list(toy_engine.stream(ask("Hello.", max_tokens=2)))  # the model is loaded
    ended = []

    def large():
        schema = {"enum": [f"value {i}" for i in range(150_000)]}
        with pytest.raises(SettingError, match="takes more than 2 seconds of processor time"):
            list(
                toy_engine.stream(
                    ask("Hi", response_format={"type": "json_schema", "schema": schema})
                )
            )
        ended.append("large")

    thread = threading.Thread(target=large)
    thread.start()
    while toy_engine.waiting == 0:
        assert thread.is_alive()
    *_, end = toy_engine.stream(ask("Hello.", max_tokens=2))
    ended.append("small")
    thread.join()
    assert ended == ["small", "large"]
    assert end.generated_tokens == 2


def test_template_without_an_end_is_an_error_and_the_engine_goes_on(tmp_path):
    path = write_chat_toy(tmp_path / "toy")
    file = path / "chat_template.jinja"
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    bomb = "{% if 'bomb' in messages[0].content %}" + loops + "{% endif %}"
    file.write_text(bomb + file.read_text())
    with Engine(path, slots=5) as engine:
        with pytest.raises(SettingError, match="template takes more than 3 seconds"):
            list(engine.stream(ask("A bomb.", max_tokens=2)))
        assert isinstance([*engine.stream(ask("Hello.", max_tokens=2))][-1], End)


def test_failed_load_is_reported_to_each_request(tmp_path):
    path = write_toy(tmp_path / "toy")
    (path / "config.json").rename(path / "away")
    with Engine(path) as engine:
        for _ in range(2):
            with pytest.raises(CheckpointError, match="config.json"):
                answer(engine, ask("Hello."))


def test_end_event_has_the_figures_of_the_answer(engine):
    *_, end = engine.stream(ask("Tell me a short story."))
    assert isinstance(end, End)
    assert (end.generated_tokens, end.experts, end.trained_experts, end.bits) == (12, 10, 10, 4)
    assert end.finish_reason == "length"
    assert end.tokens_per_second > 0
    assert end.prompt_seconds > 0
    assert end.peak_nbytes > 10**7


def test_pruned_request_does_not_change_the_next_one(engine):
    before = answer(engine, ask("Tell me about the sea.", max_tokens=40))
    pruned = [*engine.stream(ask("Tell me about the sea.", max_tokens=40, experts=1))]
    assert pruned[-1].experts == 1
    assert answer(engine, ask("Tell me about the sea.", max_tokens=40)) == before
    assert text_of(pruned) != before


@pytest.mark.parametrize("length", [1, 2, 5])
def test_stop_string_across_tokens_is_cut_off(engine, length):
    whole = answer(engine, ask("Tell me about the sea.", max_tokens=40))
    stop = whole[17 : 17 + length]
    cut = answer(engine, ask("Tell me about the sea.", max_tokens=40, stop=(stop,)))
    assert cut == whole[: whole.index(stop)]


def test_text_held_back_for_a_stop_string_is_emitted_at_the_end(engine):
    whole = answer(engine, ask("Tell me about the sea."))
    assert answer(engine, ask("Tell me about the sea.", stop=(whole[-3:] + "zzz",))) == whole


def test_reasoning_comes_before_the_answer_as_events_of_its_own(engine):
    kinds = {type(e) for e in engine.stream(ask("Say hello."))}
    assert kinds == {Progress, Text, End}
    thinking = ask("Why is the sky blue?", think=True, max_tokens=60)
    events = [e for e in engine.stream(thinking) if isinstance(e, Text | Reasoning)]
    kinds = [type(e) for e in events]
    assert kinds == sorted(kinds, key=[Reasoning, Text].index)
    assert set(kinds) == {Reasoning, Text}
    assert not any("think>" in e.text for e in events)
    assert not events[0].text.startswith("\n")


def test_engines_are_shared_by_settings():
    a, b = shared(find(DEMO), slots=12), shared(find(DEMO), slots=12)
    c = shared(find(DEMO), slots=13)
    assert a is b
    assert a is not c
    assert answer(a, ask("Hello.")) == answer(c, ask("Hello."))
    release()
    for engine in (a, c):
        with pytest.raises(RuntimeError, match="closed"):
            answer(engine, ask("Hello."))
    assert shared(find(DEMO), slots=13) is not c
    release()


def copy_of_demo(tmp_path):
    return Path(shutil.copytree(find(DEMO), tmp_path / "demo"))


def test_engine_recovers_from_a_file_deleted_while_generating(tmp_path):
    path = copy_of_demo(tmp_path)
    shard = path / "model.safetensors"
    with Engine(path, slots=12) as engine:
        expected = answer(engine, ask("Tell me a short story about a cat."))
        events = engine.stream(LONG)
        first_text(events)
        shard.rename(path / "away")
        shutil.copy2(path / "away", path / "copy")
        (path / "away").unlink()
        with pytest.raises(
            ReadError, match=r"expert \d+ of layer \d .*model.safetensors was deleted"
        ):
            list(events)
        (path / "copy").rename(shard)
        assert answer(engine, ask("Tell me a short story about a cat.")) == expected


def test_answer_cut_short_by_close_raises():
    engine = Engine(find(DEMO), slots=12)
    events = engine.stream(LONG)
    first_text(events)
    waiting = engine.stream(ask("Hello."))
    threading.Thread(target=engine.close).start()
    with pytest.raises(RuntimeError, match="closed"):
        list(events)
    with pytest.raises(RuntimeError, match="closed"):
        list(waiting)


def test_mlx_that_cannot_be_imported_is_an_error_of_the_answer():
    code = (
        "import sys; sys.modules['mlx.core'] = None\n"
        "from flashmoe.engine import Engine; from flashmoe.requests import Request\n"
        "from flashmoe.catalog import find\n"
        "try:\n"
        "    request = Request([{'role': 'user', 'content': 'x'}])\n"
        "    list(Engine(find('flashmoe-demo')).stream(request))\n"
        "except ImportError as e: print('reported', e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.startswith("reported"), done.stderr


def test_engine_goes_on_after_an_event_loop_is_closed(engine):
    async def leave():
        events = engine.astream(LONG)
        async for event in events:
            if isinstance(event, Text):
                break

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    loop.close()
    assert answer(engine, ask("Hello."))


def test_seed_gives_the_same_text_in_any_thread(engine):
    request = ask("Tell me a story.", temperature=1.2, seed=0, max_tokens=16)
    texts = []
    thread = threading.Thread(target=lambda: texts.append(answer(engine, request)))
    thread.start()
    thread.join()
    texts += [answer(engine, request), asyncio.run(collect(engine, request))]
    assert len(set(texts)) == 1, "seed 0 counts"
    others = {answer(engine, ask("Tell me a story.", temperature=1.2, seed=s)) for s in (1, 2)}
    assert len(others | {texts[0][:20]}) == 3


async def collect(engine, request) -> str:
    return "".join([e.text async for e in engine.astream(request) if isinstance(e, Text)])


@pytest.mark.slow
def test_answer_without_a_seed_differs_each_time(engine):
    def text(seed):
        return answer(engine, ask("Tell me a story.", temperature=1.5, seed=seed, max_tokens=24))

    assert text(7) == text(7)
    text(7)
    first = text(None)
    text(7)
    assert text(None) != first


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", -1), ("seed", 2**64), ("top_p", 1.5), ("min_p", -0.1), ("top_k", -1)]
    + [("max_tokens", 0), ("temperature", float("nan"))],
)
def test_value_out_of_range_is_refused_before_the_load(name, value):
    with Engine(find(DEMO) / "nothing") as engine, pytest.raises(SettingError, match=f"^{name}="):
        answer(engine, ask("Hello.", **{name: value}))


def test_top_k_may_be_the_whole_vocabulary(engine):
    assert answer(engine, ask("Tell me a story.", temperature=1.0, top_k=8192))


def test_impossible_defaults_of_a_checkpoint_are_refused(tmp_path):
    path = copy_of_demo(tmp_path)
    (path / "generation_config.json").write_text(json.dumps({"temperature": -3}))
    refused = pytest.raises(CheckpointError, match="generation_config.json has temperature -3")
    with Engine(path, slots=12) as engine, refused:
        answer(engine, ask("Tell me a story.", temperature=None))


EXITS = {
    "after an answer": "list(e.stream(Request(r.messages, max_tokens=5)))",
    "while reading the prompt": "next(e.stream(r))",
    "while generating": "s = e.stream(r); [next(s) for _ in range(9)]; s.close()",
    "with the iterator alive": "s = e.stream(r); [next(s) for _ in range(9)]",
    "while a queue waits": "s = e.stream(r); next(s); t = [e.stream(r) for _ in range(3)]",
    "before anything ran": "pass",
    "while loading": "s = e.stream(r)",
    "after close": "next(e.stream(r)); e.close(); e.close()",
}


@pytest.mark.slow
@pytest.mark.parametrize("when", list(EXITS))
def test_process_exits_cleanly(when):
    code = (
        "from flashmoe.engine import Engine; from flashmoe.requests import Request\n"
        "from flashmoe.catalog import find\n"
        "e = Engine(find('flashmoe-demo'), slots=12)\n"
        f"r = Request([{{'role': 'user', 'content': 'Hello.'}}], max_tokens=300, **{EVEN})\n"
        f"{EXITS[when]}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
