"""Test that a call in a helper process ends within its limits, and that others go on meanwhile."""

import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
from functools import reduce
from operator import mul
from re import fullmatch
from time import monotonic, sleep

import pytest

from flashmoe.bounded import calls
from flashmoe.chat.json_schema import check_schema, validation_error
from flashmoe.chat.raw_values import value_from_text
from flashmoe.errors import HelperError, LimitError, SettingError
from flashmoe.grammar.rules import check_response_format

#: A search that takes 2^40 steps, inside of C code that holds the interpreter.
ENDLESS = "(a+)+", "a" * 40 + "b"


@pytest.fixture(autouse=True)
def closed():
    yield
    calls.close()


def test_value_comes_back():
    assert calls.call(value_from_text, "3", {"type": "integer"}) == [3, None]
    assert calls.call(value_from_text, "3", {"type": "string"}) == ["3", None]
    assert calls.call(value_from_text, "\ud800\n", {}) == ["\ud800\n", None]
    assert calls.call(mul, 10**30, 10**30) == 10**60


def test_error_of_a_function_is_raised_as_it_is():
    with pytest.raises(SettingError, match="it is not a valid JSON schema: at type: 3 is not"):
        calls.call(check_schema, {"type": 3}, "it")


def test_text_of_an_error_is_short():
    """Its end, where the way out is, stays."""
    with pytest.raises(SettingError, match=r"^xxx.* \.\.\. .*3 is not valid under any") as refused:
        calls.call(check_schema, {"type": 3}, "x" * 5000)
    assert len(str(refused.value)) < 1100


def test_fault_of_a_function_names_it_and_has_its_traceback():
    with pytest.raises(RuntimeError, match=r"(?s)_operator.mul failed.*TypeError"):
        calls.call(mul, "a", "b")
    assert calls.call(mul, 2, 3) == 6


def test_call_ends_when_it_takes_too_long():
    with pytest.raises(LimitError, match=r"takes more than 0.5 seconds of processor time"):
        calls.call(fullmatch, *ENDLESS, seconds=0.5)
    assert calls.call(mul, 2, 3) == 6


def test_slow_call_that_ends_in_time_has_its_value():
    schema = {"items": {"enum": list(range(2000))}}
    value = [1999] * 500  # each is compared with all of the enum
    assert calls.call(validation_error, value, schema, seconds=60) is None


def test_call_ends_when_it_takes_too_much_memory():
    with pytest.raises(LimitError, match="takes more than 0.125 GB of memory"):
        calls.call(mul, "a", 10**10, nbytes=128 << 20)
    assert len(calls.call(mul, "a", 10**6)) == 10**6


def test_refused_call_is_refused_at_once_when_it_comes_again(monkeypatch):
    with pytest.raises(LimitError):
        calls.call(fullmatch, *ENDLESS, seconds=0.3)
    monkeypatch.setattr(sys, "executable", "/no/python")
    calls._calls().close()
    with pytest.raises(LimitError):
        calls.call(fullmatch, *ENDLESS, seconds=0.3)


def test_missing_process_is_an_error_with_its_reason(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/python")
    with pytest.raises(HelperError, match="no helper process can be started .*No such file"):
        calls.call(mul, 2, 3)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(HelperError, match="a helper process could not start: exit status 1"):
        calls.call(mul, 2, 3)


@pytest.mark.slow
def test_slow_calls_do_not_hold_up_others():
    """Eight calls that take too long wait for one process; ordinary calls have others."""
    errors = []

    def slow(i):
        try:
            calls.call(fullmatch, ENDLESS[0], ENDLESS[1] + str(i), seconds=1.0)
        except LimitError as e:
            errors.append(e)

    threads = [threading.Thread(target=slow, args=[i]) for i in range(8)]
    for thread in threads:
        thread.start()
    values = []
    while any(thread.is_alive() for thread in threads):
        values.append(calls.call(mul, 2, len(values)))
        sleep(0.01)
    assert len(errors) == 8
    # Each slow call takes a second of processor time, so these were not waited for.
    assert len(values) > 40
    assert values == list(range(0, 2 * len(values), 2))


@pytest.mark.slow
def test_calls_of_one_group_do_not_wait_for_those_of_another():
    """All processes of a group start, one after the other, while the other one is asked."""
    assert calls.call(mul, 2, 3, group=calls.TEMPLATES) == 6
    pids = children()
    for i in range(3):
        with pytest.raises(LimitError):
            calls.call(fullmatch, ENDLESS[0], ENDLESS[1] + str(i), seconds=0.3)
    assert calls.call(mul, 2, 4, group=calls.TEMPLATES) == 8
    assert set(pids) <= set(children())


def test_arguments_that_are_nested_too_deeply_are_refused():
    deep = reduce(lambda inner, _: [inner], range(100_000), 0)
    with pytest.raises(SettingError, match="nested too deeply"):
        calls.call(validation_error, deep, {})


def test_what_a_function_logs_is_logged_here(caplog):
    schema = {"type": "string", "not": {"const": "a"}}
    with caplog.at_level(logging.WARNING, "flashmoe"):
        check_response_format({"type": "json_schema", "schema": schema})
    assert "cannot enforce the complete schema" in caplog.text


def test_killed_process_is_replaced():
    assert calls.call(mul, 2, 3) == 6
    for pid in children():
        os.kill(pid, signal.SIGKILL)
    end = monotonic() + 30
    while children():
        assert monotonic() < end
        sleep(0.01)
    assert calls.call(mul, 2, 5) == 10


def test_close_ends_processes_and_calls_under_way():
    errors = []

    def slow():
        try:
            calls.call(fullmatch, *ENDLESS, seconds=60)
        except Exception as e:
            errors.append(e)

    thread = threading.Thread(target=slow)
    thread.start()
    while not children():
        sleep(0.01)
    sleep(0.5)
    calls.close()
    thread.join(30)
    assert [type(e) for e in errors] == [HelperError]
    end = monotonic() + 30
    while children():
        assert monotonic() < end
        sleep(0.01)


def test_processes_end_with_their_parent():
    program = """
        import os, signal
        from operator import mul
        from flashmoe.bounded import calls
        calls.call(mul, 1, 2)
        pids = [p._process.pid for p in calls._calls().group(calls.VALUES).fast._all]
        print(*pids, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    (pid,) = map(int, result.stdout.split())
    end = monotonic() + 30
    while os.path.exists(f"/proc/{pid}/stat") and state(pid) != "Z":
        assert monotonic() < end
        sleep(0.05)


def test_fork_starts_processes_of_its_own():
    assert calls.call(mul, 2, 3) == 6
    if pid := os.fork():
        assert calls.call(mul, 2, 4) == 8
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert calls.call(mul, 2, 5) == 10
    else:
        os._exit(0 if calls.call(mul, 3, 3) == 9 else 1)


def state(pid):
    with open(f"/proc/{pid}/stat") as f:
        return f.read().rpartition(")")[2].split()[0]


def children():
    """Return the pids of the helper processes of this process, without those that ended."""
    pids: list[int] = []
    for thread in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{thread}/children") as f:
                pids += [int(pid) for pid in f.read().split()]
        except OSError:
            pass
    alive = []
    for pid in set(pids):
        try:
            with open(f"/proc/{pid}/cmdline") as f:
                if "flashmoe.bounded.child" in f.read() and state(pid) != "Z":
                    alive.append(pid)
        except OSError:
            pass
    return alive
